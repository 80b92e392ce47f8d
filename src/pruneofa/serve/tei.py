"""The routes of text-embeddings-inference: embeddings, predictions, ranks, similarity, tokens."""

import asyncio
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np
import orjson
from pydantic import ValidationError

from pruneofa.engine.tokenizer import CHARACTERS, check_text
from pruneofa.errors import InputError
from pruneofa.serve import answers
from pruneofa.serve.batching import Job
from pruneofa.serve.bodies import (
    Body,
    DecodeRequest,
    EmbedAllRequest,
    EmbedRequest,
    PredictParameters,
    PredictRequest,
    RerankRequest,
    SimilarityParameters,
    SimilarityRequest,
    TokenizeRequest,
    VertexRequest,
    is_single,
)
from pruneofa.serve.call import Call, Post, explained, to_json
from pruneofa.serve.model import Item, Model
from pruneofa.serve.refusal import Refused, invalid
from pruneofa.serve.scoring import relevance, scores, vectors

_TEXTS = 4  # of the longest length may be in a request to /tokenize or /decode, or more that are shorter


async def embed(call: Call, body: EmbedRequest) -> tuple[Any, int]:
    """Vectors of texts."""
    job = await _embedded(call, body, finish=vectors(normalize=body.normalize, dimensions=body.dimensions))
    return job.value, job.value.size


async def embed_all(call: Call, body: EmbedAllRequest) -> tuple[Any, int]:
    """Hidden states of every token of texts."""
    job = await _embedded(call, body, whole=True)
    states = [job.results[index] for index in range(len(job.results))]
    return states, sum(rows.size for rows in states)


async def _embedded(call: Call, body: EmbedAllRequest, **settings: Any) -> Job:
    single = is_single(body.inputs)
    return await call.run(
        call.model("embedding"),
        [body.inputs] if single else body.inputs,  # pyrefly: ignore[bad-argument-type]
        single=single,
        truncate=body.truncate,
        side=body.truncation_direction,
        prompt_name=body.prompt_name,
        **settings,
    )


async def predict(call: Call, body: PredictRequest) -> tuple[Any, int]:
    """Labels of texts or pairs with their scores, best first."""
    inputs = body.inputs
    single = isinstance(inputs, str) or bool(inputs and isinstance(inputs[0], str))
    if isinstance(inputs, str):
        items: list[Item] = [inputs]
    else:
        call.check_size(1 if single else len(inputs))  # before anything is made of them
        items = [row[0] if len(row) == 1 else tuple(row) for row in ([inputs] if single else inputs)]  # pyrefly: ignore
    model, options = call.model("classification"), body.parameters or PredictParameters()
    function = options.function_to_apply or ("none" if body.raw_scores else None)
    rows = await scores(
        call, model, items, single=single, truncate=body.truncate, side=body.truncation_direction, function=function
    )
    labels = model.labels
    best = [np.argsort(-row, kind="stable")[: options.top_k] for row in rows]
    ranked = [
        [{"score": row[index], "label": labels[index]} for index in indices]
        for row, indices in zip(rows, best, strict=True)
    ]
    return (ranked[0] if single else ranked), rows.size


async def rerank(call: Call, body: RerankRequest) -> tuple[Any, int]:
    """Texts by how well they answer the query, best first."""
    call.check_size(len(body.texts), "texts")
    found = await relevance(
        call,
        call.model("reranking"),
        body.query,
        body.texts,
        field="texts",
        truncate=body.truncate,
        side=body.truncation_direction,
        raw=body.raw_scores,
    )
    ranks = []
    for index in np.argsort(-found, kind="stable"):
        rank: dict[str, Any] = {"index": int(index), "score": found[index]}
        if body.return_text:
            rank["text"] = body.texts[index]
        ranks.append(rank)
    return ranks, len(ranks)


async def similarity(call: Call, body: SimilarityRequest) -> tuple[Any, int]:
    """The cosine of a sentence with each of the others."""
    sentences = body.inputs.sentences
    if not sentences:
        raise Refused("Empty", "`inputs.sentences` cannot be empty", cause="validation")
    options = body.parameters or SimilarityParameters()
    job = await call.run(
        call.model("embedding"),
        [body.inputs.source_sentence, *sentences],
        truncate=options.truncate,
        side=options.truncation_direction,
        prompt_name=options.prompt_name,
        finish=vectors(),
    )
    return job.value[1:] @ job.value[0], len(sentences)


