"""The streaming variant: same items, a seeded reservoir for partners, nothing on disk."""

import itertools

import numpy as np
import pytest
import torch

from pruneofa.data.examples import IGNORED, collate
from pruneofa.errors import InputError
from tests.data.test_corpus import TOKENIZER, articles, build, write
from tests.data.test_examples import equal, unmasked


@pytest.fixture
def stream(tmp_path):
    return build(write(tmp_path / "a.txt", articles(120)), tmp_path, streaming=True)


def test_items_look_like_those_of_the_cache(stream, tmp_path):
    cached = build(tmp_path / "a.txt", tmp_path)
    items = list(stream.train(300, seed=0))
    assert len(items) == 300
    assert items[0].keys() == cached.train(1, seed=0)[0].keys()
    batch = collate(items, pad_token_id=0)
    assert batch["input_ids"].shape == (300, 32)
    masked = sum((item["labels"] != IGNORED).sum() for item in items)
    assert 0.12 < masked / sum(len(item["labels"]) - 3 for item in items) < 0.18
    assert 0.4 < np.mean([item["next_sentence_label"] for item in items]) < 0.75
    assert stream.stats["cached"] is False


def test_nothing_is_cached(stream, tmp_path):
    list(stream.train(5, seed=0))
    assert not (tmp_path / "cache").exists()


def test_the_same_seed_gives_the_same_stream(stream):
    first, again, other = (list(stream.train(100, seed=seed)) for seed in (0, 0, 1))
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_stream_starts_over_when_the_text_ends(stream):
    items = stream.train(5000, seed=0)
    assert len(items) == 5000
    assert sum(1 for _ in items) == 5000


def test_training_and_validation_share_no_article(tmp_path):
    texts = articles(120)
    built = build(write(tmp_path / "a.txt", texts), tmp_path, streaming=True, nsp=False, validation=0.3)
    seen = {}
    for split in ("train", "validation"):
        items = getattr(built, split)(300, seed=0)
        seen[split] = {tuple(unmasked(item)[1:-1]) for item in items if len(item["input_ids"]) > 12}
    assert seen["train"]
    assert seen["validation"]
    assert not seen["train"] & seen["validation"]


def test_partners_are_never_of_the_same_article(tmp_path):
    texts = [
        " ".join(f"{word.capitalize()} {word} {word} {word}." for _ in range(9)) for word in ["river", "music", "film"]
    ]
    built = build(write(tmp_path / "a.txt", texts), tmp_path, streaming=True, validation=0.01)
    for item in itertools.islice(built.train(200, seed=0), 200):
        words = set(TOKENIZER.decode(unmasked(item), skip_special_tokens=True).replace(".", "").split())
        assert len(words) == 1 + item["next_sentence_label"]


def test_data_loader_workers_share_the_articles(stream):
    loader = torch.utils.data.DataLoader(stream.train(101, seed=0), batch_size=None, num_workers=2)
    assert sum(1 for _ in loader) == 101


@pytest.mark.parametrize(("steps", "workers"), [(6, 4), (3, 4), (9, 2)])
def test_the_batches_of_data_loader_workers_are_whole(stream, steps, workers):
    data = stream.train(steps * 8, seed=0, batch=8)
    loader = torch.utils.data.DataLoader(data, batch_size=8, num_workers=workers, collate_fn=len)
    assert list(loader) == [8] * steps
    assert sum(1 for _ in stream.train(29, seed=0, batch=8)) == 29


def test_too_few_articles(tmp_path):
    path = write(tmp_path / "a.txt", ["Only one. Of them."])
    with pytest.raises(InputError, match="1 article, but"):
        build(path, tmp_path, streaming=True)
    same = build(write(tmp_path / "b.txt", ["The same. Text here."] * 4), tmp_path, streaming=True, validation=0.01)
    with pytest.raises(InputError, match="too few articles for the train split; add text"):
        list(same.train(10, seed=0))
    with pytest.raises(InputError, match="too few articles for the validation split"):
        list(same.validation(10, seed=0))
