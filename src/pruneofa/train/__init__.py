"""The training half: needs `pip install pruneofa[train]`."""

from typing import Any

from pruneofa.errors import need_train_extra

need_train_extra()

__all__ = ["LockCallback", "PruningCallback"]


def __getattr__(name: str) -> Any:
    # Lazy, because processes that only tokenize text need neither torch nor transformers.
    if name in __all__:
        from pruneofa.train import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
