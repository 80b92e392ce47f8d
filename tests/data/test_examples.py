"""Examples: what is masked, how segments pair up, and that each is a pure function of its number."""

import itertools
import pickle

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from transformers import PreTrainedTokenizerFast

from pruneofa.data.examples import IGNORED, chunk, collate, permuted, truncated
from tests.data.test_corpus import TOKENIZER, WHOLE, articles, build, write
from tests.tiny import tiny_tokenizer

ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def byte_level_tokenizer():
    """A RoBERTa-like tokenizer trained on made-up articles."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=ROBERTA_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(articles(50), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>",
    )  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A corpus whose every article has its own first word in each sentence, then the sentence's number."""
    rng = np.random.default_rng(0)
    texts = []
    for number in range(80):
        name = WHOLE[number % len(WHOLE)] + str(number)
        filler = [" ".join(rng.choice(WHOLE, rng.integers(2, 8))) for _ in range(40)]
        texts.append(" ".join(f"{name.capitalize()} {s} {words}." for s, words in enumerate(filler)))
    folder = tmp_path_factory.mktemp("pairs")
    return build(write(folder / "a.txt", texts), folder, short_seq_prob=0.1), texts


@pytest.fixture(scope="module")
def items(pairs):
    data = pairs[0].train(6000, seed=3)
    return [data[i] for i in range(len(data))]


def unmasked(item):
    return np.where(item["labels"] == IGNORED, item["input_ids"], item["labels"])


def within(count, total, share):
    """Whether a count is inside the binomial bounds of one in a million."""
    low, high = binom.interval(1 - 1e-6, total, share)
    return low <= count <= high


def test_fifteen_percent_are_predicted_and_80_10_10_of_them_hidden_replaced_and_kept(items):
    ids = np.concatenate([item["input_ids"] for item in items])
    labels = np.concatenate([item["labels"] for item in items])
    true = np.concatenate([unmasked(item) for item in items])
    chosen = labels != IGNORED
    ordinary = ~np.isin(true, TOKENIZER.all_special_ids)
    assert not chosen[~ordinary].any()
    assert within(chosen.sum(), ordinary.sum(), 0.15)
    hidden = chosen & (ids == TOKENIZER.mask_token_id)
    vocabulary = len(TOKENIZER)
    kept = chosen & (ids == true)
    assert within(hidden.sum(), chosen.sum(), 0.8 + 0.1 / vocabulary)
    assert within(kept.sum(), chosen.sum(), 0.1 + 0.1 / vocabulary)
    replaced = ids[chosen & ~hidden & ~kept]
    assert len(np.unique(replaced)) > vocabulary * 0.9
    assert (ids[~chosen] == true[~chosen]).all()


def test_items_have_the_promised_types_and_layout(items):
    for item in items[:50]:
        assert {k: v.dtype for k, v in item.items() if k != "next_sentence_label"} == dict.fromkeys(
            ("input_ids", "labels", "token_type_ids"), np.dtype("int64")
        )
        assert item["next_sentence_label"] in (0, 1)
        ids = unmasked(item)
        separators = np.flatnonzero(ids == TOKENIZER.sep_token_id)
        assert ids[0] == TOKENIZER.cls_token_id
        assert len(separators) == 2
        assert separators[1] == len(ids) - 1
        assert separators[0] > 1
        assert separators[1] > separators[0] + 1
        assert item["token_type_ids"].tolist() == [0] * (separators[0] + 1) + [1] * (len(ids) - separators[0] - 1)
        assert len(ids) <= 32


def test_the_second_segment_follows_the_first_or_comes_from_another_article(pairs, items):
    plain = [TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) for text in pairs[1]]
    for item in items[:1500]:
        ids = unmasked(item)
        middle = ids.tolist().index(TOKENIZER.sep_token_id)
        first, second = (TOKENIZER.decode(part) for part in (ids[1:middle], ids[middle + 1 : -1]))
        sources = [{i for i, text in enumerate(plain) if part in text} for part in (first, second)]
        assert all(sources)
        if item["next_sentence_label"]:
            assert not sources[0] & sources[1] or len(sources[0] | sources[1]) > 2
        elif len(ids) < 32:  # truncation takes from the end of either segment
            assert any(first + second in text or f"{first} {second}" in text for text in plain)
        else:
            assert sources[0] & sources[1]


