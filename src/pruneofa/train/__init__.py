"""The training half: needs `pip install pruneofa[train]`."""

import importlib.util
from typing import Any

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    raise ImportError("training needs torch and transformers: pip install 'pruneofa[train]'")

__all__ = ["LockCallback", "PruningCallback"]


def __getattr__(name: str) -> Any:
    # Lazy, because processes that only tokenize text need neither torch nor transformers.
    if name in __all__:
        from pruneofa.train import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
