"""Articles to token ids: sentence by sentence, in this process or in many, in bounded memory."""

import collections
import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import tokenizers

# Tokens; longer ones (lists, code) are cut at a word. An example ends with a whole sentence and is then truncated to
# max_length, so this bounds what is lost of its last one.
LONGEST_SENTENCE = 120

# A sentence ends after . ! ? … (and closing quotes or brackets) before white space, after CJK full stops, and at
# a line break. `sentences` takes back an end that an abbreviation, an initial or a lower-case letter contradicts,
# except at a blank line. Every alternative is linear in the text: a megabyte of dots or blanks is no trap.
_END = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*(\s+)|(?<=[。！？])[”’」』）]*(?![。！？])()|(\n\s*)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'“])(?:[A-Za-z]|[A-Za-z]\.[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Gen|Col|Capt|Lt|Sgt|Rev|Hon|Gov|Sen"
    r"|Rep|No|Nos|vs|etc|cf|ca|al|approx|est|fl|Fig|Eq|Vol|pp|Inc|Ltd|Co|Corp|Bros|Mt|Ft)\.$"
)


RULES = [LONGEST_SENTENCE, _END.pattern, _ABBREVIATION.pattern]  # part of the cache's identity


def sentences(text: str) -> list[str]:
    """Split `text` into sentences, white space inside them collapsed to single blanks."""
    found, start = [], 0
    for match in _END.finditer(text):
        stop, space = match.end(), match[match.lastindex or 0]
        if space and space.count("\n") < 2:
            if text[stop : stop + 1].islower():
                continue  # "e.g. this", or a line that was wrapped in mid-sentence
            before = text[max(start, match.start() - 12) : match.start(match.lastindex or 0)]
            if "\n" not in space and _ABBREVIATION.search(before):
                continue
        found.append(text[start:stop])
        start = stop
    found.append(text[start:])
    return [" ".join(part.split()) for part in found if part and not part.isspace()]


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
        # Byte-level vocabularies mark the start of a word by the preceding blank, which splitting removed.
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


_encoder: Encoder | None = None


def _start_worker(tokenizer_json: str) -> None:
    global _encoder
    _encoder = Encoder(tokenizer_json)


def _encode_in_worker(texts: list[str]) -> Encoded:
    assert _encoder is not None
    return _encoder(texts)


def encode_batches(batches: Iterable[list[str]], tokenizer_json: str, processes: int) -> Generator[Encoded]:
    """Encode batches in order, at most two per process at a time, so memory does not grow with the corpus."""
    if processes <= 1:
        yield from map(Encoder(tokenizer_json), batches)
        return
    # Forking is cheap and needs no importable __main__; workers only use tokenizers, whose threads are switched off.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, _start_worker, (tokenizer_json,))
    try:
        in_progress: collections.deque[concurrent.futures.Future[Encoded]] = collections.deque()
        for batch in batches:
            in_progress.append(pool.submit(_encode_in_worker, batch))
            if len(in_progress) >= 2 * processes:
                yield in_progress.popleft().result()
        while in_progress:
            yield in_progress.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
