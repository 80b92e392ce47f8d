"""Text to token sequences: checks, the tokenizer of a folder, truncation, windows over long contexts.

Objects are immutable after loading, so that any number of threads may tokenize at once. Truncation and padding, which
the tokenizers library keeps as state, are therefore switched off there; truncation is implemented here.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Sequenced

from pruneofa.errors import InputError, short
from pruneofa.formats.files import read_optional
from pruneofa.formats.sentence import Sentence, max_length
from pruneofa.formats.settings import read_tokenizer
from pruneofa.formats.tokenizer_file import explained
from pruneofa.formats.tokenizer_settings import gives_types

WINDOW, STRIDE = 384, 128  # tokens, for question answering, as in the official SQuAD script
CHARACTERS = 128  # per token of the longest sequence: what is beyond is not tokenized; a longer word is unknown anyway
_SLICE = 1024  # texts per call of the tokenizer
MAX_CONTEXT = 1 << 20  # characters of a context of question answering, which is read in windows
MIN_CONTEXT = 16  # minimum number of context tokens per window; a question that leaves fewer is too long
MAX_WINDOWS = 4096  # of a text: more than MAX_CONTEXT takes, unless a long question leaves each but a few tokens
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which is not valid text

Text = str | tuple[str, str]
Side = Literal["left", "right"]  # the end of a text at which it is cut


@dataclass(frozen=True)
class Tokens:
    """One sequence for the encoder.

    Attributes:
        ids: (tokens,) int32.
        types: (tokens,) int32, 0 where the model has no token types.
        segments: (tokens,) int8: 0 first text, 1 second text, -1 special token; None if not requested.
        chars: (tokens, 2) int32, begin and end of each token in its text; None if not requested.
        text: for a window of question answering, the index of its text in the batch.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    segments: NDArray[np.int8] | None = None
    chars: NDArray[np.int32] | None = None
    text: int = 0

    def keep(self, kept: NDArray[np.bool_] | NDArray[np.intp]) -> "Tokens":
        """The tokens that a mask, (tokens,) bool, or an array of indices selects."""
        segments, chars = self.segments, self.chars
        return Tokens(
            self.ids[kept],
            self.types[kept],
            None if segments is None else segments[kept],
            None if chars is None else chars[kept],
            self.text,
        )


