"""From text sources to a cache of token ids on disk, and from there to pre-training examples.

The cache is a folder of flat little-endian files that are only ever appended to and read back through
memory maps, so neither building nor reading needs memory that grows with the corpus:
  tokens.bin     uint16 (uint32 for large vocabularies): the ids of all articles, end to end, no special tokens
  sentences.bin  int64: where each sentence starts in tokens.bin, and the total
  documents.bin  int64: where each article starts in sentences.bin, and the total
  hashes.bin     uint64: a hash of each article's text, which decides its split
  chunks-*/      which sentences make an example, for one length, seed and validation share
"""

import bisect
import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from pruneofa.errors import InputError
from pruneofa.files import fingerprint, new_folder, read_json, write_json
from pruneofa.progress import progress
from pruneofa.recipe import Corpus
from pruneofa.train import sources

if TYPE_CHECKING:
    from pruneofa.train.examples import PretrainingDataset, StreamingDataset

FORMAT = 1
BATCH_CHARACTERS = 1 << 18  # text per task: large against the cost of passing it, small against memory
IN_PROCESS_BYTES = 2 << 20  # below this, starting processes costs more than it saves
LONGEST_SENTENCE = 120  # tokens; longer ones (lists, code) are cut at a word so that no text is lost to truncation

# A sentence ends after . ! ? … (and closing quotes or brackets) before white space, after CJK full stops, and at
# a line break. `sentences` takes back an end that an abbreviation, an initial or a lower-case letter contradicts.
_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(\s+)|[。！？]+[”’」』）]*(\s*)|(\s*\n\s*)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'“])(?:[A-Za-z]|[A-Za-z]\.[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Gen|Col|Capt|Lt|Sgt|Rev|Hon|Gov|Sen"
    r"|Rep|No|Nos|vs|etc|cf|ca|al|approx|est|fl|Fig|Eq|Vol|pp|Inc|Ltd|Co|Corp|Bros|Mt|Ft)\.$"
)


def sentences(text: str) -> list[str]:
    """Split `text` into sentences, white space inside them collapsed to single blanks."""
    found, start = [], 0
    for match in _END.finditer(text):
        stop = match.end()
        space = match.lastindex or 1
        following = text[stop : stop + 1]
        if space != 2 and following.islower():
            continue  # "e.g. this", or a line that was wrapped in mid-sentence
        if (
            space == 1
            and "\n" not in match[1]
            and _ABBREVIATION.search(text, max(start, match.start() - 12), match.start(1))
        ):
            continue
        found.append(text[start:stop])
        start = stop
    found.append(text[start:])
    return [" ".join(part.split()) for part in found if not part.isspace() and part]


@dataclass(frozen=True)
class Encoded:
    """Articles as tokens: ids (tokens,), tokens per sentence, sentences per article, hash per article."""

    ids: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
    hashes: np.ndarray