def test_labels_balance(items):
    count = sum(item["next_sentence_label"] for item in items)
    assert 0.5 < count / len(items) < 0.6  # chunks of one sentence always pair with another article
    long = [i for i in items if len(i["input_ids"]) > 25]
    assert 0.45 < np.mean([i["next_sentence_label"] for i in long]) < 0.6


def test_random_partners_come_from_the_whole_corpus(pairs, items):
    seen = set()
    for item in items:
        if item["next_sentence_label"]:
            ids = unmasked(item)
            second = TOKENIZER.decode(ids[ids.tolist().index(TOKENIZER.sep_token_id) + 1 : -1])
            seen.add(second.split()[0])
    assert len(seen) > 0.9 * pairs[0].stats["train_articles"]


def test_every_epoch_shows_every_example_once_in_another_order_with_other_masks(pairs):
    built = pairs[0]
    count = built.stats["train_examples"]
    data = built.train(2 * count, seed=0)
    places = [data.place(i) for i in range(2 * count)]
    assert [epoch for epoch, _ in places] == [0] * count + [1] * count
    first, second = [i for _, i in places[:count]], [i for _, i in places[count:]]
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second
    same = second.index(first[0]) + count
    assert data[0]["labels"].tolist() != data[same]["labels"].tolist()


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_items_do_not_depend_on_the_order_of_access_or_on_the_process(pairs):
    data = pairs[0].train(500, seed=7)
    forward = [data[i] for i in range(200)]
    np.random.seed(0)  # a global generator must not matter
    torch.manual_seed(0)
    other = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 10_000
    assert all(equal(other[i], forward[i]) for i in reversed(range(200)))
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2)
    for i, item in zip(range(200), loader, strict=False):
        assert torch.equal(torch.as_tensor(item["input_ids"]), torch.as_tensor(forward[i]["input_ids"]))
    assert not equal(pairs[0].train(500, seed=8)[0], forward[0])
    with pytest.raises(IndexError):
        data[500]


def test_without_nsp_an_example_is_consecutive_text_of_one_article(tmp_path):
    texts = articles(60)
    built = build(write(tmp_path / "a.txt", texts), tmp_path, nsp=False, short_seq_prob=0)
    plain = [TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) for text in texts]
    data = built.train(built.stats["train_examples"], seed=0)
    lengths = []
    for i in range(len(data)):
        item = data[i]
        assert item.keys() == {"input_ids", "labels"}
        ids = unmasked(item)
        assert (ids[0], ids[-1]) == (TOKENIZER.cls_token_id, TOKENIZER.sep_token_id)
        assert any(TOKENIZER.decode(ids[1:-1]) in text for text in plain)
        lengths.append(len(ids))
    assert max(lengths) == 32
    assert np.mean(lengths) > 24


def test_short_sequences(tmp_path):
    texts = [" ".join(["River sea."] * 3000)] * 3 + ["Other one."] * 3
    built = build(write(tmp_path / "a.txt", texts), tmp_path, nsp=False, short_seq_prob=0.3)
    targets = built.store.table("train", "targets")
    assert targets.min() >= 2
    assert targets.max() == 30
    assert within((targets < 30).sum(), len(targets), 0.3 * 28 / 29)


def test_validation_items_come_from_other_articles(pairs):
    built, texts = pairs
    held_out = built.store.table("validation", "articles").tolist()
    plain = [TOKENIZER.decode(TOKENIZER(texts[i], add_special_tokens=False)["input_ids"]) for i in held_out]
    data = built.validation(100, seed=0)
    for i in range(len(data)):
        ids = unmasked(data[i])
        first = TOKENIZER.decode(ids[1 : ids.tolist().index(TOKENIZER.sep_token_id)])
        assert any(first in text for text in plain)


def test_two_articles_are_enough_for_nsp(tmp_path):
    built = build(write(tmp_path / "a.txt", ["River water. Sea water.", "Good music. Bad film."]), tmp_path)
    for data in (built.train(20, seed=0), built.validation(20, seed=0)):
        for i in range(20):
            words = TOKENIZER.decode(unmasked(data[i]), skip_special_tokens=True)
            assert (("water" in words) and ("music" in words or "film" in words)) == bool(
                data[i]["next_sentence_label"]
            )


