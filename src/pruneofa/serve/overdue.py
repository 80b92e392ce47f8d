"""Functions to call when something takes too long, with one timer for all requests."""

import asyncio
from collections.abc import Callable


class Overdue:
    """Calls what was added a delay ago and not removed since; for one event loop.

    A timer for each request would cost it 30 to 100 µs after its tokens have been computed, when no code is cached.
    """

    def __init__(self, delay: float) -> None:
        """Wait `delay` seconds before each call."""
        self._delay = delay
        self._due: dict[Callable[[], object], float] = {}  # when to call, the earliest first
        self._timer: asyncio.TimerHandle | None = None

    def add(self, function: Callable[[], object]) -> None:
        """Call `function` after the delay."""
        loop = asyncio.get_running_loop()
        self._due[function] = due = loop.time() + self._delay
        if self._timer is None:
            self._timer = loop.call_at(due, self._call, loop)

    def remove(self, function: Callable[[], object]) -> None:
        """Do not call `function`, if it was not called yet."""
        self._due.pop(function, None)

    def _call(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        try:
            for function in [function for function, due in self._due.items() if due <= now]:
                if self._due.pop(function, None) is not None:  # None: one before it has removed it
                    function()
        finally:  # after an error the rest is called by the next timer, at once
            self._timer = loop.call_at(min(self._due.values()), self._call, loop) if self._due else None