class Encoder:
    """Sentence-wise tokenization by a tokenizer given as its JSON; lives in every worker process."""

    def __init__(self, tokenizer_json: str) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # a "[MASK]" in an article is text, not a mask
        self.continuation = continuations(self.tokenizer)
        self.dtype = id_dtype(self.tokenizer)
        # Byte-level vocabularies tell the start of a word by the blank before it, which splitting took away.
        self.prefix = " " if '"ByteLevel"' in json.dumps(json.loads(tokenizer_json)["pre_tokenizer"]) else ""

    def __call__(self, texts: list[str]) -> Encoded:
        """Encode articles; those without a token are left out."""
        split = [sentences(text) for text in texts]
        flat = [self.prefix + sentence for parts in split for sentence in parts]
        encodings = iter(self.tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        ids: list[list[int]] = []
        counts, hashes = [], []
        for text, parts in zip(texts, split, strict=True):
            before = len(ids)
            for encoding in itertools.islice(encodings, len(parts)):
                ids.extend(self._pieces(encoding.ids))
            if len(ids) > before:
                counts.append(len(ids) - before)
                digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                hashes.append(int.from_bytes(digest, "little"))
        lengths = np.array([len(part) for part in ids], np.int64)
        tokens = np.fromiter(itertools.chain.from_iterable(ids), self.dtype, int(lengths.sum()))
        return Encoded(tokens, lengths, np.array(counts, np.int64), np.array(hashes, np.uint64))

    def _pieces(self, ids: list[int]) -> Iterator[list[int]]:
        while len(ids) > LONGEST_SENTENCE:
            cut = LONGEST_SENTENCE
            while cut > LONGEST_SENTENCE // 2 and self.continuation[ids[cut]]:
                cut -= 1
            yield ids[:cut]
            ids = ids[cut:]
        if ids:
            yield ids


def continuations(tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """Which ids continue a word, bool (vocabulary,): "##x" for WordPiece, no leading "Ġ" or "▁" elsewhere."""
    model = json.loads(tokenizer.to_str())["model"]
    table = np.zeros(vocabulary_size(tokenizer), bool)
    wordpiece = model.get("type") == "WordPiece" or model.get("continuing_subword_prefix")
    mark = model.get("continuing_subword_prefix") or "##"
    special = {str(added) for added in tokenizer.get_added_tokens_decoder().values()}
    for token, index in tokenizer.get_vocab().items():
        if token not in special:
            table[index] = token.startswith(mark) if wordpiece else not token.startswith(("Ġ", "▁"))
    table[list(tokenizer.get_added_tokens_decoder())] = False
    return table


def vocabulary_size(tokenizer: tokenizers.Tokenizer) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab().values()) + 1


def id_dtype(tokenizer: tokenizers.Tokenizer) -> np.dtype:
    """The type that token ids are stored in."""
    return np.dtype("<u2") if vocabulary_size(tokenizer) <= 1 << 16 else np.dtype("<u4")


class Store:
    """Memory-mapped arrays of a cache folder; travels to another process as its path."""

    def __init__(self, folder: Path, chunks: Path) -> None:
        self.folder, self.chunks = folder, chunks
        self.dtype = np.dtype(read_json(folder / "meta.json")["dtype"])

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "chunks": self.chunks, "dtype": self.dtype}

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Ids of all articles, (tokens,)."""
        return _mapped(self.folder / "tokens.bin", self.dtype)

    @functools.cached_property
    def sentences(self) -> np.ndarray:
        """First token of each sentence, int64 (sentences + 1,)."""
        return _mapped(self.folder / "sentences.bin", np.dtype("<i8"))

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """First sentence of each article, int64 (articles + 1,)."""
        return _mapped(self.folder / "documents.bin", np.dtype("<i8"))

    def table(self, split: str, name: str) -> np.ndarray:
        """`spans` int64 (chunks, 2): first sentence and the one after the last; `targets` uint16; `articles` int64."""
        dtype = np.dtype("<u2" if name == "targets" else "<i8")
        flat = _mapped(self.chunks / f"{split}-{name}.bin", dtype)
        return flat.reshape(-1, 2) if name == "spans" else flat


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, mode="r"))  # plain arrays index several times faster than memmap


@dataclass(frozen=True)
class BuiltCorpus:
    """A tokenized corpus: its identity, its numbers, and its examples."""

    fingerprint: str
    stats: dict[str, Any]
    spec: Corpus
    tokenizer: Any
    store: Store | None
    texts: Callable[[], Iterator[str]]
    seed: int

    def train(self, size: int, *, seed: int, epoch0: int = 0) -> "PretrainingDataset | StreamingDataset":
        """`size` training examples; example number p is a pure function of (seed, epoch0, p)."""
        return self._examples("train", size, seed, epoch0)

    def validation(self, size: int, *, seed: int) -> "PretrainingDataset | StreamingDataset":
        """`size` examples of articles that `train` never shows."""
        return self._examples("validation", size, seed, 0)

    def _examples(self, split: str, size: int, seed: int, epoch0: int) -> "PretrainingDataset | StreamingDataset":
        from pruneofa.train.examples import ExampleFormat, PretrainingDataset, StreamingDataset

        form = ExampleFormat.of(self.spec, self.tokenizer)
        if self.store is None:
            encoder = Encoder(self.tokenizer.backend_tokenizer.to_str())
            held_out = functools.partial(is_validation, share=self.spec.validation)
            return StreamingDataset(form, self.texts, encoder, held_out, split, size, seed + epoch0)
        return PretrainingDataset(form, self.store, split, size, seed, epoch0)


def build_corpus(
    spec: Corpus,
    tokenizer: Any,
    *,
    data_root: str | Path | None = None,
    cache_dir: str | Path | None = None,
    processes: int | None = None,
    seed: int = 0,
) -> BuiltCorpus:
    """Tokenize the text that `spec` names into a cache, or find it there, and return its examples.

    Args:
        spec: the corpus section of a recipe.
        tokenizer: a fast tokenizer of transformers with cls (or bos), sep (or eos), mask and pad tokens.
        data_root: where relative source paths start; default the working directory.
        cache_dir: default the environment's PRUNEOFA_CACHE, else ~/.cache/pruneofa.
        processes: tokenizer processes beside the reading one; default one per core.
        seed: decides which examples are made shorter (`short_seq_prob`).

    Raises:
        InputError: no usable text, a wrong column, bytes that are not UTF-8, an empty file, a missing path,
            fewer than two articles with nsp, or a tokenizer without the special tokens.
    """
    from pruneofa.train.examples import ExampleFormat

    start = time.monotonic()
    ExampleFormat.of(spec, tokenizer)  # an unusable tokenizer is found before the long work
    readers = sources.find(spec.source, spec.config, data_root, spec.streaming)
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    if spec.streaming:
        return _streaming(spec, tokenizer, readers, backend, seed)
    parts = [reader.fingerprint(spec.column) for reader in readers]
    column = None if all(path.suffix == ".txt" for path in _paths(readers)) else spec.column
    identity = fingerprint([FORMAT, parts, column, backend.to_str(), LONGEST_SENTENCE, _END.pattern])
    root = Path(cache_dir or os.environ.get("PRUNEOFA_CACHE") or "~/.cache/pruneofa").expanduser() / "corpus"
    folder = root / identity[:32]
    with _locked(folder):
        cached = _complete(folder)
        if not cached:
            _tokenize(readers, spec, backend.to_str(), folder, processes)
        chunks = _chunk_table(folder, spec, seed)
    meta, table = read_json(folder / "meta.json"), read_json(chunks / "meta.json")
    seconds = time.monotonic() - start
    stats = {
        "articles": meta["articles"],
        "train_articles": table["train_articles"],
        "tokens": meta["tokens"],
        "train_tokens": table["train_tokens"],
        "train_examples": table["train_examples"],
        "validation_examples": table["validation_examples"],
        "seconds": round(seconds, 2),
        "tokens_per_second": round(meta["tokens"] / meta["seconds"]),
        "cached": cached,
    }
    whole = fingerprint([identity, chunks.name, spec.nsp, spec.whole_word])
    return BuiltCorpus(whole, stats, spec, tokenizer, Store(folder, chunks), lambda: _texts(readers, spec.column), seed)


def _streaming(
    spec: Corpus, tokenizer: Any, readers: list[sources.Files | sources.Hub], backend: tokenizers.Tokenizer, seed: int
) -> BuiltCorpus:
    first = list(itertools.islice(_texts(readers, spec.column), 2))
    if spec.nsp and len(first) < 2:
        raise _too_few(spec, len(first))
    # Identity without reading everything: names and sizes of what will be read, and how it starts.
    what = [[str(r.size), r.name if isinstance(r, sources.Hub) else ""] for r in readers]
    identity = fingerprint([FORMAT, what, first, spec.model_dump(exclude={"source"}), backend.to_str(), seed])
    stats = dict.fromkeys(("articles", "train_articles", "tokens", "train_tokens", "tokens_per_second"))
    stats |= {"seconds": 0.0, "cached": False, "streaming": True}
    return BuiltCorpus(identity, stats, spec, tokenizer, None, lambda: _texts(readers, spec.column), seed)


def _paths(readers: Iterable[sources.Files | sources.Hub]) -> Iterator[Path]:
    for reader in readers:
        yield from reader.paths if isinstance(reader, sources.Files) else [Path(reader.name + ".hub")]


def _texts(readers: list[sources.Files | sources.Hub], column: str) -> Iterator[str]:
    for reader in readers:
        for text, _ in reader.articles(column):
            if text:
                yield text


def _too_few(spec: Corpus, count: int) -> InputError:
    return InputError(
        f"corpus {spec.source}: {count} article{'s' * (count != 1)}, but next-sentence prediction needs at least 2; "
        "add text, or set corpus.nsp to false"
    )


def is_validation(hashes: np.ndarray | int, share: float) -> Any:
    """Whether an article is held out, by the hash of its text: the same in every order and on every machine."""
    return hashes < int(share * 2**64)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time build `folder`: the ranks of a distributed run all ask for it at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the kernel when a process dies
        yield


def _complete(folder: Path) -> bool:
    if not (folder / "meta.json").exists():
        return False
    meta = read_json(folder / "meta.json")
    wanted = {
        "tokens.bin": meta["tokens"] * np.dtype(meta["dtype"]).itemsize,
        "sentences.bin": (meta["sentences"] + 1) * 8,
        "documents.bin": (meta["articles"] + 1) * 8,
        "hashes.bin": meta["articles"] * 8,
    }
    return all((folder / name).exists() and (folder / name).stat().st_size == size for name, size in wanted.items())


def _tokenize(
    readers: list[sources.Files | sources.Hub], spec: Corpus, tokenizer_json: str, folder: Path, processes: int | None
) -> None:
    start = time.monotonic()
    total = sum(reader.size for reader in readers)
    if processes is None:
        small = total < IN_PROCESS_BYTES and not any(isinstance(reader, sources.Hub) for reader in readers)
        processes = 1 if small else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    unit = 1 if total < 1 << 20 else 1 << 20 if isinstance(readers[0], sources.Files) else 1000
    count = {"articles": 0, "sentences": 0, "tokens": 0}
    read = shown = 0

    def batches() -> Iterator[list[str]]:
        nonlocal read, shown
        batch, characters = [], 0
        for reader in readers:
            for text, consumed in reader.articles(spec.column):
                read += consumed
                if read // unit > shown:
                    advance(read // unit - shown, f"{count['tokens'] / (time.monotonic() - start):,.0f} tokens/s")
                    shown = read // unit
                if text:
                    batch.append(text)
                    characters += len(text)
                if characters >= BATCH_CHARACTERS:
                    yield batch
                    batch, characters = [], 0
        if batch:
            yield batch

    name = "tokenizing" + (" (MiB)" if unit == 1 << 20 else "")
    try:
        with new_folder(folder) as temporary, progress(name, max(total // unit, 1)) as advance:
            with contextlib.ExitStack() as stack:
                files = [stack.enter_context(open(temporary / f"{part}.bin", "wb")) for part in _PARTS]
                files[1].write(np.zeros(1, "<i8"))
                files[2].write(np.zeros(1, "<i8"))
                encoded = stack.enter_context(contextlib.closing(_encode(batches(), tokenizer_json, processes)))
                for part in encoded:
                    files[0].write(part.ids)
                    files[1].write((count["tokens"] + np.cumsum(part.sentences)).astype("<i8"))
                    files[2].write((count["sentences"] + np.cumsum(part.documents)).astype("<i8"))
                    files[3].write(part.hashes.astype("<u8"))
                    count["articles"] += len(part.documents)
                    count["sentences"] += len(part.sentences)
                    count["tokens"] += len(part.ids)
            if not count["tokens"]:
                raise InputError(f"corpus {spec.source}: no usable text in it; check the files and corpus.column")
            if spec.nsp and count["articles"] < 2:
                raise _too_few(spec, count["articles"])
            dtype = id_dtype(tokenizers.Tokenizer.from_str(tokenizer_json)).str
            write_json(temporary / "meta.json", {**count, "dtype": dtype, "seconds": time.monotonic() - start})
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(
            f"{folder.parent}: the disk is full after {count['tokens']:,} tokens; free space, or set PRUNEOFA_CACHE "
            "to a folder on another disk"
        ) from None


_PARTS = ("tokens", "sentences", "documents", "hashes")
_encoder: Encoder | None = None


def _start_worker(tokenizer_json: str) -> None:
    global _encoder
    _encoder = Encoder(tokenizer_json)


def _work(texts: list[str]) -> Encoded:
    assert _encoder is not None
    return _encoder(texts)


def _encode(batches: Iterable[list[str]], tokenizer_json: str, processes: int) -> Iterator[Encoded]:
    """Encode batches in order, at most two per process under way, so memory does not grow with the corpus."""
    if processes <= 1:
        yield from map(Encoder(tokenizer_json), batches)
        return
    # Forking is cheap and needs no importable __main__; workers only use tokenizers, told not to start threads.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, _start_worker, (tokenizer_json,))
    try:
        under_way: collections.deque[concurrent.futures.Future[Encoded]] = collections.deque()
        for batch in batches:
            under_way.append(pool.submit(_work, batch))
            if len(under_way) >= 2 * processes:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def split_articles(hashes: np.ndarray, share: float, nsp: bool) -> dict[str, np.ndarray]:
    """Article numbers of each split, by hash; a corpus too small for that still gets a few of each."""
    held_out = np.asarray(is_validation(hashes, share))
    least = min(2 if nsp else 1, len(hashes) // 2)
    if not least <= held_out.sum() <= len(hashes) - least:
        count = min(max(int(held_out.sum()), least), len(hashes) - least)
        held_out = np.zeros(len(hashes), bool)
        held_out[np.argsort(hashes, kind="stable")[:count]] = True
    return {"train": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out)}


def chunk_targets(spec: Corpus, seed: int) -> Iterator[int]:
    """Length wanted of chunk 0, 1, 2, …: the maximum, or with short_seq_prob a random one from 2 up."""
    longest = spec.max_length - (3 if spec.nsp else 2)
    for block in itertools.count():
        rng = np.random.Generator(np.random.Philox(key=[seed, block]))
        short = rng.random(4096) < spec.short_seq_prob
        yield from np.where(short, rng.integers(2, longest, 4096, endpoint=True), longest).tolist()


def chunk(ends: list[int], begin: int, targets: Iterator[int]) -> Iterator[tuple[int, int, int]]:
    """Cut one article into (first sentence, one after the last, target): sentences until the target is reached.

    Args:
        ends: where each sentence of the article ends, in tokens.
        begin: where the article begins, in tokens.
        targets: the length wanted of each chunk to come, in tokens.
    """
    first = 0
    while first < len(ends):
        target = next(targets)
        start = ends[first - 1] if first else begin
        last = min(bisect.bisect_left(ends, start + target, first) + 1, len(ends))
        yield first, last, target
        first = last


def _chunk_table(folder: Path, spec: Corpus, seed: int) -> Path:
    settings = [spec.max_length, spec.nsp, spec.short_seq_prob, spec.validation, seed]
    target = folder / f"chunks-{fingerprint(settings)[:16]}"
    if (target / "meta.json").exists():
        return target
    hashes = _mapped(folder / "hashes.bin", np.dtype("<u8"))
    documents = _mapped(folder / "documents.bin", np.dtype("<i8"))
    bounds = _mapped(folder / "sentences.bin", np.dtype("<i8"))
    meta: dict[str, int] = {}
    with new_folder(target) as temporary:
        for split, articles in split_articles(hashes, spec.validation, spec.nsp).items():
            targets = chunk_targets(spec, seed)
            examples = tokens = 0
            with (
                open(temporary / f"{split}-spans.bin", "wb") as spans,
                open(temporary / f"{split}-targets.bin", "wb") as lengths,
            ):
                for article in articles.tolist():
                    low, high = int(documents[article]), int(documents[article + 1])
                    begin, *ends = bounds[low : high + 1].tolist()
                    rows = np.array(list(chunk(ends, begin, targets)), np.int64)
                    spans.write((rows[:, :2] + low).astype("<i8"))
                    lengths.write(rows[:, 2].astype("<u2"))
                    examples += len(rows)
                    tokens += ends[-1] - begin
            articles.astype("<i8").tofile(temporary / f"{split}-articles.bin")
            meta |= {f"{split}_articles": len(articles), f"{split}_examples": examples, f"{split}_tokens": tokens}
        write_json(temporary / "meta.json", meta)
    return target
