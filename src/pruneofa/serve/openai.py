"""OpenAI's routes: embeddings and the list of models."""

import base64
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from pruneofa.serve.bodies import Body, Input, Many, is_single
from pruneofa.serve.call import Call, Post, Serving, made, to_json
from pruneofa.serve.names import named
from pruneofa.serve.scoring import vectors


class EmbeddingsRequest(Body):
    """Texts or token ids, one or a list."""

    input: Input | Many[Input]
    model: str | None = None
    user: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


async def embeddings(call: Call, body: EmbeddingsRequest) -> tuple[Any, int]:
    """Vectors of texts."""
    finish = vectors(dimensions=body.dimensions)
    model = named(call, "embedding", body.model)
    single = is_single(body.input)
    items: Any = [body.input] if single else body.input
    job = await call.run(model, items, single=single, field="input", finish=finish)
    if body.encoding_format == "base64":
        rows: Any = await made(lambda: [_base64(row) for row in job.value], job.value.size)
    else:
        rows = job.value
    value = {
        "object": "list",
        "data": [{"object": "embedding", "embedding": row, "index": index} for index, row in enumerate(rows)],
        "model": model.name,
        "usage": {"prompt_tokens": job.tokens, "total_tokens": job.tokens},
    }
    return value, job.value.size


def _base64(row: NDArray[np.float32]) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


async def models(request: Request) -> Response:
    """The models by name."""
    serving: Serving = request.app.state.serving
    listed = [{"id": name, "object": "model", "created": 0, "owned_by": "pruneofa"} for name in serving.models]
    return Response(to_json({"object": "list", "data": listed}), media_type="application/json")


POSTS = [Post(path, EmbeddingsRequest, embeddings, openai=True) for path in ("/v1/embeddings", "/embeddings")]
