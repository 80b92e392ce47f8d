"""Entities are those of transformers' pipeline, with offsets that fit the text, over windows too."""

import itertools

import numpy as np
import pytest

from pruneofa.engine.engine import Engine
from pruneofa.engine.entities import find_entities
from pruneofa.engine.heads import TokenClassification
from pruneofa.engine.tokenizer import overlap
from tests.tiny import POSITIONS, half_pruned, tiny_bert, write_folder, write_model

LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
TEXTS = [
    "the king of music and the queen of film",
    "great-story by well-known people, in 1999!",
    "worlding filmly kinged",
    "a",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import BertForTokenClassification

    model = half_pruned(tiny_bert(BertForTokenClassification, id2label=LABELS, num_labels=5, label2id={}), noise=0.3)
    return write_model(tmp_path_factory.mktemp("entities") / "model", model)


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_pretrained(folder, precision="fp32", threads=1)


def entities(engine, text, **options):
    head = engine.head
    assert isinstance(head, TokenClassification)
    windows = engine.tokenizer.text_windows([text], ["text"])
    hidden = dict(engine.hidden(windows))
    scores = [head.reduce(hidden[index], window) for index, window in enumerate(windows)]
    return find_entities(head, engine.tokenizer, text, windows, scores, **options)


@pytest.mark.parametrize("aggregation", ["none", "simple", "first", "average", "max"])
def test_they_are_the_pipelines(engine, folder, aggregation):
    from transformers import pipeline

    peer = pipeline("token-classification", model=str(folder), aggregation_strategy=aggregation)
    key = "entity" if aggregation == "none" else "entity_group"
    some = 0
    for text in TEXTS:
        expected = peer(text)
        found = entities(engine, text, aggregation=aggregation)
        assert [(one[key], one["start"], one["end"]) for one in found] == [
            (one[key], one["start"], one["end"]) for one in expected
        ]
        np.testing.assert_allclose([one["score"] for one in found], [one["score"] for one in expected], atol=1e-4)
        some += len(found)
    assert some


def test_offsets_fit_hyphens_accents_and_unknown_characters(engine):
    for text in ("Kïng-Queen cafe\u0301 film", "東京 king 北京", "king\t\n queen\u00a0water"):
        for aggregation in ("none", "simple", "first", "average", "max"):
            found = entities(engine, text, aggregation=aggregation, ignore=[])
            assert found and all(one["word"] == text[one["start"] : one["end"]] != "" for one in found)
            assert all(one["end"] <= other["start"] for one, other in itertools.pairwise(found))


def test_words_end_at_hyphens_and_not_at_accents(engine):
    text = "cafe\u0301 bad-team"
    (tokens,) = engine.tokenizer.text_windows([text], ["text"])
    own = tokens.keep(tokens.segments == 0)
    begins = ~engine.tokenizer.continues_word(own, text)
    assert [text[start:end] for start, end in own.chars[begins]] == ["c", "bad", "-", "team"]


def test_a_long_text_is_computed_in_windows_without_gaps_or_repeats(engine):
    words = [("king", "queen", "water", "film", "music")[i % 5] for i in range(300)]
    text = " ".join(words)
    windows = engine.tokenizer.text_windows([text], ["text"])
    assert len(windows) > 5 and max(len(window.ids) for window in windows) == POSITIONS
    found = entities(engine, text, aggregation="none", ignore=[])
    assert [one["word"] for one in found] == words
    assert [one["start"] for one in found] == [i for i in range(len(text)) if i == 0 or text[i - 1] == " "]


def test_scores_of_an_overlap_come_from_the_window_with_more_context(engine):
    text = " ".join(["king"] * 150)
    head = engine.head
    windows = engine.tokenizer.text_windows([text], ["text"])
    room = POSITIONS - 2
    # Each window gives every token its own number as the score of a label.
    scores = [np.full((len(window.ids), 5), 0, np.float32) for window in windows]
    for number, rows in enumerate(scores):
        rows[:, 1] = number + 1
    found = find_entities(head, engine.tokenizer, text, windows, scores, aggregation="none", ignore=[])
    numbers = [int(one["score"]) for one in found]
    step = room - overlap(room)
    assert len(numbers) == 150 and numbers == sorted(numbers)
    assert numbers.index(2) == step + overlap(room) // 2 and numbers.index(3) == 2 * step + overlap(room) // 2


def test_no_token_is_no_entity(tmp_path):
    engine = Engine.from_pretrained(write_folder(tmp_path / "model", "ForTokenClassification"), threads=1)
    for aggregation in ("none", "simple", "average"):
        assert entities(engine, " \u200b ", aggregation=aggregation) == []
