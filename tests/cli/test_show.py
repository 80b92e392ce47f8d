"""Tables on stdout."""

from pruneofa.cli.show import pairs, print_metrics, table


def test_in_a_pipe_a_row_is_one_line(capsys):
    table([{"layer": "l" * 60, "hash": "f" * 64, "why": "a reason of many words " * 5}])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["layer", "hash", "why"]
    assert "f" * 64 in row and "a reason of many words " * 4 in row


def test_names_and_values_have_no_header(capsys):
    pairs({"layers": 4, "packed": None})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["layers", "4"], ["packed", "-"]]


def test_metrics_are_percent_and_accuracies_say_of_how_many_rows(capsys):
    metrics = {"out": "model", "accuracy": 50.0, "accuracy_mm": 75.125, "f1": 1 / 3}
    print_metrics(metrics, False, {"": 1200, "_mm": 8})
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    shown = ["model", "50.00 % of 1,200 rows", "75.12 % of 8 rows", "0.33 %"]
    assert [[name, value.strip()] for name, value in lines] == [list(pair) for pair in zip(metrics, shown, strict=True)]
    print_metrics({"accuracy": 50.0}, False)
    assert capsys.readouterr().out.split() == ["accuracy", "50.00", "%"]


def test_on_a_narrow_terminal_the_longest_cells_go_on_below(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    table([{"layer": "short", "hash": "f" * 64, "why": "a reason of many words"}])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40 and lines[0].split() == ["layer", "hash", "why"]
    assert "".join(lines).count("f") - "of".count("f") == 64
