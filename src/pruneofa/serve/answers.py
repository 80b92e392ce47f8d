"""Routes for the tasks that text-embeddings-inference has not: entities, answers, masked words.

Bodies and responses are those of Hugging Face's inference API, so its client works.
"""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pruneofa.engine.entities import Aggregation, find_entities
from pruneofa.engine.heads import TokenClassification
from pruneofa.engine.masked_lm import TOP_TOKENS, MaskedLM
from pruneofa.engine.question_answering import QuestionAnswering
from pruneofa.engine.tokenizer import TextTokenizer
from pruneofa.serve.batching import Job
from pruneofa.serve.bodies import Body, Many, Parameters
from pruneofa.serve.call import Call, Post
from pruneofa.serve.refusal import invalid

_LONGEST = 256  # characters of a target: no token is longer


class TokensParameters(Parameters):
    """How tokens become entities."""

    aggregation_strategy: Aggregation = "simple"
    ignore_labels: Many[str] = Field(default_factory=lambda: ["O"])


class TokensRequest(Body):
    """Texts, one or a list."""

    inputs: str | Many[str]
    parameters: TokensParameters | None = None


class Question(Body):
    """A question and the text that holds its answer."""

    question: str
    context: str


class AnswerParameters(Parameters):
    """What the API does by itself: one answer to a question, of whole words, even if none fits."""

    top_k: Literal[1] = 1
    align_to_words: Literal[True] = True
    handle_impossible_answer: Literal[False] = False


class AnswerRequest(Body):
    """Questions, one or a list."""

    inputs: Question | Many[Question]
    parameters: AnswerParameters | None = None


class FillMaskParameters(Parameters):
    """How many words to return for each mask, and which words may be among them: all if None."""

    top_k: int = Field(default=TOP_TOKENS, ge=1, le=100)
    targets: str | Many[str] | None = None


class FillMaskRequest(Body):
    """Texts with mask tokens, one or a list."""

    inputs: str | Many[str]
    parameters: FillMaskParameters | None = None


async def classify_tokens(call: Call, body: TokensRequest) -> tuple[Any, int]:
    """Entities of texts, by characters; texts longer than the model are computed in windows."""
    single = isinstance(body.inputs, str)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    options = body.parameters or TokensParameters()
    model = call.model("token classification")
    job = await call.run(model, texts, single=single)

    head, windows = model.engine.head, _windows_by_text(job)
    assert isinstance(head, TokenClassification)

    def entities(index: int) -> list[dict[str, Any]]:
        return find_entities(
            head,
            model.engine.tokenizer,
            texts[index],
            [job.sequences[window] for window in windows[index]],
            [job.results[window] for window in windows[index]],
            aggregation=options.aggregation_strategy,
            ignore=options.ignore_labels,
        )

    found = await call.each(entities, len(texts))
    return (found[0] if single else found), sum(map(len, found))


def _windows_by_text(job: Job) -> dict[int, list[int]]:
    """The indices of the sequences of each input, by its number."""
    found: dict[int, list[int]] = {}
    for index, sequence in enumerate(job.sequences):
        found.setdefault(sequence.text, []).append(index)
    return found


async def answer(call: Call, body: AnswerRequest) -> tuple[Any, int]:
    """Answers to questions, by characters of the context."""
    single = isinstance(body.inputs, Question)
    questions = [body.inputs] if isinstance(body.inputs, Question) else body.inputs
    model = call.model("question answering")
    call.check_size(len(questions))  # before anything is made of them
    job = await call.run(model, [question.model_dump() for question in questions], single=single)
    head, windows = model.engine.head, _windows_by_text(job)
    assert isinstance(head, QuestionAnswering)

    def best(index: int) -> dict[str, Any]:
        results = [job.results[window] for window in windows[index]]
        sequences = [replace(job.sequences[window], text=0) for window in windows[index]]
        [found] = head.results(results, sequences, [(questions[index].question, questions[index].context)])
        return found

    found = await call.each(best, len(questions))
    return (found[0] if single else found), len(found)


async def fill_mask(call: Call, body: FillMaskRequest) -> tuple[Any, int]:
    """The likeliest words at the masks of texts; a list per mask where a text has several."""
    single = isinstance(body.inputs, str)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    model, options = call.model("masked-LM"), body.parameters or FillMaskParameters()
    tokenizer, targets = model.engine.tokenizer, None
    if options.targets is not None:
        words = [options.targets] if isinstance(options.targets, str) else options.targets
        call.check_size(len(words), "parameters.targets")
        targets = _targets(tokenizer, words)
    job = await call.run(model, texts, single=single)
    head = model.engine.head
    assert isinstance(head, MaskedLM)

    def fill(index: int) -> list[Any]:
        probabilities = head.probabilities(job.results[index])
        return _filled(tokenizer, job.sequences[index].ids, probabilities, options.top_k, targets)

    found = await call.each(fill, len(texts))
    return (found[0] if single else found), sum(map(len, texts))


def _targets(tokenizer: TextTokenizer, words: list[str]) -> NDArray[np.int64]:
    """The ids of words that are one token each, in order, without repetitions. Raises Refused for another."""
    ids: dict[int, None] = {}
    for index, word in enumerate(words):
        if len(word) > _LONGEST:
            raise invalid(f"parameters.targets[{index}] has {len(word)} characters, wanted a word of one token")
        _, encoding = tokenizer.encoding(word, add_special_tokens=False, prompt="")
        if len(encoding.ids) != 1:
            raise invalid(f"parameters.targets[{index}] has {len(encoding.ids)} tokens, wanted a word of one token")
        ids[encoding.ids[0]] = None
    return np.array(list(ids))


def _filled(
    tokenizer: TextTokenizer,
    ids: NDArray[np.int32],
    probabilities: NDArray[np.float32],
    count: int,
    targets: NDArray[np.int64] | None,
) -> list[Any]:
    """The likeliest tokens at each mask of a text, or at its only one, as transformers' pipeline returns them.

    `sequence` has one mask filled: the others are still there, and then so are all special tokens.
    """
    masks = np.flatnonzero(ids == tokenizer.mask_id)
    allowed = np.arange(probabilities.shape[1]) if targets is None else targets
    found = []
    for position, scores in zip(masks, probabilities, strict=True):
        words = []
        for token in allowed[np.argsort(-scores[allowed], kind="stable")[:count]].tolist():
            filled = ids.copy()
            filled[position] = token
            sequence = tokenizer.decode(filled.tolist(), skip_special_tokens=len(masks) == 1)
            word = tokenizer.token(token)
            words.append({"score": scores[token], "token": token, "token_str": word, "sequence": sequence})
        found.append(words)
    return found[0] if len(masks) == 1 else found


POSTS = [
    Post("/classify_tokens", TokensRequest, classify_tokens),
    Post("/answer", AnswerRequest, answer),
    Post("/fill_mask", FillMaskRequest, fill_mask),
]
