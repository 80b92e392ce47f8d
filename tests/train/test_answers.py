"""`evaluate` measures the answers that `predict` gives: one rule for both, on random logits over several windows."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pruneofa.data.features import TaskData
from pruneofa.data.squad import Windows
from pruneofa.engine.question_answering import QuestionAnswering
from pruneofa.engine.tokenizer import Tokens
from pruneofa.train.evaluate import _answers

QUESTION = 3  # tokens before the context: [CLS], one word, [SEP]


def overlapping_windows(random):
    """(row, chars) of every window, and the contexts: 1 to 5 windows a row, whose context tokens overlap."""
    windows, contexts = [], []
    for row in range(random.integers(1, 5)):
        lengths = random.integers(1, 6, size=random.integers(1, 60))
        ends = np.cumsum(lengths)
        tokens = np.stack([ends - lengths, ends], 1)
        contexts.append("".join(random.choice(list("abc "), ends[-1])))
        width = -(-len(tokens) // random.integers(1, 6))
        for begin in range(0, len(tokens), width):
            inside = tokens[max(0, begin - 2) : begin + width]
            outside = np.full((1, 2), -1)
            windows.append((row, np.concatenate([outside.repeat(QUESTION, 0), inside, outside]).astype(np.int32)))
    return windows, contexts


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("seed", range(60))
def test_evaluation_takes_the_answers_of_predict(seed, coarse):
    random = np.random.default_rng(seed)
    windows, contexts = overlapping_windows(random)
    logits = [random.normal(scale=3, size=(len(chars), 2)).astype(np.float32) for _, chars in windows]
    if coarse:  # so that several spans, and windows, have the same score
        logits = [np.rint(pair / 3) for pair in logits]
    bounds = np.cumsum([0] + [len(chars) for _, chars in windows])
    ids = np.zeros(bounds[-1], np.int32)
    rows = np.array([row for row, _ in windows], np.int32)
    table = pa.table({"context": contexts, "answers": [{"text": ["a"], "answer_start": [0]}] * len(contexts)})
    all_chars = np.concatenate([chars for _, chars in windows])
    data = TaskData(ids, None, bounds, None, table, Windows(ids, None, bounds, rows, all_chars))

    def batches():
        for index in random.permutation(len(windows)):  # evaluation goes by length, not by row
            padded = np.pad(logits[index], ((0, 3), (0, 0)), constant_values=99)
            yield np.array([index]), (padded[None, :, 0], padded[None, :, 1])

    evaluated, _ = _answers(SimpleNamespace(name="squad"), data, batches())
    tokens = [
        Tokens(np.zeros(len(chars), np.int32), np.zeros(len(chars), np.int32),
               np.where(chars[:, 0] < 0, -1, 1).astype(np.int8), chars, row)
        for row, chars in windows
    ]  # fmt: skip
    head = QuestionAnswering.__new__(QuestionAnswering)  # its weights make logits, which are given here
    predicted = head.results(logits, tokens, [("who", context) for context in contexts])
    assert [answer["answer"] for answer in predicted] == evaluated