async def tokenize(call: Call, body: TokenizeRequest) -> tuple[Any, int]:
    """The tokens of texts; positions count bytes of the text, as in text-embeddings-inference."""
    model = call.model()
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    call.check_size(len(texts))
    prompt = model.prompt(body.prompt_name)
    if "" in texts:
        raise Refused("Empty", "Input validation error: `inputs` cannot be empty", cause="tokenization")
    _check_lengths(model, texts, "inputs", "characters")
    call.acquire(len(texts), model.windows(map(len, texts)))

    def tokens(index: int) -> orjson.Fragment:
        try:
            check_text(texts[index], f"inputs[{index}]")
        except InputError as error:
            raise invalid(str(error), "tokenization") from None
        whole, encoding = model.engine.tokenizer.encoding(
            texts[index], add_special_tokens=body.add_special_tokens, prompt=prompt
        )
        return orjson.Fragment(to_json(_simple_tokens(whole, encoding)))  # a fifth of the memory

    return await call.each(tokens, len(texts)), 0


def _check_lengths(model: Model, rows: Sequence[Sized], field: str, unit: str) -> None:
    """Raise Refused for a text, or its token ids, longer than any that is of use, or for too long ones together."""
    most = CHARACTERS * model.engine.tokenizer.limit
    if (longest := max(map(len, rows))) > most:
        raise invalid(f"`{field}` has {longest} {unit}, wanted at most {most}; divide it", "tokenization")
    if (together := sum(map(len, rows))) > _TEXTS * most:
        message = f"`{field}` have {together} {unit} together, wanted at most {_TEXTS * most}; divide them"
        raise invalid(message, "tokenization")


def _simple_tokens(text: str, encoding: Any) -> list[dict[str, Any]]:
    found = []
    bytes_before = [0]
    for character in text:
        bytes_before.append(bytes_before[-1] + len(character.encode()))
    for index, token, (start, stop), special in zip(
        encoding.ids, encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True
    ):
        if special:
            found.append({"id": index, "text": token, "special": True, "start": None, "stop": None})
        else:
            place = {"start": bytes_before[start], "stop": bytes_before[stop]}
            found.append({"id": index, "text": text[start:stop], "special": False} | place)
    return found


async def decode(call: Call, body: DecodeRequest) -> tuple[Any, int]:
    """The texts of token ids."""
    model = call.model()
    tokenizer = model.engine.tokenizer
    single = is_single(body.ids)
    sequences: Any = [body.ids] if single else body.ids
    call.check_size(len(sequences), "ids")
    if not all(sequences):
        raise Refused("Empty", "Input validation error: `input_ids` cannot be empty", cause="tokenization")
    _check_lengths(model, sequences, "ids", "token ids")
    call.acquire(len(sequences), sum(1 + len(ids) // tokenizer.limit for ids in sequences))

    def text(index: int) -> str:
        return tokenizer.decode(sequences[index], skip_special_tokens=body.skip_special_tokens)

    return await call.each(text, len(sequences)), sum(map(len, sequences))


async def vertex(call: Call, body: VertexRequest) -> tuple[Any, int]:
    """Predictions of several requests of the model's task, in order."""
    call.check_size(len(body.instances), "instances")
    work = []
    for index, instance in enumerate(body.instances):
        function, kind = default(call.model())
        if {"query", "texts"} <= set(instance):
            function, kind = rerank, RerankRequest
        try:
            work.append(function(call, kind.model_validate(instance)))
        except ValidationError as error:
            for started in work:
                started.close()
            raise invalid(f"instances.{index}.{explained(error)}") from None
    tasks = [asyncio.ensure_future(started) for started in work]
    try:
        found = await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
    return {"predictions": [value for value, _ in found]}, sum(size for _, size in found)


def default(model: Model) -> tuple[Any, type[Body]]:
    """What a model answers where the path says nothing, and the body for it."""
    if model.reranks:
        return rerank, RerankRequest
    match model.engine.task:
        case "classification":
            return predict, PredictRequest
        case "token classification":
            return answers.classify_tokens, answers.TokensRequest
        case "question answering":
            return answers.answer, answers.AnswerRequest
        case "masked-LM":
            return answers.fill_mask, answers.FillMaskRequest
        case _:
            return embed, EmbedRequest


def defaults(model: Model, prefix: str = "") -> list[Post]:
    """POST / and the paths of SageMaker and Vertex behind a prefix, for the model's task."""
    answer, body = default(model)
    name = model.name if prefix else None
    paths = [*({prefix} - {""}), f"{prefix}/", f"{prefix}/invocations"]
    return [*(Post(path, body, answer, name) for path in paths), Post(f"{prefix}/vertex", VertexRequest, vertex, name)]


POSTS = [
    Post("/embed", EmbedRequest, embed),
    Post("/embed_all", EmbedAllRequest, embed_all),
    Post("/predict", PredictRequest, predict),
    Post("/rerank", RerankRequest, rerank),
    Post("/similarity", SimilarityRequest, similarity),
    Post("/tokenize", TokenizeRequest, tokenize),
    Post("/decode", DecodeRequest, decode),
]
