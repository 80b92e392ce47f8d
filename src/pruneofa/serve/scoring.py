"""From what the engine computed to what clients ask for: vectors, scores of classes, relevance of texts."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pruneofa.engine import reference
from pruneofa.engine.heads import Classification, Embedding
from pruneofa.engine.tokenizer import Side
from pruneofa.serve.batching import Job
from pruneofa.serve.call import Call
from pruneofa.serve.model import Item, Model
from pruneofa.serve.refusal import invalid


def vectors(*, normalize: bool = True, dimensions: int | None = None) -> Callable[[Job], NDArray[np.float32]]:
    """The function that makes vectors (texts, dimensions) of a job: truncated, and then of length 1 if `normalize`.

    Raises Refused for fewer dimensions than one; the function does for more than there are.
    """
    if dimensions is not None and dimensions < 1:
        raise invalid("`dimensions` should be positive")
    return lambda job: _vectors(job, normalize, dimensions)


def _vectors(job: Job, normalize: bool, dimensions: int | None) -> NDArray[np.float32]:
    vectors = np.array([job.results[index] for index in range(len(job.results))])
    head = job.model.engine.head
    assert isinstance(head, Embedding)
    if dimensions is not None and dimensions > vectors.shape[1]:
        raise invalid("`dimensions` should be smaller than the maximum embedding dimension.")
    vectors = np.ascontiguousarray(vectors[:, : dimensions or head.dimensions])
    return reference.unit(vectors) if normalize else vectors


async def scores(
    call: Call,
    model: Model,
    items: list[Item],
    *,
    single: bool = False,
    field: str = "inputs",
    truncate: bool | None,
    side: Side | None = None,
    function: Literal["softmax", "sigmoid", "none"] | None = None,
) -> NDArray[np.float32]:
    """Scores (inputs, classes) of a classification: its logits through a function; None: that of the model."""
    job = await call.run(model, items, single=single, field=field, truncate=truncate, side=side)
    rows = np.stack([job.results[index] for index in range(len(items))])
    head = model.engine.head
    assert isinstance(head, Classification)
    match function:
        case "none":
            return rows
        case "softmax":
            return reference.softmax(rows)
        case "sigmoid":
            return reference.sigmoid(rows).astype(np.float32)
        case None:
            return head.scores(rows).astype(np.float32)


async def relevance(
    call: Call,
    model: Model,
    query: str,
    texts: list[str],
    *,
    field: str,
    truncate: bool | None = None,
    side: Side | None = None,
    raw: bool = False,
) -> NDArray[np.float32]:
    """Scores (texts,) of each text for the query: logits, or 0 to 1 by a sigmoid unless `raw`."""
    items: list[Item] = [(query, text) for text in texts]
    logits = (await scores(call, model, items, field=field, truncate=truncate, side=side, function="none"))[:, 0]
    return logits if raw else reference.sigmoid(logits).astype(np.float32)
