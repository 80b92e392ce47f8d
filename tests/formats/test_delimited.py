"""CSV and TSV: one reader for tasks, the corpus and predictions."""

import csv
import io
import tracemalloc

import pytest

from pruneofa.errors import InputError
from pruneofa.formats import delimited
from pruneofa.formats.delimited import literal_quotes, other_delimiter, read_fields, read_rows


def lines(text):
    return io.StringIO(text, newline="")


@pytest.mark.parametrize(
    ("text", "literal", "first"),
    [
        ("a\tb\nx\ty\n", False, ["x", "y"]),
        ('a\tb\n"x ""z"""\ty\n', False, ['x "z"', "y"]),
        ('a\tb\n"x\ty"\ty\n', False, ["x\ty", "y"]),  # a tab in a text
        ('a\tb\n"x\n z"\ty\n', False, ["x\n z", "y"]),  # a line break in a text
        ('a\n"x\n z"\n', False, ["x\n z"]),
        ('a\tb\nan "inch\ty\n', False, ['an "inch', "y"]),
        ('a\tb\n"open, never closed\ty\n', True, ['"open, never closed', "y"]),
        ('a\tb\n"Great" film\ty\n', True, ['"Great" film', "y"]),
        ('a\tb\n"one" and "two"\ty\n', True, ['"one" and "two"', "y"]),
        ('a\tb\n"open\ty\nclosed"\ty\n', True, ['"open', "y"]),  # two rows, and not one of two lines
        ('a\n"Hello," he said\n', True, ['"Hello," he said']),
        ('a\tb\r\n\r\n"x"\ty\r\n', False, ["x", "y"]),
        ('a\tb\t\t\n"x\t1"\ty\t\t\n', False, ["x\t1", "y"]),
    ],
)
def test_quotes_of_a_tsv_are_text_where_they_do_not_enclose_fields(text, literal, first):
    assert literal_quotes(lines(text)) is literal
    rows = list(read_fields(lines(text), "t", tabs=True, literal=literal))
    assert rows[1] == first
    assert next(read_rows(lines(text), "t", tabs=True, literal=literal)) == dict(zip(rows[0], first, strict=True))


def test_what_a_writer_of_csv_quotes_comes_back():
    rows = [["id", "text"], ["1", 'a "word"'], ["2", "two\nlines"], ["3", "a\ttab"], ["4", '"'], ["5", ""]]
    for tabs in (True, False):
        written = io.StringIO(newline="")
        csv.writer(written, delimiter="\t" if tabs else ",").writerows(rows)
        literal = tabs and literal_quotes(lines(written.getvalue()))
        assert list(read_fields(lines(written.getvalue()), "t", tabs=tabs, literal=literal)) == rows


def test_the_beginning_of_a_tsv_decides_and_the_rest_is_not_read(monkeypatch):
    monkeypatch.setattr(delimited, "_PREFIX", 30)
    read = 0

    def endless():
        nonlocal read
        yield "a\tb\n"
        while True:
            read += 1
            yield from ('"one\n', 'text"\ty\n')

    assert not literal_quotes(endless())
    assert read < 5
    assert literal_quotes(lines('a\tb\n"Great" film\ty\n' + "x\ty\n" * 20))


def test_the_wrong_row_of_a_quoted_tsv_is_named():
    text = 'a\tb\n"x\ty"\ty\n"wrong\tx"\ty\tz\n'
    with pytest.raises(InputError, match="t: line 3 has 3 fields, the header 2"):
        list(read_fields(lines(text), "t", tabs=True, literal=literal_quotes(lines(text))))
    text = 'a\tb\n"Great" film\ty\nwrong\ty\tz\n'
    with pytest.raises(InputError, match="t: line 3 has 3 fields, the header 2"):
        list(read_fields(lines(text), "t", tabs=True, literal=literal_quotes(lines(text))))


@pytest.mark.parametrize(
    ("header", "suffix", "found"),
    [
        (["a;b"], ".csv", "';', wanted ','"),
        (["a\tb"], ".csv", r"'\t', wanted ','"),
        (["a,b"], ".tsv", r"',', wanted '\t'"),
        (["a|b"], ".tsv", r"'|', wanted '\t'"),
        (["a"], ".csv", None),
        (["a;b", "c"], ".csv", None),
        (["a;b"], ".parquet", None),
        ([], ".csv", None),
    ],
)
def test_a_header_of_one_name_with_another_delimiter_in_it(header, suffix, found):
    said = other_delimiter(header, suffix)
    assert (
        said is None if found is None else said == f"the delimiter looks like {found} in {suffix}; write the file again"
    )


def test_columns_at_the_end_without_a_name_are_left_out():
    assert list(read_fields(lines("a,b,,\nx,y,,\n\nz,,,\n"), "t", tabs=False)) == [["a", "b"], ["x", "y"], ["z", ""]]
    assert list(read_fields(lines(",a\n0,x\n"), "t", tabs=False)) == [["", "a"], ["0", "x"]]


def test_a_quote_that_is_never_closed_does_not_fill_the_memory():
    def endless():
        yield "a\tb\n"
        yield '"open\ty\n'
        for _ in range(200_000):
            yield f"{'x' * 100}\ty\n"

    tracemalloc.start()
    assert literal_quotes(endless())
    assert sum(1 for _ in read_fields(endless(), "t", tabs=True, literal=True)) == 200_002
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t: no header; its first line has to name the columns"),
        ("\n", "t: no header"),
        ("a,a\nx,y\n", "t: the header 'a', 'a' has a name twice; rename one"),
        (",,\n,,\n", "t: no header"),
        ("a,b,,\nx,y\n", "t: line 2 has 2 fields, the header 4"),
        ("a,b,,\nx,y,,\nHello, world,y,\n", "t: line 3 has text in a column to which the header gives no name; quote"),
        ("a,b\nx\n", "t: line 2 has 1 fields, the header 2; quote texts that contain the delimiter"),
        ("a,b\nx,y,z\n", "t: line 2 has 3 fields, the header 2"),
        ('a,b\n"x,y\n', "t: line 2: unexpected end of data; write the file again"),
        ('a,b\n"x"z,y\n', "t: line 2: ',' expected after '\"'; write the file again"),
    ],
)
def test_what_is_wrong(text, message):
    with pytest.raises(InputError) as error:
        list(read_rows(lines(text), "t", tabs=False))
    assert str(error.value).startswith(message)
