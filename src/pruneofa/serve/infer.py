"""Open Inference Protocol v2: health, metadata, and inference with tensors in JSON or in binary."""

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from pruneofa import __version__
from pruneofa.engine.inputs import as_matrix, row_lengths
from pruneofa.errors import InputError
from pruneofa.serve import answers
from pruneofa.serve.bodies import Body, Many
from pruneofa.serve.call import BINARY_HEADER, Call, Post, made, to_json
from pruneofa.serve.model import Item, Model, TokenIds
from pruneofa.serve.refusal import invalid
from pruneofa.serve.scoring import scores, vectors
from pruneofa.serve.status import health
from pruneofa.serve.tensors import Tensor, datatype, read, shapes, to_bytes

Arrays = dict[str, NDArray[Any]]

# Names and types by task: inputs, and what comes out for each.
_TEXT, _JSON = {"text": "BYTES"}, {"json": "BYTES"}
_IDS = ("input_ids", "attention_mask", "token_type_ids")
_INPUTS = {"question answering": {"question": "BYTES", "context": "BYTES"}}
_OUTPUTS = {
    "embedding": {"embedding": "FP32"},
    "classification": {"scores": "FP32", "label": "BYTES"},
    "question answering": {"answer": "BYTES", "start": "INT64", "end": "INT64", "score": "FP32"},
}


class RequestedOutput(Body):
    """An output by name."""

    name: str
    parameters: dict[str, Any] | None = None


class InferRequest(Body):
    """Tensors of inputs, and which outputs are wanted."""

    inputs: Many[Tensor]
    outputs: Many[RequestedOutput] | None = None
    id: str | None = None
    parameters: dict[str, Any] | None = None


async def server(request: Request) -> Response:
    """The server's name and version."""
    value = {"name": "pruneofa", "version": __version__, "extensions": ["binary_tensor_data"]}
    return Response(to_json(value), media_type="application/json")


async def ready(request: Request) -> Response:
    """200 if the model is loaded."""
    Call(request.scope, request.receive).model()
    return await health(request)


async def metadata(request: Request) -> Response:
    """What a model takes and gives."""
    model = Call(request.scope, request.receive).model()
    task = model.engine.task
    inputs = _INPUTS.get(task, _TEXT)
    value = {
        "name": model.name,
        "versions": ["1"],
        "platform": "pruneofa",
        "inputs": [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in inputs.items()],
        "outputs": [
            {"name": name, "datatype": kind, "shape": [-1, -1] if name in ("embedding", "scores") else [-1]}
            for name, kind in _OUTPUTS.get(task, _JSON).items()
        ],
    }
    return Response(to_json(value), media_type="application/json")


async def infer(call: Call, body: InferRequest) -> tuple[Response, int]:
    """Tensors of results for tensors of texts or token ids."""
    model = call.model()
    claimed = shapes(body.inputs)
    _check_names(model, claimed)
    for name, shape in claimed.items():  # before anything is made of the data
        if name in _IDS and len(shape) != 2:
            raise invalid(f"{name}: the shape is {shape}, wanted (batch, seq)")
        call.check_size(shape[0] if name in _IDS else math.prod(shape))
    inputs = await made(lambda: read(body.inputs, call.binary), sum(map(math.prod, claimed.values())))
    found = await _compute(call, model, inputs)
    wanted = body.outputs if body.outputs is not None else [RequestedOutput(name=name) for name in found]
    names = [output.name for output in wanted]
    if not found.keys() >= set(names):
        raise invalid(f"outputs are {', '.join(found)}; another one was asked for")
    if len(set(names)) < len(names):
        raise invalid("an output is asked for twice")
    as_bytes = _flag(body.parameters, "binary_data_output", False)
    size = sum(_size(found[name]) for name in names)
    head, tail = await made(lambda: _written(model.name, body.id, found, wanted, as_bytes), size)
    headers = call.headers()
    if tail:
        headers[BINARY_HEADER] = str(len(head))
    kind = "application/octet-stream" if tail else "application/json"
    return Response(head + tail, headers=headers, media_type=kind), 0


def _flag(parameters: dict[str, Any] | None, name: str, default: bool) -> bool:
    """A parameter that is true or false. Raises Refused for another value."""
    value = (parameters or {}).get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"{name}: wanted true or false")
    return default if value is None else value


def _size(array: NDArray[Any]) -> int:
    """About how many numbers it is as long as, in JSON."""
    return sum(map(len, array.ravel())) // 8 if array.dtype == object else array.size


