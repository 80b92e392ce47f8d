"""Routes for the tasks that text-embeddings-inference has not: entities, answers, masked words.

Bodies and responses are those of Hugging Face's inference API, so its client works.
"""

import asyncio
from typing import Any

from pydantic import Field

from pruneofa.engine.entities import Aggregation, find_entities
from pruneofa.engine.heads import TokenClassification
from pruneofa.engine.masked_lm import MaskedLM
from pruneofa.engine.question_answering import QuestionAnswering
from pruneofa.serve.bodies import Body, Many
from pruneofa.serve.call import Call, Post


class TokensParameters(Body):
    """How tokens become entities."""

    aggregation_strategy: Aggregation = "simple"
    ignore_labels: list[str] = Field(default_factory=lambda: ["O"])


class TokensRequest(Body):
    """Texts, one or a list."""

    inputs: str | Many[str]
    parameters: TokensParameters | None = None


class Question(Body):
    """A question and the text that holds its answer."""

    question: str
    context: str


class AnswerRequest(Body):
    """Questions, one or a list."""

    inputs: Question | Many[Question]


class FillMaskRequest(Body):
    """Texts with mask tokens, one or a list."""

    inputs: str | Many[str]


async def classify_tokens(call: Call, body: TokensRequest) -> tuple[Any, int]:
    """Entities of texts, by characters; texts longer than the model are computed in windows."""
    single = isinstance(body.inputs, str)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    options = body.parameters or TokensParameters()
    model = call.model("token classification")
    job = await call.run(model, texts, single=single)

    def entities() -> list[list[dict[str, Any]]]:
        head = model.engine.head
        assert isinstance(head, TokenClassification)
        windows: list[list[int]] = [[] for _ in texts]
        for index, sequence in enumerate(job.sequences):
            windows[sequence.text].append(index)
        return [
            find_entities(
                head,
                model.engine.tokenizer,
                text,
                [job.sequences[index] for index in own],
                [job.results[index] for index in own],
                aggregation=options.aggregation_strategy,
                ignore=options.ignore_labels,
            )
            for text, own in zip(texts, windows, strict=True)
        ]

    found = await asyncio.to_thread(entities)
    return (found[0] if single else found), sum(map(len, found))


async def answer(call: Call, body: AnswerRequest) -> tuple[Any, int]:
    """Answers to questions, by characters of the context."""
    single = isinstance(body.inputs, Question)
    questions = [body.inputs] if isinstance(body.inputs, Question) else body.inputs
    model = call.model("question answering")
    job = await call.run(model, [question.model_dump() for question in questions], single=single)
    head = model.engine.head
    assert isinstance(head, QuestionAnswering)
    pairs = [(question.question, question.context) for question in questions]
    results = [job.results[index] for index in range(len(job.sequences))]
    found = await asyncio.to_thread(head.results, results, job.sequences, pairs)
    return (found[0] if single else found), len(found)


async def fill_mask(call: Call, body: FillMaskRequest) -> tuple[Any, int]:
    """The likeliest words at the masks of texts; a list per mask where a text has several."""
    single = isinstance(body.inputs, str)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    model = call.model("masked-LM")
    job = await call.run(model, texts, single=single)
    head, tokenizer = model.engine.head, model.engine.tokenizer
    assert isinstance(head, MaskedLM) and tokenizer.mask_id is not None
    mask = tokenizer.token(tokenizer.mask_id)
    results = [job.results[index] for index in range(len(texts))]
    filled = await asyncio.to_thread(head.results, results, job.sequences, texts)
    found = []
    for text, masks in zip(texts, filled, strict=True):
        words = [
            [
                {"score": score, "token": tokenizer.id(word), "token_str": word, "sequence": text.replace(mask, word)}
                for word, score in best["scores"].items()
            ]
            for best in masks
        ]
        found.append(words[0] if len(words) == 1 else words)
    return (found[0] if single else found), 0


POSTS = [
    Post("/classify_tokens", TokensRequest, classify_tokens),
    Post("/answer", AnswerRequest, answer),
    Post("/fill_mask", FillMaskRequest, fill_mask),
]
