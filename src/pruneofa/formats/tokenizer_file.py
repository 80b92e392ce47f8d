"""Load tokenizer.json, whose author is not trusted: limits on its size and on what its components may do.

The tokenizers library runs what the file describes: a replacement can multiply a text, and a table can state any size.
It also panics on files that contradict themselves. Both become an InputError here.
"""

import base64
import binascii
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pruneofa.errors import InputError, first_line, is_panic
from pruneofa.formats.files import read_bytes

MAX_BYTES = 64 << 20  # a vocabulary of 250,000 tokens takes 17 MB
MAX_COMPONENTS = 256  # normalizers, pre-tokenizers and the like, counted together
MAX_DEPTH = 16  # of components within components
MAX_PATTERN = 1000  # characters of a regular expression
MAX_GROWTH = 256  # times as long as the text that replacements may make it
MAX_PREFIX = 64  # characters that a component may put before a text
MAX_SPECIAL = 256  # tokens that a template may put around a text
_COMPONENTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_AGAIN = "copy the file of the original model"


def load_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of a regular file. Raises InputError if it is beyond the limits above, or not usable."""
    raw = read_limited(file)
    with explained(file):
        return Tokenizer.from_buffer(raw)


def read_limited(file: Path) -> bytes:
    """The content of a tokenizer.json. Raises InputError if it is beyond the limits above."""
    raw = read_bytes(file, MAX_BYTES, _AGAIN)
    _check(raw, file)
    return raw


@contextlib.contextmanager
def explained(file: Path) -> Iterator[None]:
    """Turn the errors of the tokenizers library, panics included, into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise InputError(f"{file}: not a usable tokenizer ({first_line(error)}); {_AGAIN}") from None


def _check(raw: bytes, file: Path) -> None:
    try:
        stated = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a usable tokenizer ({first_line(error)}); {_AGAIN}") from None
    if not isinstance(stated, dict):
        raise InputError(f"{file}: wanted a JSON object, got {type(stated).__name__}; {_AGAIN}")

    def want(good: bool, what: str, got: object, wanted: str) -> None:
        if not good:
            raise InputError(f"{file}: {what} of {got}; wanted {wanted}; {_AGAIN}")

    growth = 1
    for count, component in enumerate(_components([stated.get(name) for name in _COMPONENTS], file), 1):
        want(count <= MAX_COMPONENTS, "a number", f"over {MAX_COMPONENTS} components", "fewer")
        pattern = component.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(regex, str):
            want(len(regex) <= MAX_PATTERN, "a pattern", f"{len(regex)} characters", f"at most {MAX_PATTERN}")
        content = component.get("content")
        if component.get("type") == "Replace" and isinstance(content, str):
            growth *= 1 + len(content)  # an expression that matches nothing is replaced between all characters
            want(growth <= MAX_GROWTH, "replacements", f"a growth of {growth} times", f"at most {MAX_GROWTH}")
        prefix = component.get("prepend")
        if isinstance(prefix, str):
            want(len(prefix) <= MAX_PREFIX, "a prefix", f"{len(prefix)} characters", f"at most {MAX_PREFIX}")
        if isinstance(table := component.get("precompiled_charsmap"), str):
            want(_holds(table), "a character map", "another size than it states, or long replacements", "another one")
        if component.get("type") == "TemplateProcessing":
            special = max(_special_tokens(component, name) for name in ("single", "pair"))
            want(special <= MAX_SPECIAL, "a template", f"{special} special tokens", f"at most {MAX_SPECIAL}")


def _components(nested: Any, file: Path) -> Iterator[dict[str, Any]]:
    """Every JSON object within `nested`. Raises InputError if they are nested too deeply."""
    level = [nested]
    for _ in range(MAX_DEPTH):
        level = [item for value in level for item in _inner(value)]
        yield from (value for value in level if isinstance(value, dict))
        if not level:
            return
    raise InputError(f"{file}: components of more than {MAX_DEPTH} levels; {_AGAIN}")


def _inner(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _holds(table: str) -> bool:
    """Whether a map of SentencePiece is as long as it states, and no replacement is too long.

    The library allocates what is stated for the trie; behind it are the replacements, each up to a NUL.
    """
    try:
        raw = base64.b64decode(table, validate=True)
    except (ValueError, binascii.Error):
        return False
    trie = int.from_bytes(raw[:4], "little")
    if len(raw) < 4 or trie > len(raw) - 4:
        return False
    return max(map(len, raw[4 + trie :].split(b"\0"))) <= MAX_GROWTH


def _special_tokens(template: dict[str, Any], name: str) -> int:
    """How many token ids the special tokens of a template's single or pair have together."""
    stated, pieces = template.get("special_tokens"), template.get(name)
    if not isinstance(stated, dict) or not isinstance(pieces, list):
        return 0
    count = 0
    for piece in pieces:
        token = piece.get("SpecialToken") if isinstance(piece, dict) else None
        entry = stated.get(str(token.get("id"))) if isinstance(token, dict) else None
        ids = entry.get("ids") if isinstance(entry, dict) else None
        count += len(ids) if isinstance(ids, list) else 0
    return count