class TextTokenizer:
    """The tokenizer.json of a folder.

    Attributes:
        mask_id: id of the mask token, None without one.
        limit: maximum number of tokens of a sequence, including special tokens.
        side: the end at which a text that is too long is cut, if the caller does not say.
        prompts: texts to put before an input, by name.
        folder: where it was read.
    """

    def __init__(
        self, folder: Path, *, vocabulary: int, types: int, limit: int, sentence: Sentence | None = None
    ) -> None:
        """Read the tokenizer of a folder.

        Args:
            folder: contains tokenizer.json and optionally tokenizer_config.json and special_tokens_map.json.
            vocabulary: number of rows of the word embeddings.
            types: number of token types of the model; with fewer than two all types are 0.
            limit: maximum number of tokens of a sequence, including special tokens; the folder may state less.
            sentence: the settings of a sentence-transformers folder.

        Raises:
            InputError: tokenizer.json is missing, not usable, has an id without a word embedding, or contradicts
                tokenizer_config.json.
        """
        self._file, self._vocabulary, self._types = folder / "tokenizer.json", vocabulary, types
        self._tokenizer = read_tokenizer(folder, vocabulary)
        direction = (self._tokenizer.truncation or {}).get("direction", "right")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if sentence is not None and sentence.do_lower_case:
            # unlike str.lower, this does not change special tokens in the text
            own = self._tokenizer.normalizer
            self._tokenizer.normalizer = Sequenced([Lowercase(), *([own] if own else [])])
        self._prompt = sentence.prompt if sentence else ""
        self.prompts = dict(sentence.prompts) if sentence else {}
        for text in filter(None, (self._prompt, *self.prompts.values())):
            check_text(text, f"{folder}: the prompt")
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            config |= read_optional(folder / name)
        names, side = config.get("model_input_names"), config.get("truncation_side", direction)
        if names and not isinstance(names, list):
            raise InputError(
                f"{folder}: model_input_names is {short(names)} in tokenizer_config.json, wanted a list; correct it"
            )
        if side not in ("left", "right"):
            raise InputError(
                f"{folder}: truncation_side is {short(side)} in tokenizer_config.json, wanted left or right; correct it"
            )
        self._typed = types > 1 and gives_types(names, config.get("tokenizer_class"))
        self.side: Side = side
        most = sentence.max_seq_length if sentence else max_length(folder)
        self.limit = limit if most is None else min(limit, most)
        self.folder = folder
        self.mask_id = self._mask_id(config.get("mask_token"))

    def _mask_id(self, named: Any) -> int | None:
        name = named.get("content") if isinstance(named, dict) else named  # added tokens are JSON objects
        names = [
            token for token in (name, "[MASK]", "<mask>") if isinstance(token, str) and not _SURROGATE.search(token)
        ]
        found = [self._tokenizer.token_to_id(token) for token in names]
        return next((index for index in found if index is not None), None)

    def token(self, index: int) -> str:
        """The text of one token."""
        return self._tokenizer.decode([index], skip_special_tokens=False)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids; an id outside the vocabulary gives nothing."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def encoding(self, text: str, *, add_special_tokens: bool, prompt: str | None = None) -> tuple[str, Any]:
        """A text after its prompt, and its `tokenizers.Encoding`; `prompt` None: the folder's own."""
        whole = (self._prompt if prompt is None else prompt) + text
        return whole, self._tokenizer.encode(whole, add_special_tokens=add_special_tokens)

    def continues_word(self, tokens: Tokens, text: str) -> NDArray[np.bool_]:
        """Whether each token of one text continues the word of the token before it, (tokens,) bool.

        A tokenizer that marks such tokens (WordPiece) says so itself; otherwise what follows no space continues.
        """
        assert tokens.chars is not None
        prefix = getattr(self._tokenizer.model, "continuing_subword_prefix", None)
        if prefix:
            pieces = (self._tokenizer.id_to_token(int(index)) or "" for index in tokens.ids)
            return np.array([piece.startswith(prefix) for piece in pieces], bool)
        starts = tokens.chars[:, 0]
        # In some vocabularies a token begins with the space before its word.
        return np.array([i > 0 and not (text[i - 1].isspace() or text[i : i + 1].isspace()) for i in starts], bool)

    def sequences(
        self,
        texts: Sequence[Text],
        names: Sequence[str],
        *,
        truncate: bool,
        chars: bool = False,
        side: Side | None = None,
        prompt: str | None = None,
    ) -> list[Tokens]:
        """Tokens of each text or pair, special tokens added.

        Args:
            texts: texts or pairs, already checked by `check_text`.
            names: the caller's name of each text, for error messages.
            truncate: truncate sequences that are too long, the longer text of a pair first; otherwise an error.
            chars: fill in `segments` and `chars`.
            side: the end at which a text that is too long is truncated; None: as the folder says.
            prompt: text to put before each, instead of the folder's own.

        Raises:
            InputError: a text is too long or has no tokens, or the tokenizer is not the model's.
        """
        most, side = CHARACTERS * self.limit, side or self.side
        prompted = [
            self._prompted(_bounded(text, (most, most), name, truncate, side), prompt)
            for text, name in zip(texts, names, strict=True)
        ]
        encode = self._tokenizer.encode_batch if chars else self._tokenizer.encode_batch_fast  # fast: without offsets
        encodings = self._encoded(encode, prompted)
        result = []
        for name, encoding in zip(names, encodings, strict=True):
            tokens = self._tokens(encoding, chars=chars)
            if not len(tokens.ids):
                raise InputError(f"{name} has no tokens, such as blank text; wanted at least one; omit it")
            if (got := len(tokens.ids)) > self.limit:
                if not truncate:
                    raise InputError(
                        f"{name} has {got} tokens, the model takes at most {self.limit}; "
                        "shorten it, or pass truncate=True"
                    )
                tokens = _truncated(self._tokens(encoding, chars=chars, segments=True), self.limit, side)
                if len(tokens.ids) > self.limit:
                    raise InputError(
                        f"{self._file}: adds {len(tokens.ids)} special tokens to a text, the model takes at most "
                        f"{self.limit} tokens; copy the tokenizer files of the model it was made from"
                    )
            result.append(tokens)
        return result

    def windows(self, questions: Sequence[tuple[str, str]], names: Sequence[str], *, truncate: bool) -> list[Tokens]:
        """Every (question, context) in as many windows as its context needs, each sharing STRIDE tokens with the next.

        Returns:
            The windows in order, each with the index of its question.

        Raises:
            InputError: a question leaves no room for its context or a context is longer than MAX_CONTEXT (`truncate`
                cuts both), or a context has no tokens, or takes more than MAX_WINDOWS.
        """
        most = CHARACTERS * self.limit, MAX_CONTEXT
        cut = [_bounded(pair, most, name, truncate) for pair, name in zip(questions, names, strict=True)]
        encodings = self._encoded(self._tokenizer.encode_batch, cut)
        windows: list[Tokens] = []
        for index, encoding in enumerate(encodings):
            tokens = self._tokens(encoding, chars=True)
            found = _windows(tokens, min(WINDOW, self.limit), truncate=truncate, where=names[index])
            windows += [replace(window, text=index) for window in found]
        return windows

    def text_windows(self, texts: Sequence[str], names: Sequence[str]) -> list[Tokens]:
        """Every text in as many windows of the model's length as it needs, each sharing tokens with the next.

        Returns:
            The windows in order, with `segments` and `chars`, each with the index of its text.

        Raises:
            InputError: a text takes more than MAX_WINDOWS.
        """
        windows: list[Tokens] = []
        encodings = self._encoded(self._tokenizer.encode_batch, texts)
        for index, encoding in enumerate(encodings):
            tokens = self._tokens(encoding, chars=True)
            found = _cut(tokens, 0, self.limit, names[index]) if len(tokens.ids) > self.limit else [tokens]
            windows += [replace(window, text=index) for window in found]
        return windows

    def _encoded(self, encode: Callable[[list[Any]], list[Any]], texts: Sequence[Any]) -> list[Any]:
        """Encodings of many texts, some at a time: only between two calls can Python handle signals."""
        encodings: list[Any] = []
        with explained(self._file):
            for begin in range(0, len(texts), _SLICE):
                encodings += encode(list(texts[begin : begin + _SLICE]))
        return encodings

    def _prompted(self, text: Text, prompt: str | None) -> Text:
        before = self._prompt if prompt is None else prompt
        if not before:
            return text
        return before + text if isinstance(text, str) else (before + text[0], text[1])

    def _tokens(self, encoding: Any, *, chars: bool, segments: bool = False) -> Tokens:
        ids = encoding.ids
        types = encoding.type_ids if self._typed else [0] * len(ids)
        largest, kind = max(ids, default=0), max(types, default=0)
        if largest >= self._vocabulary or kind >= max(self._types, 1):
            raise InputError(
                f"{self._file}: gives token {largest} of type {kind}, the model has {self._vocabulary} tokens of "
                f"{self._types} types; copy the tokenizer files of the model it was made from"
            )
        owner = [-1 if segment is None else segment for segment in encoding.sequence_ids] if chars or segments else None
        return Tokens(
            np.array(ids, np.int32),
            np.array(types, np.int32),
            None if owner is None else np.array(owner, np.int8),
            np.array(encoding.offsets, np.int32).reshape(-1, 2) if chars else None,
        )


