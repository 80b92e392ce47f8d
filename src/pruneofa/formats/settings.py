"""The files of a model other than its weights: configuration, tokenizer, sentence-transformers settings."""

import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from pruneofa import families
from pruneofa.errors import InputError
from pruneofa.formats import sentence
from pruneofa.formats.files import is_there, read_optional
from pruneofa.formats.hub import check_inside
from pruneofa.formats.tokenizer_file import load_tokenizer
from pruneofa.formats.tokenizer_settings import check_same_settings

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "vocab.txt", "vocab.json", "merges.txt")  # fmt: skip


def copy_settings(source: Path, target: Path) -> None:
    """Copy the files of configuration and tokenizer, and those of `copy_sentence`. Raises InputError as it does."""
    _copy(("config.json", *_TOKENIZER), source, target)
    copy_sentence(source, target)


def copy_sentence(source: Path, target: Path) -> None:
    """Copy the settings of sentence-transformers.

    Raises InputError for an unknown module, and for a link that leads out of the folder.
    """
    for module in sentence.read_modules(source):
        if module.path and (source / module.path).is_dir():
            (target / module.path).mkdir(exist_ok=True)
    _copy(sentence_files(source), source, target)


def sentence_files(folder: Path) -> list[str]:
    """Names of the settings of sentence-transformers in `folder`. Raises InputError for an unknown module."""
    modules = [f"{module.path}/config.json" for module in sentence.read_modules(folder) if module.path]
    return [name for name in (*sentence.FILES, *modules) if is_there(folder / name)]


def _copy(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        if is_there(source / name):
            check_inside(source / name, source)
            shutil.copyfile(source / name, target / name)


def read_tokenizer(folder: Path, rows: int) -> Tokenizer:
    """The tokenizer.json of a folder whose model has this number of word embeddings.

    Raises InputError if it is missing or not usable, gives an id without a word embedding, or is not the tokenizer that
    tokenizer_config.json describes, as `check_same_settings` does.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(without_tokenizer(folder))
    tokenizer = load_tokenizer(file)
    check_same_settings(tokenizer, folder)
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values(), default=0)
    if largest >= rows:
        raise InputError(
            f"{file}: {len(vocabulary)} tokens with ids up to {largest}, but the model has {rows} word embeddings, "
            "wanted one for every id: tokens were added and the embeddings not resized, or the file belongs to another "
            "model; call model.resize_token_embeddings(len(tokenizer)) and save both, or copy the tokenizer files of "
            "the model it was made from"
        )
    return tokenizer


def without_tokenizer(folder: Path) -> str:
    """The error message for a folder without tokenizer.json.

    transformers can convert the files of a slow tokenizer, but without them it creates a vocabulary of a few tokens.
    """
    known = {}
    for name in ("config.json", "tokenizer_config.json"):
        known |= read_optional(folder / name)
    slow = families.tokenizer_files(str(known.get("tokenizer_class") or known.get("model_type")))
    what = f"{folder}: no tokenizer.json in it, which the engine needs"
    if all((folder / name).is_file() for name in slow):
        return (
            f'{what}; write it with: python -c "import sys; from transformers import AutoTokenizer; '
            'AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False).save_pretrained(sys.argv[1])" '
            f"{shlex.quote(str(folder))}"
        )
    return (
        f"{what}, nor {' and '.join(slow)} to make it from; copy tokenizer.json and tokenizer_config.json into it from "
        "the original model"
    )
