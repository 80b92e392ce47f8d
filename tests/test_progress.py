import io
import re
import sys

from pruneofa.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_starts_where_the_work_resumes(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress("prune", 10, completed=4) as advance:
        advance(3)
        advance(3, "loss 1.5")
    first, *_, last = re.split(r"[\r\n]+", terminal.getvalue().strip())
    assert first.startswith("prune ") and " 4/10, " in first
    assert last.startswith("prune ") and last.endswith(" 10/10, 00:00 left, loss 1.5")


def test_a_file_gets_lines(capsys):
    with progress("prune", 10, completed=4) as advance:
        advance(6)
    assert capsys.readouterr().err == "prune: resumes at 4/10\n"
