"""What a server says of itself: health, metrics, and text-embeddings-inference's /info."""

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from pruneofa import __version__
from pruneofa.engine.heads import Embedding
from pruneofa.serve.call import Call, Serving, to_json
from pruneofa.serve.model import Model
from pruneofa.serve.refusal import Refused


async def health(request: Request) -> Response:
    """200 while the server computes."""
    check_health(request.app.state.serving)
    return Response()


async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    serving: Serving = request.app.state.serving
    serving.batcher.report()
    return Response(serving.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def info(request: Request) -> Response:
    """What is loaded, by text-embeddings-inference's names, and what the engine does with it."""
    call = Call(request.scope, request.receive)
    model = call.model()
    limits = call.serving.settings
    value = {
        "model_id": model.name,
        "model_sha": None,
        "model_dtype": model.engine.precision,
        "served_model_name": model.name,
        "model_type": _model_type(model),
        "max_concurrent_requests": limits.max_concurrent_requests,
        "max_input_length": model.engine.tokenizer.limit,
        "max_batch_tokens": limits.max_batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": limits.most_inputs,
        "auto_truncate": limits.auto_truncate,
        "tokenization_workers": 1,
        "version": __version__,
        "sha": None,
        "docker_label": None,
        "engine": _describe(model),
        "models": {other.name: other.engine.task for other in call.serving.models.values()},
    }
    return Response(to_json(value), media_type="application/json")


def check_health(serving: Serving) -> None:
    """Raise Refused if a thread of the queue died."""
    if not serving.batcher.healthy:
        raise Refused("Unhealthy", "unhealthy")


def _describe(model: Model) -> dict[str, Any]:
    engine = model.engine
    return {
        "task": engine.task,
        "sparsity": round(engine.sparsity, 4),
        "precision": engine.precision,
        "activations": engine.activations,
        "isa": engine.isa,
        "threads": engine.threads,
        "labels": model.labels,
        "prompts": sorted(engine.tokenizer.prompts),
    }


def _model_type(model: Model) -> dict[str, Any]:
    """One key, as in text-embeddings-inference; tasks that it has not under their own names."""
    head = model.engine.head
    if isinstance(head, Embedding):
        return {"embedding": {"pooling": head.pooling}}
    if not model.labels:
        return {model.engine.task.replace(" ", "_"): {}}
    labels = {
        "id2label": {str(index): label for index, label in enumerate(model.labels)},
        "label2id": {label: index for index, label in enumerate(model.labels)},
    }
    if model.engine.task == "token classification":
        return {"token_classification": labels}
    return {"reranker" if model.reranks else "classifier": labels}
