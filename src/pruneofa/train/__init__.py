"""The training half: needs `pip install pruneofa[train]`."""

try:
    import torch as _torch  # noqa: F401 - a missing extra should say so here, once
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f"{error.name} is missing: pip install 'pruneofa[train]'") from error

from pruneofa.train.trainer import LockCallback, PruningCallback

__all__ = ["LockCallback", "PruningCallback"]
