"""Builds a cache of token ids on disk from text sources, and pre-training examples from it.

The cache is a folder of flat little-endian files, written by appending and read through memory maps, so that neither
building nor reading needs memory that grows with the corpus:
  tokens.bin     uint16 (uint32 for large vocabularies): the ids of all articles, end to end, no special tokens
  sentences.bin  int64: where each sentence starts in tokens.bin, and the total
  documents.bin  int64: where each article starts in sentences.bin, and the total
  hashes.bin     uint64: a hash of each article's text, which decides its split
  chunks-*/      the sentences of each example, for one length, seed and validation share
checksums.json in both tells when a file was damaged; the cache is then made again.
"""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from pruneofa.data import sources
from pruneofa.data.examples import (
    ExampleFormat,
    PretrainingDataset,
    Store,
    chunk,
    chunk_targets,
    collate,
    is_held_out,
    mapped,
)
from pruneofa.data.streaming import StreamingDataset
from pruneofa.data.tokenization import RULES, Encoded, Encoder, encode_batches, id_dtype
from pruneofa.errors import InputError, disk_is_full
from pruneofa.formats.cache import cached_folder
from pruneofa.formats.files import cache_root, fingerprint, read_json, write_json
from pruneofa.progress import notice, progress
from pruneofa.recipe import Corpus

__all__ = ["BuiltCorpus", "build_corpus", "collate", "source_fingerprint"]

FORMAT = 2  # part of the cache's identity: increase it when the same text gives other tokens
BATCH_CHARACTERS = 1 << 18  # text per task of a worker: limits both the overhead of transfers and the memory
IN_PROCESS_BYTES = 2 << 20  # below this, starting processes costs more than it saves
MIB = 1 << 20
_FIRST_TOKENS = 100_000  # looked at for unknown ones
PARTS = ("tokens", "sentences", "documents", "hashes")

Reader = sources.Files | sources.Hub


@dataclass(frozen=True)
class BuiltCorpus:
    """A tokenized corpus: its fingerprint, its counts, and its examples. `store` is None when streaming."""

    fingerprint: str
    stats: dict[str, Any]
    spec: Corpus
    form: ExampleFormat
    readers: list[Reader]
    tokenizer_json: str
    store: Store | None

    def train(self, size: int, *, seed: int, batch: int = 1) -> PretrainingDataset | StreamingDataset:
        """`size` training examples; number p is a pure function of (seed, p) unless streaming.

        `batch`: examples of a batch that the workers of a DataLoader make, so that each makes whole ones.
        """
        return self._examples("train", size, seed, batch)

    def validation(self, size: int, *, seed: int) -> PretrainingDataset | StreamingDataset:
        """`size` examples from held-out articles, which `train` does not use."""
        return self._examples("validation", size, seed, 1)

    def _examples(self, split: str, size: int, seed: int, batch: int) -> PretrainingDataset | StreamingDataset:
        if self.store is not None:
            return PretrainingDataset(self.form, self.store, split, size, seed)
        texts = functools.partial(_texts, self.readers, self.spec.column)
        return StreamingDataset(self.form, texts, Encoder(self.tokenizer_json), split, size, seed, batch)


