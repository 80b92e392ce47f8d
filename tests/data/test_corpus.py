"""Building the corpus cache: sentences, tokens, identity, split, concurrency and failures."""

import concurrent.futures
import errno
import gzip
import itertools
import json
import os
import shutil

import numpy as np
import pytest

from pruneofa.data import corpus, sources, tokenization
from pruneofa.data.corpus import build_corpus, source_fingerprint, split_articles
from pruneofa.data.tokenization import Encoder, encode_batches, sentences
from pruneofa.errors import InputError
from pruneofa.recipe import Corpus
from tests.tiny import WORDS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WHOLE = [word for word in WORDS.split() if "##" not in word]


def articles(count, seed=0):
    """Articles of 1 to 12 sentences of known words."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        lengths = rng.integers(3, 15, rng.integers(1, 12))
        made.append(" ".join(" ".join(rng.choice(WHOLE, n)).capitalize() + "." for n in lengths))
    return made


def write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(texts) + "\n")
    return path


def build(source, tmp_path, tokenizer=TOKENIZER, processes=1, seed=0, **settings):
    spec = Corpus(source=str(source), max_length=32, **settings)
    return build_corpus(spec, tokenizer, cache_dir=tmp_path / "cache", processes=processes, seed=seed)


def stored(built):
    """Token ids per article, as the cache holds them."""
    store = built.store
    bounds = store.sentences[store.documents]
    return [store.tokens[low:high].tolist() for low, high in itertools.pairwise(bounds)]


@pytest.mark.parametrize(("text", "said"), [("今天。\n\n明天。\n\n后天。\n", True), (None, False)])
def test_a_corpus_of_unknown_words_is_named(tmp_path, capsys, text, said):
    path = write(tmp_path / "t.txt", articles(4) if text is None else [text])
    build(path, tmp_path)
    assert ("tokens are unknown to the tokenizer; check the language" in capsys.readouterr().err) is said


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('Mr. Smith left. "Did he?" Yes!', ["Mr. Smith left.", '"Did he?"', "Yes!"]),
        ("J. R. R. Tolkien, e.g. here. Gen. Lee.", ["J. R. R. Tolkien, e.g. here.", "Gen. Lee."]),
        ("It is a line\nwrapped here. Next", ["It is a line wrapped here.", "Next"]),
        ("Heading\n\nlower case", ["Heading", "lower case"]),
        ("今天。明天！」后天？", ["今天。", "明天！」", "后天？"]),
        ("Wait... No. 5 of 3.5 (see Fig. 2.) End", ["Wait...", "No. 5 of 3.5 (see Fig. 2.)", "End"]),
        (" \n ", []),
    ],
)
def test_sentences(text, wanted):
    assert sentences(text) == wanted


@pytest.mark.parametrize("unit", [" ", ".", '"', '."', "\n", "。", "A. "])
def test_sentence_splitting_is_linear_in_hostile_text(unit):
    sentences(unit * 200_000)  # the timeout of the suite is the assertion


def test_tokens_are_those_of_the_tokenizer(tmp_path):
    texts = articles(30)
    built = build(write(tmp_path / "a.txt", texts), tmp_path)
    assert stored(built) == [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert built.store.tokens.dtype == np.uint16
    starts = built.store.sentences[:-1]
    assert len(starts) == sum(len(sentences(text)) for text in texts)
    assert built.stats["articles"] == 30
    assert (
        built.stats["tokens"]
        == built.stats["train_tokens"] + built.stats["validation_tokens"]
        == len(built.store.tokens)
    )


def test_special_tokens_written_in_the_text_are_only_text(tmp_path):
    built = build(write(tmp_path / "a.txt", ["A [MASK] and [SEP] here.", "Two."]), tmp_path)
    assert not {TOKENIZER.mask_token_id, TOKENIZER.sep_token_id} & set(built.store.tokens.tolist())


def test_very_long_sentences_are_cut_at_words_and_nothing_is_lost():
    encoder = Encoder(TOKENIZER.backend_tokenizer.to_str())
    text = "zebra " * 100
    encoded = encoder([text])
    assert encoded.ids.tolist() == TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert encoded.sentences.max() <= tokenization.LONGEST_SENTENCE
    starts = np.cumsum(encoded.sentences)[:-1]
    assert len(starts) > 2
    assert not encoder.continuation[encoded.ids[starts]].any()


def test_truncation_and_padding_set_on_the_tokenizer_do_not_reach_the_corpus(tmp_path):
    plain = build(write(tmp_path / "a.txt", articles(30)), tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer(["a b c d e f g h"], truncation=True, max_length=4, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation
    other = build(tmp_path / "a.txt", tmp_path, tokenizer)
    assert other.stats["cached"]
    assert other.fingerprint == plain.fingerprint


def test_many_processes_write_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_CHARACTERS", 200)
    path = write(tmp_path / "a.txt", articles(60))
    one = build(path, tmp_path / "1", processes=1)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    three = build(path, tmp_path / "3", processes=3)
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    for name in ("tokens.bin", "sentences.bin", "documents.bin", "hashes.bin"):
        assert (one.store.folder / name).read_bytes() == (three.store.folder / name).read_bytes()
    assert one.fingerprint == three.fingerprint


def test_only_a_few_batches_are_under_way_at_once():
    taken = 0

    def batches():
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield ["of the river."]

    encoded = encode_batches(batches(), TOKENIZER.backend_tokenizer.to_str(), 2)
    next(encoded)
    assert taken <= 4
    encoded.close()


def test_an_error_of_the_reader_stops_the_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_CHARACTERS", 200)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in articles(30)) + "{broken\n")
    with pytest.raises(InputError, match="line 31 is not JSON"):
        build(path, tmp_path, processes=2)
    assert list((tmp_path / "cache" / "corpus").iterdir()) == []


def test_the_cache_is_found_by_content_under_any_name(tmp_path):
    texts = articles(30)
    first = build(write(tmp_path / "a.txt", texts), tmp_path)
    again = build(tmp_path / "a.txt", tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.txt.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
    renamed = build(tmp_path / "other", tmp_path)
    assert [b.stats["cached"] for b in (first, again, renamed)] == [False, True, True]
    assert first.fingerprint == again.fingerprint == renamed.fingerprint
    assert {k: v for k, v in first.stats.items() if k not in ("seconds", "cached")} == {
        k: v for k, v in again.stats.items() if k not in ("seconds", "cached")
    }


def test_what_changes_the_examples_changes_the_fingerprint_and_only_other_tokens_are_made_anew(tmp_path, monkeypatch):
    texts = articles(30)
    path = write(tmp_path / "a.txt", texts)
    base = build(path, tmp_path)
    for change in ({"nsp": False}, {"short_seq_prob": 0.5}, {"validation": 0.2}, {"whole_word": True}, {"seed": 1}):
        other = build(path, tmp_path, **change)
        assert other.stats["cached"], change
        assert other.fingerprint != base.fingerprint, change
    changed = build(write(tmp_path / "b.txt", [*texts, "One more."]), tmp_path)
    assert not changed.stats["cached"]
    assert changed.fingerprint != base.fingerprint
    monkeypatch.setattr("pruneofa.data.corpus.FORMAT", 1)  # it read the quotes of a TSV otherwise
    assert not build(path, tmp_path).stats["cached"]


def test_the_source_fingerprint_follows_the_text_and_the_column_only(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "x.txt", articles(5))
    write(tmp_path / "c" / "x.txt", articles(6))
    prints = [source_fingerprint(Corpus(source=name), data_root=tmp_path) for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    assert source_fingerprint(Corpus(source="a", column="body"), data_root=tmp_path) == prints[0]  # txt has no columns
    assert set(sources.unread("a", tmp_path)) == {"config", "column"}
    (tmp_path / "a" / "y.csv").write_text("text\nthe king\n")
    assert set(sources.unread(["a", "b"], tmp_path)) == {"config"}
    assert sources.unread(["a", "wikimedia/wikipedia"], tmp_path) == {}


def test_a_damaged_cache_is_made_anew(tmp_path):
    path = write(tmp_path / "a.txt", articles(30))
    first = build(path, tmp_path)
    wanted = (first.store.folder / "tokens.bin").read_bytes()
    (first.store.folder / "tokens.bin").write_bytes(wanted[:-2])
    again = build(path, tmp_path)
    assert not again.stats["cached"]
    assert (again.store.folder / "tokens.bin").read_bytes() == wanted


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEOFA_CACHE", str(tmp_path / "elsewhere"))
    path = write(tmp_path / "a.txt", articles(30))
    built = build_corpus(Corpus(source=str(path)), TOKENIZER)
    assert built.store.folder.parent == tmp_path / "elsewhere" / "corpus"


def test_two_processes_that_want_the_same_cache_build_it_once(tmp_path):
    path = write(tmp_path / "a.txt", articles(200))
    with concurrent.futures.ProcessPoolExecutor(3) as pool:
        futures = [pool.submit(_cached, path, tmp_path) for _ in range(3)]
        assert sorted(future.result() for future in futures) == [False, True, True]


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        lambda file: file.write_bytes(bytes(file.stat().st_size)),
        lambda file: file.unlink(),
    ],
    ids=["a bit", "cut", "zeros", "gone"],
)
@pytest.mark.parametrize(
    "name", ["tokens.bin", "sentences.bin", "documents.bin", "chunks/train/spans.bin", "meta.json"]
)
def test_a_damaged_cache_is_named_and_made_again(tmp_path, capsys, name, damage):
    path = write(tmp_path / "a.txt", articles(20))
    first = build(path, tmp_path)
    wanted = [first.train(8, seed=0)[index]["input_ids"].tolist() for index in range(8)]
    assert build(path, tmp_path).stats["cached"]
    file = first.store.folder / name
    if name.startswith("chunks"):
        [file] = first.store.folder.glob("chunks-*/train/spans.bin")
    before = file.read_bytes()
    damage(file)
    capsys.readouterr()
    again = build(path, tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1 and f"damaged ({file.name}: " in said[0].replace("train/", "") and "made again" in said[0]
    assert [again.train(8, seed=0)[index]["input_ids"].tolist() for index in range(8)] == wanted
    assert name == "meta.json" or file.read_bytes() == before


def _cached(path, tmp_path):
    return build(path, tmp_path).stats["cached"]


def test_the_split_is_by_article_disjoint_and_independent_of_order(tmp_path):
    texts = articles(400)
    built = build(write(tmp_path / "a.txt", texts), tmp_path, validation=0.1)
    assert built.stats["train_articles"] + built.stats["validation_articles"] == 400
    assert 20 <= built.stats["validation_articles"] <= 60
    held_out = held_out_texts(built, texts)
    shuffled = [texts[i] for i in np.random.default_rng(1).permutation(400)]
    again = build(write(tmp_path / "b.txt", shuffled), tmp_path, validation=0.1)
    assert held_out_texts(again, shuffled) == held_out


def held_out_texts(built, texts):
    train = built.store.table("train", "articles").tolist()
    validation = built.store.table("validation", "articles").tolist()
    assert sorted(train + validation) == list(range(len(texts)))
    return {texts[i] for i in validation}


@pytest.mark.parametrize(
    ("count", "nsp", "least"), [(2, True, 1), (3, True, 1), (4, True, 2), (9, True, 2), (2, False, 1)]
)
def test_a_tiny_corpus_still_has_both_splits(count, nsp, least):
    hashes = np.arange(count, dtype=np.uint64) + np.uint64(2**63)
    parts = split_articles(hashes, 0.05, nsp)
    assert len(parts["train"]) >= len(parts["validation"]) == least


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        (["Only one. Of them."], {}, r"1 article, but next-sentence prediction needs at least 2; add text"),
        (["Only one. Of them."], {"nsp": False}, r"1 article, but holding one out for validation needs at least 2"),
        (["\u200b"], {"nsp": False}, r"no usable text in it; check the files"),
    ],
)
def test_a_corpus_that_gives_no_examples_leaves_nothing_behind(tmp_path, texts, settings, message):
    with pytest.raises(InputError, match=message):
        build(write(tmp_path / "a.txt", texts), tmp_path, **settings)
    assert list((tmp_path / "cache" / "corpus").iterdir()) == []


def test_a_wrong_source_writes_nothing_at_all(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    for source in ("a.txt", "missing.txt"):
        with pytest.raises(InputError):
            build(tmp_path / source, tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_without_a_mask_token(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(InputError, match="tokenizer has no mask token"):
        build(write(tmp_path / "a.txt", articles(3)), tmp_path, tokenizer)


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = write(tmp_path / "a.txt", articles(30))
    monkeypatch.setattr(corpus, "_write", full)
    with pytest.raises(InputError, match="disk full; free space, or set PRUNEOFA_CACHE.* the same command resumes"):
        build(path, tmp_path)
    assert list((tmp_path / "cache" / "corpus").iterdir()) == []


@pytest.mark.skipif("PRUNEOFA_DATA" not in os.environ, reason="needs real data in PRUNEOFA_DATA")
def test_real_articles(tmp_path):
    data = os.path.join(os.environ["PRUNEOFA_DATA"], "wiki")
    shard = tmp_path / "one.parquet"
    shutil.copy(os.path.join(data, sorted(os.listdir(data))[0]), shard)
    texts = [text for text, _ in sources.find(str(shard), None, None, streaming=False)[0].articles("text")][:50]
    lengths = [len(sentence.split()) for text in texts for sentence in sentences(text)]
    assert 10 < np.mean(lengths) < 30
