"""JSON lines: what is no object, or is not clear, is refused."""

import pytest

from pruneofa.errors import InputError
from pruneofa.formats.json_lines import parse_line


def test_an_object_keeps_its_order_and_nested_values():
    line = '{"text": "a", "answers": {"text": ["b"], "start": [0]}, "id": 1}\n'
    assert list(parse_line(line, "f").items()) == [
        ("text", "a"), ("answers", {"text": ["b"], "start": [0]}), ("id", 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{text}", "f: line 1 is not JSON ("),
        ("[1]", "f: line 1 is a JSON list, wanted an object"),
        ('{"text": "a", "label": 1, "text": "b"}', "f: line 1 is not JSON (the key 'text' is there twice)"),
        ('{"text": {"a": 1, "a": 1}}', "f: line 1 is not JSON (the key 'a' is there twice)"),
    ],
)
def test_what_is_refused(line, message):
    with pytest.raises(InputError) as error:
        parse_line(line, "f: line 1")
    assert str(error.value).startswith(message)