@pytest.mark.parametrize("make", [tiny_tokenizer, byte_level_tokenizer])
def test_whole_words_are_masked_together(tmp_path, make):
    tokenizer = make()
    texts = articles(40) + ["Zebra quixotic xylophone of the unhappiness. Jazzy zigzag."] * 3
    built = build(write(tmp_path / "a.txt", texts), tmp_path, tokenizer, nsp=False, whole_word=True)
    data = built.train(2000, seed=0)
    chosen = total = several = 0
    for i in range(len(data)):
        item = data[i]
        ids, picked = unmasked(item)[1:-1], item["labels"][1:-1] != IGNORED
        assert item["labels"][0] == item["labels"][-1] == IGNORED
        tokens = tokenizer.convert_ids_to_tokens(ids)
        starts = [not t.startswith("##") if make is tiny_tokenizer else t.startswith("Ġ") for t in tokens]
        assert starts[0]
        words = np.cumsum(starts)
        for word in np.unique(words):
            of_word = picked[words == word]
            assert of_word.all() or not of_word.any()
            several += len(of_word) > 1 and of_word.all()
        chosen += picked.sum()
        total += len(picked)
    assert several > 50
    assert 0.13 < chosen / total < 0.2  # an item of few words has one masked even if none was drawn


def test_byte_level_text_survives_the_round_trip(tmp_path):
    tokenizer = byte_level_tokenizer()
    texts = ["Two rivers are here. The sea is great.", "Schöne Wörter, naïve “quotes”. Another one!"]
    built = build(write(tmp_path / "a.txt", texts), tmp_path, tokenizer, nsp=False, short_seq_prob=0, validation=0.01)
    bounds = built.store.sentences[built.store.documents]
    decoded = [tokenizer.decode(built.store.tokens[a:b].tolist()) for a, b in itertools.pairwise(bounds)]
    assert [text.strip() for text in decoded] == texts
    ids = unmasked(built.train(1, seed=0)[0])
    assert tokenizer.convert_ids_to_tokens(ids[[0, -1]]) == ["<s>", "</s>"]


def test_an_item_always_has_something_to_predict(tmp_path):
    built = build(write(tmp_path / "a.txt", ["A b.", "C d.", "E f.", "G."]), tmp_path, nsp=False)
    data = built.train(200, seed=0)
    assert all((data[i]["labels"] != IGNORED).any() for i in range(200))


def test_collate_pads_to_the_longest(items):
    batch = collate(items[:9], pad_token_id=TOKENIZER.pad_token_id)
    longest = max(len(item["input_ids"]) for item in items[:9])
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
        **dict.fromkeys(("input_ids", "token_type_ids", "labels", "attention_mask"), ((9, longest), torch.int64)),
        "next_sentence_label": ((9,), torch.int64),
    }
    for row, item in enumerate(items[:9]):
        n = len(item["input_ids"])
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (longest - n)
        assert batch["input_ids"][row, :n].tolist() == item["input_ids"].tolist()
        assert batch["labels"][row, n:].eq(IGNORED).all()
        assert batch["input_ids"][row, n:].eq(TOKENIZER.pad_token_id).all()


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(size, key):
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_neighbours_are_spread_by_the_permutation():
    places = np.array([permuted(i, 100_000, 5) for i in range(5000)])
    assert abs(places.mean() / 100_000 - 0.5) < 0.02
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.06


@given(st.integers(1, 200), st.integers(1, 200), st.integers(2, 150))
def test_truncation_takes_from_the_longer_segment(first, second, longest):
    a, b = first, second
    while a + b > longest:  # the definition: one token at a time
        a, b = (a - 1, b) if a > b else (a, b - 1)
    got = truncated(first, second, longest)
    assert got == (a, b)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.lists(st.integers(2, 60), min_size=40, max_size=40))
def test_chunks_cover_an_article_and_reach_their_targets(lengths, wanted):
    ends = (100 + np.cumsum(lengths)).tolist()
    chunks = list(chunk(ends, 100, iter(wanted)))
    assert [first for first, _, _ in chunks] == [0, *[last for _, last, _ in chunks[:-1]]]
    assert chunks[-1][1] == len(lengths)
    for (first, last, target), asked in zip(chunks, wanted, strict=False):
        assert target == asked
        assert sum(lengths[first : last - 1]) < target
        assert sum(lengths[first:last]) >= target or last == len(lengths)
