"""Tables on stdout."""

from pruneofa.cli.show import table


def test_in_a_pipe_a_row_is_one_line(capsys):
    table([{"layer": "l" * 60, "hash": "f" * 64, "why": "a reason of many words " * 5}])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["layer", "hash", "why"]
    assert "f" * 64 in row and "a reason of many words " * 4 in row


def test_on_a_narrow_terminal_the_longest_cells_go_on_below(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    table([{"layer": "short", "hash": "f" * 64, "why": "a reason of many words"}])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40 and lines[0].split() == ["layer", "hash", "why"]
    assert "".join(lines).count("f") - "of".count("f") == 64