def build_corpus(
    spec: Corpus,
    tokenizer: Any,
    *,
    data_root: str | Path | None = None,
    cache_dir: str | Path | None = None,
    processes: int | None = None,
    seed: int = 0,
) -> BuiltCorpus:
    """Tokenize the text that `spec` names into a cache, unless it is cached already, and return its examples.

    Args:
        spec: the corpus section of a recipe.
        tokenizer: a fast tokenizer of transformers with cls (or bos), sep (or eos), mask and pad tokens.
        data_root: folder that relative source paths start from; default: the working directory.
        cache_dir: default the environment's PRUNEOFA_CACHE, else ~/.cache/pruneofa.
        processes: tokenizer processes beside the reading one; default one per core.
        seed: decides which examples are made shorter (`short_seq_prob`).

    Raises:
        InputError: no usable text, a wrong column, bytes that are not UTF-8, an empty file, a missing path,
            fewer than two articles with nsp, or a tokenizer without the special tokens.
    """
    start = time.monotonic()
    form = ExampleFormat.of(spec, tokenizer)  # an unusable tokenizer is an error before the long work
    readers = sources.find(spec.source, spec.config, data_root, streaming=spec.streaming)
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()  # so that the text's identity does not depend on how the tokenizer was last called
    backend.no_padding()
    identity = fingerprint([FORMAT, _content(readers, spec), backend.to_str(), RULES])
    examples = [spec.max_length, spec.nsp, spec.short_seq_prob, spec.validation, spec.whole_word, seed]
    whole = fingerprint([identity, examples, spec.streaming])
    stats: dict[str, Any] = dict.fromkeys(("articles", "train_articles", "tokens", "train_tokens"))
    if spec.streaming:
        stats |= {"seconds": 0.0, "tokens_per_second": None, "cached": False}
        return BuiltCorpus(whole, stats, spec, form, readers, backend.to_str(), None)
    root = Path(cache_dir or cache_root()) / "corpus"
    folder = root / identity[:32]
    settings = [spec.max_length, spec.nsp, spec.short_seq_prob, spec.validation, seed]
    chunks = folder / f"chunks-{fingerprint(settings)[:16]}"
    try:
        cached = cached_folder(folder, functools.partial(_build, readers, spec, backend.to_str(), processes))
        cached_folder(chunks, functools.partial(_chunk_table, folder, spec, seed))
    except OSError as error:
        if not disk_is_full(error):
            raise
        raise InputError(
            f"{root}: disk full; free space, or set PRUNEOFA_CACHE to a folder on another disk; "
            "the same command resumes"
        ) from error
    built = read_json(folder / "meta.json")
    _warn_of_unknown(folder, np.dtype(built["dtype"]), tokenizer.unk_token_id, spec)
    stats |= {name: built[name] for name in ("articles", "tokens", "tokens_per_second")} | read_json(
        chunks / "meta.json"
    )
    stats |= {"seconds": round(time.monotonic() - start, 2), "cached": cached}
    return BuiltCorpus(whole, stats, spec, form, readers, backend.to_str(), Store(folder, chunks))


def source_fingerprint(spec: Corpus, *, data_root: str | Path | None = None) -> str:
    """Fingerprint of the text that `spec` names, independent of file names; fast compared with tokenizing.

    Raises InputError like `build_corpus`, for errors that are found without reading every article.
    """
    return fingerprint(_content(sources.find(spec.source, spec.config, data_root, streaming=spec.streaming), spec))


def _content(readers: list[Reader], spec: Corpus) -> list[Any]:
    if spec.streaming:  # reading everything first would defeat the purpose: revisions or sizes, and the first articles
        first = list(itertools.islice(_texts(readers, spec.column), 2))
        if len(first) < 2:
            raise _too_few(spec, len(first))
        hub = [reader.fingerprint(spec.column) for reader in readers if isinstance(reader, sources.Hub)]
        return [[reader.size for reader in readers], first, *hub]
    plain = all(isinstance(reader, sources.Files) and reader.plain for reader in readers)
    return [[reader.fingerprint(spec.column) for reader in readers], "" if plain else spec.column]


def _texts(readers: list[Reader], column: str) -> Iterator[str]:
    for reader in readers:
        for text, _ in reader.articles(column):
            if text:
                yield text


def _too_few(spec: Corpus, count: int) -> InputError:
    why = "next-sentence prediction" if spec.nsp else "holding one out for validation"
    return InputError(
        f"corpus {spec.source}: {count} article{'s' * (count != 1)}, but {why} needs at least 2; add text "
        "(articles in a .txt file are separated by blank lines)"
    )


