"""Functions that are called when something takes too long, by a clock of the test's own."""

import asyncio

import pytest

from pruneofa.serve.overdue import Overdue


class Loop:
    def __init__(self):
        self.now, self.timers = 0.0, []

    def time(self):
        return self.now

    def call_at(self, when, function, *arguments):
        self.timers.append((when, function, arguments))
        return self.timers[-1]

    def go_to(self, now):
        self.now = now
        due = [timer for timer in self.timers if timer[0] <= now]
        self.timers = [timer for timer in self.timers if timer[0] > now]
        for _, function, arguments in due:
            function(*arguments)


def test_what_is_removed_is_not_called_and_the_rest_once_after_its_own_delay(monkeypatch):
    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    called = []
    first, removed, late = (lambda name=name: called.append(name) for name in ("first", "removed", "late"))
    overdue = Overdue(10)
    overdue.add(first)
    overdue.add(removed)
    overdue.remove(removed)
    loop.go_to(9)
    overdue.add(late)
    assert called == [] and len(loop.timers) == 1
    loop.go_to(10)
    assert called == ["first"]
    loop.go_to(19)
    assert called == ["first", "late"] and not loop.timers
    overdue.remove(late)  # was called
    overdue.add(removed)
    loop.go_to(29)
    assert called == ["first", "late", "removed"]


def test_a_function_that_raises_or_removes_another_stops_no_timer(monkeypatch):
    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    called = []
    overdue = Overdue(10)

    def remove():
        overdue.remove(removed)

    def removed():
        called.append("removed")

    def broken():
        raise RuntimeError

    for function in (remove, removed, broken, lambda: called.append("behind it")):
        overdue.add(function)
    with pytest.raises(RuntimeError):  # the event loop logs it
        loop.go_to(10)
    loop.go_to(10)
    assert called == ["behind it"] and not loop.timers
    overdue.add(removed)
    loop.go_to(20)
    assert called == ["behind it", "removed"]
