"""Docstrings of Python sources → prose: sentences without code, headings, signatures and markup."""

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a source file, outermost first; nothing when it is not Python that parses here."""
    try:
        with warnings.catch_warnings():  # invalid escapes in the strings of these sources
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return
    # statements only: walking expressions too takes three times as long and finds nothing more
    pending: list[Any] = [tree]
    while pending:
        node = pending.pop()
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield inspect.cleandoc(text)
        pending += [child for part in (body, getattr(node, "orelse", [])) for child in reversed(part)]


_BREAKS = re.compile(
    r"^(?:[-*+] |\d+[.)] |:\w[^:]*: ?|\*{0,2}`{0,2}[\w.*]+`{0,2}(?: ?\([^)]*\))? ?(?:: |-- ))(?P<rest>.*)$"
)
_UNDERLINE = re.compile(r"^([-=~^*\"'#+.`])\1{2,}$")
_MARKUP = (
    (re.compile(r":[\w:+-]+:`~?([^`<]*?)(?: *<[^>]*>)?`"), r"\1"),  # :class:`~a.B`
    (re.compile(r"`([^`<>]+) <[^>]*>`_+"), r"\1"),  # `text <link>`_
    (re.compile(r"!?\[([^\]]*)\]\([^)]*\)"), r"\1"),  # [text](link)
    (re.compile(r"\[(`[^`]*`)\]"), r"\1"),  # [`Name`]
    (re.compile(r"\|[A-Z]\w*\||\[\d+\]_|<[^>]{1,40}>"), " "),  # |Name|, [1]_, <tag>
    (re.compile(r"[`*]+|\\\\?"), ""),
    (re.compile(r"\s+"), " "),
)
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<! vs\.)(?<! cf\.)(?<!etc\.) +(?=[A-Z\"'(])")


def prose(docstring: str) -> list[list[str]]:
    """The paragraphs of a docstring as lists of sentences.

    Doctests, code blocks, headings, directives, tables and signatures are removed; descriptions of parameters are kept.
    """
    paragraphs = (_sentences(" ".join(lines)) for lines in _paragraphs(docstring))
    return [sentences for sentences in paragraphs if sentences]


def _paragraphs(docstring: str) -> Iterator[list[str]]:
    block: list[str] = []
    indent = 0
    code: int | None = None  # indentation of the line that announced a code block
    fenced = doctest = False
    for line in [*docstring.splitlines(), ""]:
        text = line.strip()
        here = len(line) - len(line.lstrip())
        if text.startswith("```"):
            fenced = not fenced
            text = ""
        doctest = bool(text) and (doctest or text.startswith(">>>"))
        if code is not None and text and here <= code:
            code = None
        if fenced or doctest or code is not None or _UNDERLINE.match(text) or text.startswith(".. "):
            if _UNDERLINE.match(text):
                block = []  # the line above was a heading
            code = here if text.startswith((".. code", ".. math", ".. plot", ".. image")) else code
            text = ""
        found = _BREAKS.match(text)
        if block and (not text or found or here != indent):
            yield block
            block = []
        if text:
            block.append(found["rest"] if found else text)
            indent = here
        if text.endswith("::"):
            code = here


def _sentences(paragraph: str) -> list[str]:
    for pattern, replacement in _MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    return [s for s in _SENTENCE_END.split(paragraph.strip()) if _is_prose(s)]


def _is_prose(sentence: str) -> bool:
    if not (sentence[:1].isupper() and sentence.endswith((".", "!", "?")) and len(sentence) < 600):
        return False
    words = sentence.split()
    plain = sum(word.strip(".,;:()'\"!?").isalpha() for word in words)
    return len(words) >= 3 and plain >= 0.7 * len(words)
