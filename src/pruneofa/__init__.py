"""Prune a pretrained encoder once on plain text, then fine-tune it sparse to every task."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pruneofa.engine.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the engine, and NumPy with it, at its first use: `import pruneofa` and `pruneofa --help` stay fast."""
    if name == "Engine":
        from pruneofa.engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
