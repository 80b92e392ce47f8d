"""Progress: a bar with the remaining time on a terminal, otherwise a line every few seconds."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from pruneofa.errors import printable

SECONDS_BETWEEN_LINES = 15


@contextlib.contextmanager
def progress(description: str, total: int, *, completed: int = 0) -> Iterator[Callable[..., None]]:
    """Yield `advance(count=1, note="")`, which moves a bar of `total` units that starts at `completed`.

    The bar goes to stderr, so that stdout contains only output that a program may parse.
    """
    description = printable(description)
    if sys.stderr.isatty():
        with _bar(description, total, completed) as advance:
            yield advance
        return
    start = last = time.monotonic()
    done = completed
    if completed:
        notice(f"{description}: resumes at {completed}/{total}")

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = (now - start) / max(done - completed, 1) * (total - done)
            sys.stderr.write(f"{description}: {done}/{total}, {clock(left)} left  {printable(note)}\n")
            sys.stderr.flush()

    yield advance
    seconds = time.monotonic() - start
    if seconds > 2:
        notice(f"{description}: done in {clock(seconds)}")


@contextlib.contextmanager
def _bar(description: str, total: int, completed: int) -> Iterator[Callable[..., None]]:
    from tqdm import tqdm

    form = "{desc} {bar} {n_fmt}/{total_fmt}, {remaining} left{postfix}"
    shown = printable(description)
    with tqdm(total=total, initial=completed, desc=shown, bar_format=form, file=sys.stderr, dynamic_ncols=True) as bar:

        def advance(count: int = 1, note: str = "") -> None:
            if note:
                bar.set_postfix_str(printable(note), refresh=False)
            bar.update(count)

        yield advance


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def notice(message: str) -> None:
    """Write one line to stderr, with everything that is not printable escaped."""
    sys.stderr.write(f"{printable(message)}\n")
