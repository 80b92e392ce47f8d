import json
from itertools import pairwise

import numpy as np
import pytest

from pruneofa import recipe
from pruneofa.data import squad
from pruneofa.data.tasks import load_task
from pruneofa.errors import InputError
from tests.tiny import tiny_tokenizer

CONTEXT = "The city was first; the river Thames and the sea were not. A great king had 12 houses by the water."


def row(name, question, answer, context=CONTEXT, start=None):
    answers = [answer] if isinstance(answer, str) else answer
    starts = [context.index(text) if start is None else start for text in answers]
    return {
        "id": name, "title": "t", "context": context, "question": question,
        "answers": {"text": answers, "answer_start": starts},
    }  # fmt: skip


def load(tmp_path, train, validation=None, **values):
    for name, table in (("train", train), ("validation", validation or train)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in table), encoding="utf-8")
    spec = recipe.Task(**{"data": str(tmp_path), "max_length": 36, "stride": 8, **values})
    return load_task("squad", spec, tiny_tokenizer())


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    rows = [
        row("q1", "what river was it", "Thames"),
        row("q2", "  what was first", "The city"),
        row("q3", "how many houses", "12 houses by the water."),
    ]
    return load(tmp_path_factory.mktemp("squad"), rows)


def test_windows_overlap_by_the_stride_and_cover_the_context(task):
    windows = task.train.windows
    assert len(windows.row) > 3
    assert task.train.lengths.max() == 36
    for row_index in range(3):
        spans = [
            windows.chars[windows.bounds[i] : windows.bounds[i + 1]]
            for i in range(len(windows.row)) if windows.row[i] == row_index
        ]  # fmt: skip
        spans = [chars[chars[:, 0] >= 0].tolist() for chars in spans]
        for first, second in pairwise(spans):
            assert first[-8:] == second[:8]
        assert spans[0][0][0] == 0
        assert spans[-1][-1][1] == len(CONTEXT)


def test_training_spans_cover_the_answer_or_point_to_cls(task):
    windows, found = task.train.windows, set()
    for index, (first, last) in enumerate(task.train.targets):
        chars = windows.chars[windows.bounds[index] : windows.bounds[index + 1]]
        gold = task.train.rows["answers"][int(windows.row[index])].as_py()["text"][0]
        if (first, last) == (0, 0):
            inside = chars[chars[:, 0] >= 0]
            start = CONTEXT.index(gold)
            assert not (inside[0, 0] <= start and start + len(gold) <= inside[-1, 1])
        else:
            assert CONTEXT[chars[first, 0] : chars[last, 1]] == gold
            found.add(gold)
    assert found == {"Thames", "The city", "12 houses by the water."}


def test_an_answer_within_a_word_takes_the_whole_tokens(tmp_path):
    task = load(tmp_path, [row("q", "how many", "1", context="year 1st", start=5)])
    chars = task.train.windows.chars
    (first, last) = task.train.targets[0]
    assert "year 1st"[chars[first, 0] : chars[last, 1]] == "1"  # the tiny vocabulary splits 1 ##s ##t


def test_tokens_that_share_a_character():
    chars = np.array([[-1, -1], [0, 1], [0, 1], [1, 4], [-1, -1]], np.int32)  # an emoji of two byte-level tokens
    windows = squad.Windows(np.zeros(5, np.int32), None, np.array([0, 5]), np.zeros(1, np.int32), chars)
    first, last = squad.token_spans(windows, np.array([[0, 1]]))[0]
    assert first <= last
    assert (chars[first, 0], chars[last, 1]) == (0, 1)