def _written(
    name: str, request: str | None, found: Arrays, wanted: list[RequestedOutput], as_bytes: bool
) -> tuple[bytes, bytes]:
    """The JSON of a response, and the bytes of tensors behind it."""
    described, tail = [], b""
    for output in wanted:
        array = found[output.name]
        entry: dict[str, Any] = {"name": output.name, "datatype": datatype(array), "shape": list(array.shape)}
        if _flag(output.parameters, "binary_data", as_bytes):
            content = to_bytes(array)
            entry["parameters"] = {"binary_data_size": len(content)}
            tail += content
        else:
            entry["data"] = array.ravel().tolist()
        described.append(entry)
    value = {"model_name": name, "model_version": "1", "id": request, "outputs": described}
    return to_json({key: item for key, item in value.items() if item is not None}), tail


async def _compute(call: Call, model: Model, inputs: Arrays) -> Arrays:
    match model.engine.task:
        case "embedding":
            job = await call.run(model, _items(inputs), finish=vectors())
            return {"embedding": job.value}
        case "classification":
            rows = await scores(call, model, _items(inputs), truncate=None)
            return {"scores": rows, "label": _objects(model.labels[index] for index in rows.argmax(axis=1))}
        case "question answering":
            questions, contexts = _texts(inputs, "question"), _texts(inputs, "context")
            if len(questions) != len(contexts):
                raise invalid(f"there are {len(questions)} questions and {len(contexts)} contexts")
            pairs = [
                answers.Question(question=question, context=context)
                for question, context in zip(questions, contexts, strict=True)
            ]
            found, _ = await answers.answer(call, answers.AnswerRequest(inputs=pairs))
            return {
                "answer": _objects(one["answer"] for one in found),
                "start": np.array([one["start"] for one in found], np.int64),
                "end": np.array([one["end"] for one in found], np.int64),
                "score": np.array([one["score"] for one in found], np.float32),
            }
        case "token classification":
            tokens = answers.TokensRequest(inputs=_texts(inputs, "text"))
            found, _ = await answers.classify_tokens(call, tokens)
        case _:
            found, _ = await answers.fill_mask(call, answers.FillMaskRequest(inputs=_texts(inputs, "text")))
    return {"json": _objects(await call.each(lambda index: to_json(found[index]).decode(), len(found)))}


def _check_names(model: Model, inputs: Collection[str]) -> None:
    """Raise Refused for an input that would not be used: a misspelled text_pair would score the text alone."""
    task = model.engine.task
    wanted: list[tuple[str, ...]] = [tuple(_INPUTS.get(task, _TEXT))]
    if task in ("embedding", "classification"):
        wanted = [("text", "text_pair"), _IDS]
    if not any(set(inputs) <= set(names) for names in wanted):
        either = ", or ".join(", ".join(names) for names in wanted)
        raise invalid(f"the inputs are {', '.join(inputs)}; wanted only {either}")


def _items(inputs: Arrays) -> list[Item]:
    """Texts, pairs of texts, or token ids."""
    if inputs.keys() & set(_IDS):
        if "input_ids" not in inputs:
            raise invalid("the input input_ids is missing")
        ids = inputs["input_ids"]
        if ids.dtype.kind not in "iu" or ids.ndim != 2:
            raise invalid("input_ids: wanted integers (batch, seq)")
        try:
            lengths = row_lengths(inputs.get("attention_mask"), ids.shape)
            types = np.zeros_like(ids)
            if "token_type_ids" in inputs:
                types = as_matrix(inputs["token_type_ids"], "token_type_ids", ids.shape)
        except InputError as error:
            raise invalid(str(error)) from None
        return [TokenIds(ids[row, :length], types[row, :length]) for row, length in enumerate(lengths)]
    texts = _texts(inputs, "text")
    if "text_pair" not in inputs:
        return list(texts)
    pairs = _texts(inputs, "text_pair")
    if len(texts) != len(pairs):
        raise invalid(f"text has {len(texts)} elements, text_pair {len(pairs)}")
    return list(zip(texts, pairs, strict=True))


def _texts(inputs: Arrays, name: str) -> list[str]:
    if name not in inputs:
        raise invalid(f"the input {name} is missing")
    if inputs[name].dtype != object:
        raise invalid(f"{name}: wanted datatype BYTES")
    return list(inputs[name].ravel())


def _objects(values: Any) -> NDArray[Any]:
    listed = list(values)
    array = np.empty(len(listed), object)
    array[:] = listed
    return array


_MODEL = "/v2/models/{model}"
_VERSION = f"{_MODEL}/versions/1"  # the only one
GETS: dict[str, Callable[..., Any]] = {
    "/v2": server,
    "/v2/health/live": health,
    "/v2/health/ready": health,
    _MODEL: metadata,
    f"{_MODEL}/ready": ready,
    _VERSION: metadata,
    f"{_VERSION}/ready": ready,
}
POSTS = [
    Post(f"{_MODEL}/infer", InferRequest, infer),
    Post(f"{_VERSION}/infer", InferRequest, infer),
]