def check_text(value: Any, where: str) -> str:
    """`value` if it is text that can be tokenized; `where` names it in error messages.

    Raises:
        InputError: it is not a str, is empty, or contains NUL or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise InputError(f"{where} is {type(value).__name__}, wanted a str")
    if not value:
        raise InputError(f"{where} is an empty string, wanted text; omit it")
    if (index := value.find("\0")) >= 0:
        raise InputError(f"{where} has a NUL character at {index}, wanted text; remove it, or decode the bytes again")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} has a lone surrogate U+{ord(value[error.start]):04X} at {error.start}, wanted valid Unicode; "
            "decode the bytes again, without errors='surrogateescape'"
        ) from None
    return str(value)


def overlap(room: int) -> int:
    """Tokens that consecutive windows share where each has `room` tokens of a long text."""
    return min(STRIDE, room // 2)


def window_count(tokens: int, room: int) -> int:
    """How many windows a text of so many tokens takes, where each has `room` of them."""
    return 1 + max(0, math.ceil((tokens - room) / (room - overlap(room))))


def _bounded(text: Text, most: tuple[int, int], name: str, truncate: bool, side: Side = "right") -> Any:
    """`text`, its parts cut at one side to `most` characters each if `truncate`. Raises InputError otherwise."""
    parts = (text,) if isinstance(text, str) else text
    for part, limit in zip(parts, most, strict=False):
        if len(part) > limit and not truncate:
            raise InputError(
                f"{name} has {len(part)} characters, wanted at most {limit}, more than the model can use; "
                "shorten it, or pass truncate=True"
            )
    cut = [part[:limit] if side == "right" else part[-limit:] for part, limit in zip(parts, most, strict=False)]
    return cut[0] if isinstance(text, str) else tuple(cut)


def _truncated(tokens: Tokens, limit: int, side: Side = "right") -> Tokens:
    """Cut both texts at one side, the longer one first, until `limit` tokens remain; special tokens stay."""
    assert tokens.segments is not None
    lengths = [int(np.count_nonzero(tokens.segments == segment)) for segment in (0, 1)]
    room = limit - (len(tokens.ids) - sum(lengths))
    shorter = min(min(lengths), room // 2)
    keep = [shorter, room - shorter] if lengths[0] <= lengths[1] else [room - shorter, shorter]
    return tokens.keep(
        _kept(tokens.segments, 0, keep[0], side) | _kept(tokens.segments, 1, keep[1], side) | (tokens.segments < 0)
    )


def _kept(segments: NDArray[np.int8], segment: Literal[0, 1], count: int, side: Side) -> NDArray[np.bool_]:
    """True at the first `count` tokens of a segment; at its last ones if it is cut at its left side."""
    inside = segments == segment
    if side == "left":
        return inside & (np.cumsum(inside[::-1])[::-1] <= count)
    return inside & (np.cumsum(inside) <= count)


def _windows(tokens: Tokens, length: int, *, truncate: bool, where: str) -> list[Tokens]:
    """Cut the second text of a pair so that each window has the first text, special tokens and a part of it."""
    assert tokens.segments is not None
    context = np.flatnonzero(tokens.segments == 1)
    if not len(context):
        raise InputError(f"{where}: the context has no tokens, wanted text that can contain an answer")
    room = length - (len(tokens.ids) - len(context))
    if room < MIN_CONTEXT and room < len(context):
        question = int(np.count_nonzero(tokens.segments == 0))
        most = question + room - MIN_CONTEXT
        if not truncate or most < 1:
            raise InputError(
                f"{where}: the question has {question} tokens, wanted at most {max(most, 0)} beside a context in a "
                f"window of {length}; shorten it, or pass truncate=True"
            )
        tokens = tokens.keep((tokens.segments != 0) | _kept(tokens.segments, 0, most, "right"))
        return _windows(tokens, length, truncate=False, where=where)
    return _cut(tokens, 1, length, where)


def _cut(tokens: Tokens, segment: int, length: int, where: str) -> list[Tokens]:
    """Windows of at most `length` tokens, each with a part of one segment and with everything else."""
    inside = np.flatnonzero(tokens.segments == segment)
    room = length - (len(tokens.ids) - len(inside))
    if room < 1:
        raise InputError(
            f"{where}: no window of {length} tokens, which the model takes, has room beside {length - room} special "
            "tokens; copy the tokenizer files of the model it was made from"
        )
    step = room - overlap(room)
    if (count := window_count(len(inside), room)) > MAX_WINDOWS:
        raise InputError(f"{where}: takes {count} windows of {room} tokens, wanted at most {MAX_WINDOWS}; divide it")
    before, after = np.arange(inside[0]), np.arange(inside[-1] + 1, len(tokens.ids))
    windows = []
    for begin in range(0, len(inside), step):
        windows.append(tokens.keep(np.concatenate([before, inside[begin : begin + room], after])))
        if begin + room >= len(inside):
            break
    return windows
