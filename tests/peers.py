"""Processes of peers that start at once."""

import pytest

from pruneofa.bench.peers import PRUNEOFA, Peer
from pruneofa.bench.workers import Worker


def without_torch(patch: pytest.MonkeyPatch) -> None:
    """The process of every peer runs our engine: all that bench does with it is the same, without torch's imports."""
    ask = Worker.ask

    def ask_ours(worker: Worker, do: str, **arguments: object) -> dict:
        return ask(worker, do, **arguments | {name: PRUNEOFA for name in ("peer", "key") if name in arguments})

    patch.setattr(Worker, "ask", ask_ours)
    patch.setattr(Peer, "missing", lambda peer, elsewhere=False: [])