def test_items_and_batches(task):
    item = task.train[0]
    assert set(item) == {"input_ids", "token_type_ids", "start_positions", "end_positions"}
    batch = task.collate([task.train[i] for i in range(2)])
    assert batch["start_positions"].shape == batch["end_positions"].shape == (2,)
    assert set(task.evaluations[""][0]) == {"input_ids", "token_type_ids"}
    assert task.model_kwargs() == {}
    assert len(task.train.train_dataset(2, seed=0, epochs=2)) == 2 * 2 * -(-len(task.train) // 2)


def test_long_questions_are_cut_so_that_context_fits(tmp_path):
    task = load(tmp_path, [row("q", "what " * 90, "Thames")])
    windows = task.train.windows
    assert task.train.lengths.max() <= 36
    assert (windows.chars[:, 1] == len(CONTEXT)).any()


def test_answers_at_wrong_offsets_are_counted_and_the_first_is_named(tmp_path):
    rows = [
        row("fine", "what river", "Thames"),
        row("shifted", "what river", "Thames", start=3),
        row("none", "what river", [], start=0),
        row("second is good", "what", ["city"]),
    ]
    rows[3]["answers"] = {"text": ["lake", "city"], "answer_start": [0, 4]}
    message = r"2 of 4 answers are not found .* first 'shifted' \(row 2\); set tasks.squad.skip_bad_answers=true"
    with pytest.raises(InputError, match=message):
        load(tmp_path, rows)
    task = load(tmp_path, rows, [rows[0]], skip_bad_answers=True)
    assert task.train.rows["id"].to_pylist() == ["fine", "second is good"]
    with pytest.raises(InputError, match="no answer is found in its context"):
        load(tmp_path, rows[1:2], [rows[0]], skip_bad_answers=True)


def test_bad_question_answering_input(tmp_path):
    good = row("q", "what river", "Thames")
    with pytest.raises(InputError, match="stride 20 leaves no room in max_length 36"):
        load(tmp_path, [good], stride=20)
    with pytest.raises(InputError, match="row 1 has no answer; SQuAD v2 is not supported"):
        load(tmp_path, [good], [row("q", "what", [])])
    for answers in ("Thames", {"text": ["Thames"], "answer_start": [33.0]}, {"text": [33], "answer_start": [33]},
                    {"text": "Thames", "answer_start": "33"}, [{"text": "Thames", "answer_start": 33}]):  # fmt: skip
        with pytest.raises(InputError, match=r"column 'answers' holds .* wanted in each row the lists text, of str"):
            load(tmp_path, [good | {"answers": answers}], [good])
    with pytest.raises(InputError, match="no text column 'context' among"):
        load(tmp_path, [{key: value for key, value in good.items() if key != "context"}], [good])


def test_a_single_answer_may_be_without_lists(tmp_path):
    lists = [row("q", "what river", "Thames"), row("r", "what was first", "The city")]
    plain = [one | {"answers": {key: values[0] for key, values in one["answers"].items()}} for one in lists]
    wanted, task = load(tmp_path, lists), load(tmp_path, plain)
    assert squad.gold_answers(task.evaluations[""].rows, "t") == [["Thames"], ["The city"]]
    assert task.train_fingerprint == wanted.train_fingerprint
    assert task.evaluation_fingerprint == wanted.evaluation_fingerprint


def test_an_answer_of_null_is_none(tmp_path):
    good = row("q", "what river", "Thames")
    for answers in ({"text": [None], "answer_start": [4]}, None):
        with pytest.raises(InputError, match="row 2 has no answer; SQuAD v2 is not supported"):
            load(tmp_path, [good], [good, good | {"answers": answers}])
    with pytest.raises(InputError, match=r"1 of 2 answers are not found .* \(row 2\); set"):
        load(tmp_path, [good, good | {"answers": {"text": ["Thames"], "answer_start": [None]}}], [good])


def test_rows_without_ids_are_named_by_their_number(tmp_path):
    bad = row("q", "what river", "Thames", start=3)
    del bad["id"]
    with pytest.raises(InputError, match=r"1 of 1 answers are not found .*, first in row 1; set tasks.squad.skip_bad"):
        load(tmp_path, [bad])


def test_held_out_contexts_are_not_in_training(tmp_path):
    rows = [row(str(n), "what", "river", context=f"the river {n % 30}") for n in range(90)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    spec = recipe.Task(data=str(tmp_path / "d.jsonl"), max_length=48, stride=8)
    task = load_task("squad", spec, tiny_tokenizer())
    train, held = (set(d.rows["context"].to_pylist()) for d in (task.train, task.evaluations[""]))
    assert held
    assert not train & held


CHARS = np.array([[-1, -1], [-1, -1], [0, 3], [4, 8], [9, 12], [13, 20], [-1, -1]])


def logits(**values):
    result = np.zeros(7)
    for position, value in values.items():
        result[int(position[1:])] = value
    return result


def test_best_span_is_the_best_valid_pair_of_context_tokens():
    assert squad.best_span(logits(p3=5.0), logits(p4=6.0), CHARS) == (11.0, 4, 12)
    # [CLS] and [SEP] score highest but are no context
    assert squad.best_span(logits(p0=9.0, p2=1.0), logits(p6=9.0, p3=1.0), CHARS) == (2.0, 0, 8)
    # the end may not come before the start: 5..2 would be best
    assert squad.best_span(logits(p5=4.0, p2=3.0), logits(p2=5.0, p5=1.0), CHARS) == (8.0, 0, 3)
    assert squad.best_span(logits(p4=4.0, p3=1.0), logits(p3=5.0), CHARS) == (6.0, 4, 8)


def test_best_span_respects_the_length_and_the_number_of_candidates():
    start, end = logits(p2=5.0), logits(p5=5.0, p3=1.0)
    assert squad.best_span(start, end, CHARS) == (10.0, 0, 20)
    assert squad.best_span(start, end, CHARS, max_answer_length=3) == (6.0, 0, 8)
    # with one candidate each (start 5, end 2) nothing is valid
    assert squad.best_span(logits(p5=4.0), logits(p2=5.0), CHARS, n_best=1) is None
    assert squad.best_span(np.zeros(2), np.zeros(2), CHARS[:2]) is None