def _build(readers: list[Reader], spec: Corpus, tokenizer_json: str, processes: int | None, folder: Path) -> None:
    """Fill the cache folder of a corpus, without the chunks."""
    start = time.monotonic()
    local = all(isinstance(reader, sources.Files) for reader in readers)
    total = sum(reader.size for reader in readers)
    if processes is None:
        processes = 1 if local and total < IN_PROCESS_BYTES else _cores()
    counts = {"articles": 0, "sentences": 0, "tokens": 0}
    unit = MIB if local and total >= MIB else 1
    title = f"tokenizing ({'MiB' if unit == MIB else 'bytes' if local else 'articles'})"
    with progress(title, max(total // unit, 1)) as advance:

        def moved(units: int) -> None:
            advance(units, f"{counts['tokens'] / (time.monotonic() - start):,.0f} tokens/s")

        batches = _batches(readers, spec.column, unit, moved)
        _write(encode_batches(batches, tokenizer_json, processes), folder, counts)
        if not counts["tokens"]:
            raise InputError(f"corpus {spec.source}: no usable text in it; check the files and corpus.column")
        if counts["articles"] < 2:
            raise _too_few(spec, counts["articles"])
        speed = round(counts["tokens"] / (time.monotonic() - start))
        dtype = id_dtype(tokenizers.Tokenizer.from_str(tokenizer_json)).str
        write_json(folder / "meta.json", {**counts, "dtype": dtype, "tokens_per_second": speed})


def _warn_of_unknown(folder: Path, dtype: np.dtype, unknown: int | None, spec: Corpus) -> None:
    first = mapped(folder / "tokens.bin", dtype)[:_FIRST_TOKENS]
    share = float((first == unknown).mean()) if unknown is not None else 0.0
    if share > 0.5:
        notice(
            f"pruneofa: warning: corpus {spec.source}: {share:.0%} of its first {len(first):,} tokens are unknown to "
            "the tokenizer; check the language of the text and corpus.column"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _batches(readers: list[Reader], column: str, unit: int, moved: Callable[[int], None]) -> Iterator[list[str]]:
    """Articles in groups of about BATCH_CHARACTERS; `moved` is called with the progress of reading, in `unit`s."""
    batch: list[str] = []
    characters = read = 0
    for reader in readers:
        for text, consumed in reader.articles(column):
            read += consumed
            if read >= unit:
                moved(read // unit)
                read %= unit
            if text:
                batch.append(text)
                characters += len(text)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _write(parts: Generator[Encoded], folder: Path, counts: dict[str, int]) -> None:
    """Append every part to the flat files, keeping `counts` up to date."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(parts))
        tokens, starts, documents, hashes = (stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in PARTS)
        starts.write(np.zeros(1, "<i8"))
        documents.write(np.zeros(1, "<i8"))
        for part in parts:
            tokens.write(part.ids)
            starts.write((counts["tokens"] + np.cumsum(part.sentences)).astype("<i8"))
            documents.write((counts["sentences"] + np.cumsum(part.documents)).astype("<i8"))
            hashes.write(part.hashes.astype("<u8"))
            counts["articles"] += len(part.documents)
            counts["sentences"] += len(part.sentences)
            counts["tokens"] += len(part.ids)


def split_articles(hashes: np.ndarray, share: float, nsp: bool) -> dict[str, np.ndarray]:
    """Article numbers of each split, int64, by hash; in a very small corpus each split still gets some articles.

    Args:
        hashes: uint64 (articles,), of their texts.
        share: fraction of the articles that is held out.
        nsp: whether a split needs two articles, for pairs.
    """
    held_out = is_held_out(hashes, share)
    least = min(2 if nsp else 1, len(hashes) // 2)
    if not least <= held_out.sum() <= len(hashes) - least:
        count = min(max(int(held_out.sum()), least), len(hashes) - least)
        held_out = np.zeros(len(hashes), bool)
        held_out[np.argsort(hashes, kind="stable")[:count]] = True
    return {"train": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out)}


def _chunk_table(corpus: Path, spec: Corpus, seed: int, folder: Path) -> None:
    hashes = mapped(corpus / "hashes.bin", np.dtype("<u8"))
    meta: dict[str, int] = {}
    for split, articles in split_articles(hashes, spec.validation, spec.nsp).items():
        examples, tokens = _cut(corpus, articles, chunk_targets(spec, seed), folder / split)
        articles.astype("<i8").tofile(folder / split / "articles.bin")
        meta |= {f"{split}_articles": len(articles), f"{split}_examples": examples, f"{split}_tokens": tokens}
    write_json(folder / "meta.json", meta)


def _cut(folder: Path, articles: np.ndarray, targets: Iterator[int], out: Path) -> tuple[int, int]:
    """Write the chunks of `articles` and return their number and their tokens."""
    documents = mapped(folder / "documents.bin", np.dtype("<i8"))
    bounds = mapped(folder / "sentences.bin", np.dtype("<i8"))
    examples = tokens = 0
    out.mkdir()
    with open(out / "spans.bin", "wb") as spans, open(out / "targets.bin", "wb") as lengths:
        for article in articles.tolist():
            low, high = documents[article : article + 2].tolist()
            begin, *ends = bounds[low : high + 1].tolist()
            rows = np.array(list(chunk(ends, begin, targets)), np.int64)
            spans.write((rows[:, :2] + low).astype("<i8"))
            lengths.write(rows[:, 2].astype("<u2"))
            examples += len(rows)
            tokens += ends[-1] - begin
    return examples, tokens
