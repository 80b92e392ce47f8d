"""Tables on stdout."""

from pruneofa.cli.show import table


def test_in_a_pipe_a_row_is_one_line(capsys):
    table([{"layer": "l" * 60, "hash": "f" * 64, "why": "a reason of many words " * 5}])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["layer", "hash", "why"]
    assert "f" * 64 in row and "a reason of many words " * 4 in row
