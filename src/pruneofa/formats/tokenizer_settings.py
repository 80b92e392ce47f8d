"""Whether tokenizer_config.json describes the tokenizer that is in tokenizer.json.

The engine reads tokenizer.json. transformers takes only the vocabulary from it and builds the rest anew by
tokenizer_config.json, unless that names a class that has no rules of its own.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pruneofa import families
from pruneofa.errors import InputError, short
from pruneofa.formats.files import read_optional

CONFIG = "tokenizer_config.json"
SAVE_AGAIN = "load the tokenizer in transformers and save it again with save_pretrained"
_AS_IT_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # for these transformers reads tokenizer.json too


# What the classes of `families`, WordPiece and byte-level BPE, take for a key that tokenizer_config.json does not have.
_DEFAULTS = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True, "add_prefix_space": False}


def gives_types(names: Any, tokenizer_class: Any) -> bool:
    """Whether a tokenizer gives token types, by what tokenizer_config.json states; None: it does not.

    Without model_input_names a class of `families` does as in transformers, any other gives them.
    """
    if names:
        return "token_type_ids" in names
    family = families.by_tokenizer(tokenizer_class)
    return family is None or family.tokenizer_types


def check_same_settings(tokenizer: Tokenizer, folder: Path) -> None:
    """Compare what tokenizer.json, read as `tokenizer`, and tokenizer_config.json both say; the latter may be missing.

    Raises InputError for another do_lower_case, strip_accents, tokenize_chinese_chars or add_prefix_space, stated or by
    default of the class in tokenizer_config.json, and if only that class adds special tokens to a text.
    """
    config = read_optional(folder / CONFIG)
    name = config.get("tokenizer_class")
    if name in _AS_IT_IS:
        return
    defaults = {} if families.by_tokenizer(name) is None else _DEFAULTS
    for key, got, wanted in _stated_twice(tokenizer, defaults | config):
        if got != wanted:
            raise InputError(
                f"{folder}: {key} is {json.dumps(got)} in tokenizer.json, which the engine reads, and "
                f"{json.dumps(wanted)} in {CONFIG}, which transformers follows, wanted the same; {SAVE_AGAIN}"
            )
    ours = isinstance(name, str) and any(model_type in name.lower() for model_type in families.model_types())
    if ours and tokenizer.post_processor is None:
        raise InputError(
            f"{folder}: tokenizer.json has no post_processor, so the engine adds no special tokens to a text, wanted "
            f"those of {short(name)} in {CONFIG}, which transformers adds; {SAVE_AGAIN}"
        )


def _stated_twice(tokenizer: Tokenizer, config: dict[str, Any]) -> list[tuple[str, bool, bool]]:
    """(key of tokenizer_config.json, value in tokenizer.json, value there) of what both say."""
    found: list[tuple[str, Any, Any]] = []
    for part in (*_parts(tokenizer.normalizer), *_parts(tokenizer.pre_tokenizer)):
        if "lowercase" in part and "strip_accents" in part:  # the normalizer of WordPiece tokenizers
            lower, strip = part["lowercase"], part["strip_accents"]
            found.append(("do_lower_case", lower, config.get("do_lower_case")))
            chinese = part.get("handle_chinese_chars", True), config.get("tokenize_chinese_chars")
            found.append(("tokenize_chinese_chars", *chinese))
            if "strip_accents" in config:  # null: as do_lower_case
                stated = config["strip_accents"]
                wanted = config.get("do_lower_case", lower) if stated is None else stated
                found.append(("strip_accents", lower if strip is None else strip, wanted))
        elif part.get("type") == "Lowercase":
            found.append(("do_lower_case", True, config.get("do_lower_case")))
        elif part.get("type") == "ByteLevel":
            found.append(("add_prefix_space", part["add_prefix_space"], config.get("add_prefix_space")))
    return [(key, got, wanted) for key, got, wanted in found if isinstance(wanted, bool)]


def _parts(component: Any) -> list[dict[str, Any]]:
    """The JSON object of a normalizer or pre-tokenizer, and those of a sequence."""
    if component is None:
        return []
    stated = json.loads(component.__getstate__())
    return [stated, *stated.get("normalizers", ()), *stated.get("pretokenizers", ())]
