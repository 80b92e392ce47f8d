"""Nothing that a file says reaches the terminal as it is: no escape sequence, no markup."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pruneofa.cli import show
from pruneofa.errors import InputError, first_line, printable
from tests.tiny import write_folder

HOSTILE = "\x1b]0;owned\x07\x1b[2J[/red][link=http://x]\u202etxt.exe\r\n\x9b1m\u2028"


def harmless(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_printable():
    assert printable("plain, naïve 文字 ±") == "plain, naïve 文字 ±"
    assert printable("\x1b[2J\n\u202e") == "\\x1b[2J\\n\\u202e"
    assert printable(HOSTILE).isprintable()
    assert first_line(ValueError("a\x1b[1m\nb")) == "a\\x1b[1m"


@pytest.fixture
def folder(tmp_path):
    """A folder with hostile names: of a tensor, of a label and of a token."""
    write_folder(tmp_path / "model", id2label={"0": HOSTILE, "1": "b", "2": "c"})
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[f"bert.encoder.layer.0.{HOSTILE}.dense.weight"] = np.ones((4, 4), np.float32)
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    return tmp_path / "model"


@pytest.mark.parametrize("verb", [["inspect"], ["inspect", "--json"], ["verify"], ["pack"], ["bench"], ["evaluate"],
                                  ["export", "--to", "compressed-tensors"],
                                  pytest.param(["export", "--to", "onnx"], marks=pytest.mark.slow)])  # fmt: skip
def test_hostile_names_are_escaped(verb, folder, tmp_path, call):
    name, *options = verb
    more = {"verify": [folder], "pack": [tmp_path / "out"], "export": [tmp_path / "out"],
            "evaluate": ["--task", "sst2"], "bench": ["--peers", "pruneofa"]}.get(name, [])  # fmt: skip
    said = call(name, folder, *more, *options)
    assert harmless(said.out) and harmless(said.err)
    assert "Traceback" not in said.err


def test_cells_of_a_table_are_no_markup(capsys):
    show.table([{"layer": "[/red]", "value[bold]": "[link=http://x]y[/link]"}, {"layer": HOSTILE, "value[bold]": 1.5}])
    said = capsys.readouterr().out
    assert "[/red]" in said and "[link=http://x]y[/link]" in said and "value[bold]" in said
    assert harmless(said)


def test_errors_warnings_and_tracebacks_are_escaped(call, monkeypatch):
    def fail(error):
        def inspect(_):
            raise error

        from pruneofa.formats import pattern

        monkeypatch.setattr(pattern, "inspect", inspect)
        return call("inspect", ".")

    for error, code in ((InputError(HOSTILE), 2), (RuntimeError(HOSTILE), 3)):
        said = fail(error)
        assert said.code == code and harmless(said.err) and "owned" in said.err
    assert harmless(call("inspect", f"x{HOSTILE}").err)
    assert harmless(call(f"inspect{HOSTILE}").err)


def test_a_panic_of_a_library_is_one_line(call, monkeypatch):
    panic = type("PanicException", (BaseException,), {})
    from pruneofa.formats import pattern

    def inspect(_):
        raise panic("index out of bounds\nmore")

    monkeypatch.setattr(pattern, "inspect", inspect)
    said = call("inspect", ".")
    assert (said.code, said.err) == (3, "pruneofa: error: a library failed on this input: index out of bounds\n")


def test_json_is_escaped(capsys):
    show.print_value({HOSTILE: HOSTILE}, True)
    said = capsys.readouterr().out
    assert harmless(said) and json.loads(said) == {HOSTILE: HOSTILE}
