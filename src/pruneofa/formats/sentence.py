"""The settings of a sentence-transformers folder: truncation, pooling and prompts."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pruneofa.errors import InputError, short
from pruneofa.formats.files import is_there, read_json, read_json_list, read_optional

Pooling = Literal["cls", "mean", "max"]
Activation = Literal["Identity", "Sigmoid"]

MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
# The first that is there and not empty counts, as in sentence-transformers, which has written all of these names.
TEXTS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
FILES = (MODULES, PROMPTS, *TEXTS)
LIBRARY, KINDS = "sentence_transformers", ("Transformer", "Pooling", "Normalize")
MAX_SETTINGS = 1 << 16  # bytes of one of these files
_ELSEWHERE = "run this model with sentence-transformers"
_OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, Activation] = {
    "torch.nn.modules.linear.Identity": "Identity",
    "torch.nn.Identity": "Identity",
    "torch.nn.modules.activation.Sigmoid": "Sigmoid",
    "torch.nn.Sigmoid": "Sigmoid",
}


# Keys of the files TEXTS beside max_seq_length and do_lower_case. Those in _HARMLESS change no result, whatever they
# say; in the objects of arguments only the keys in _ARGUMENTS do not.
_HARMLESS = ("max_seq_length", "do_lower_case", "unpad_inputs", "cache_dir", "backend")
_OBJECTS = ("model_args", "model_kwargs", "config_args", "config_kwargs", "tokenizer_args", "processor_kwargs")
_ARGUMENTS = {
    "trust_remote_code", "add_pooling_layer", "attn_implementation", "torch_dtype", "dtype", "use_cache", "use_fast",
    "low_cpu_mem_usage", "device_map",
}  # fmt: skip
_TEXT = [{"method": "forward", "method_output_name": output} for output in ("last_hidden_state", "logits")]


@dataclass(frozen=True)
class Module:
    """One step of a sentence-transformers model: its kind, one of KINDS, and the folder of its settings."""

    kind: str
    path: str


@dataclass(frozen=True)
class Sentence:
    """The settings that turn a text into one vector.

    Attributes:
        pooling: how the hidden states of all tokens are reduced to one vector.
        normalize: whether vectors are scaled to length 1.
        truncate_dim: number of components of a vector that are kept, after normalization; None: all.
        max_seq_length: maximum number of tokens of a text, including special tokens; None: the encoder's maximum.
        do_lower_case: whether texts are converted to lower case first.
        prompt: text that is prepended to every input.
        prompts: texts to prepend instead, by the name that a caller gives.
    """

    pooling: Pooling
    normalize: bool
    truncate_dim: int | None
    max_seq_length: int | None
    do_lower_case: bool
    prompt: str
    prompts: Mapping[str, str] = field(default_factory=dict)


def read_sentence(folder: Path) -> Sentence | None:
    """The settings of a sentence-transformers folder; None for any other folder, and for one without pooling.

    Raises:
        InputError: a module, an order of modules, a pooling mode or a setting that is not supported.
    """
    modules = read_modules(folder)
    kinds = [module.kind for module in modules]
    if not {"Pooling", "Normalize"} & set(kinds):
        return None
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Normalize"}:
        raise InputError(
            f"{folder / MODULES}: the modules are {', '.join(kinds[:9])}, wanted Transformer, Pooling and then at most "
            f"Normalize; {_ELSEWHERE}"
        )
    if modules[0].path:  # as sentence-transformers before 2 saved it; nothing here reads that folder
        raise InputError(
            f"{folder / MODULES}: the path of Transformer is {short(modules[0].path)}, wanted '' (the files beside "
            "modules.json); load the model with sentence-transformers and save it again"
        )
    for module in modules[2:]:
        _check_normalize(folder / module.path / "config.json")
    prompts, (_, texts) = read_optional(folder / PROMPTS, limit=MAX_SETTINGS), _texts(folder)
    return Sentence(
        pooling=_pooling(folder / modules[1].path / "config.json"),
        normalize="Normalize" in kinds,
        truncate_dim=_truncate_dim(prompts, folder / PROMPTS),
        max_seq_length=max_length(folder),
        do_lower_case=texts.get("do_lower_case") is True,
        prompt=_prompt(prompts, folder / PROMPTS),
        prompts={name: text for name, text in (prompts.get("prompts") or {}).items() if isinstance(text, str)},
    )


def read_modules(folder: Path) -> list[Module]:
    """The modules of a sentence-transformers folder in order; an empty list for any other folder.

    Raises InputError for a module whose kind is not one of KINDS, or whose folder is not beside modules.json.
    """
    file = folder / MODULES
    return [_module(entry, file) for entry in read_json_list(file, limit=MAX_SETTINGS)] if is_there(file) else []


def max_length(folder: Path) -> int | None:
    """The maximum number of tokens of a text, special ones included, that a folder states; None if it states none.

    That is max_seq_length of sentence-transformers, else the tokenizer's model_max_length, as there. Raises InputError
    for what is no number.
    """
    stated_in, texts = _texts(folder) if is_there(folder / MODULES) else (MODULES, {})
    tokenizer = read_optional(folder / "tokenizer_config.json")
    for settings, name, key in (
        (texts, stated_in, "max_seq_length"),
        (tokenizer, "tokenizer_config.json", "model_max_length"),
    ):
        if value := settings.get(key):
            # model_max_length is 1e30 if the length is unknown.
            if type(value) not in (int, float) or not 1 <= value < math.inf:
                raise InputError(
                    f"{folder / name}: {key} is {short(value)}, wanted a number of at least 1; correct the file"
                )
            return int(value)
    return None


def cross_encoder_activation(config: Mapping[str, Any], where: object) -> Activation | None:
    """The activation of a cross-encoder, by its config.json as `with_activation` gives it; None if that names none.

    Raises InputError, which begins with `where`, for another function.
    """
    key, table = "sentence_transformers.activation_fn", config.get("sentence_transformers")
    name = table.get("activation_fn") if isinstance(table, Mapping) else None
    if name is None:
        key = "sbert_ce_default_activation_function"
        name = config.get(key)
    if name is None:
        return None
    return _activation(name, f"{where}: {key} is {short(name)} in config.json")


def with_activation(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config.json of a folder, with a cross-encoder's activation from the file where newer versions keep it.

    As in sentence-transformers, that file counts before config.json. Raises InputError for another function than
    `cross_encoder_activation` knows, and for a cross-encoder with a default prompt, which would be left out.
    """
    settings = read_optional(folder / PROMPTS, limit=MAX_SETTINGS)
    if settings.get("model_type") == "CrossEncoder" and _prompt(settings, folder / PROMPTS):
        raise InputError(
            f"{folder / PROMPTS}: default_prompt_name is {short(settings['default_prompt_name'])}, wanted null: "
            "prompts of cross-encoders are not applied; put it before the first text of each pair, and set it to null"
        )
    name = settings.get("activation_fn")
    if name is None:
        return config
    _activation(name, f"{folder / PROMPTS}: activation_fn is {short(name)}")
    return config | {"sentence_transformers": {"activation_fn": name}}


def _activation(name: Any, what: str) -> Activation:
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise InputError(f"{what}, wanted Identity or Sigmoid of torch.nn; {_ELSEWHERE}")
    return _ACTIVATIONS[name]


def _module(entry: Any, file: Path) -> Module:
    kind, path = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(path, str):
        raise InputError(f"{file}: module {short(entry)}, wanted an object with type and path; copy the file again")
    if kind.startswith(f"{LIBRARY}."):
        kind = kind.rpartition(".")[2]
    if kind not in KINDS or kind == entry["type"]:  # of another library, or of none
        raise InputError(f"{file}: module {short(kind)}, wanted only {', '.join(KINDS)} of {LIBRARY}; {_ELSEWHERE}")
    if not re.fullmatch(r"[\w-]{0,99}", path, re.ASCII):  # never read or write files outside the folder
        raise InputError(
            f"{file}: the path of {kind} is {short(path)}, wanted a folder beside the file such as '1_Pooling'; "
            "copy the file again"
        )
    return Module(kind, path)


def _texts(folder: Path) -> tuple[str, dict[str, Any]]:
    """Name and content of the file of the module Transformer; the last name and {} if there is none.

    Raises InputError for a setting that would change results and is not followed here.
    """
    found: dict[str, Any] = {}
    for name in TEXTS:
        if found := read_optional(folder / name, limit=MAX_SETTINGS):
            break
    for key, value in found.items():
        if value and not _is_usual(key, value):
            raise InputError(f"{folder / name}: {key} is {short(value)}, which is not supported; {_ELSEWHERE}")
    return name, found


def _is_usual(key: str, value: Any) -> bool:
    """Whether a setting of the module Transformer changes no result, or says what is done anyway."""
    match key:
        case "transformer_task":
            return value in ("feature-extraction", "sequence-classification")
        case "module_output_name":
            return value in ("token_embeddings", "scores")
        case "modality_config":
            return isinstance(value, dict) and value.get("text") in _TEXT
        case _ if key in _OBJECTS:
            return isinstance(value, dict) and value.keys() <= _ARGUMENTS
        case _:
            return key in _HARMLESS


def _check_normalize(file: Path) -> None:
    settings = read_optional(file)
    for key in ("module_input_name", "module_output_name"):
        if (name := settings.get(key)) not in (None, "sentence_embedding"):
            raise InputError(f"{file}: {key} is {short(name)}, wanted 'sentence_embedding'; {_ELSEWHERE}")


def _pooling(file: Path) -> Pooling:
    settings = read_json(file, limit=MAX_SETTINGS)
    if settings.get("include_prompt") is False:
        raise InputError(f"{file}: include_prompt is false, wanted true; {_ELSEWHERE}")
    mode = settings.get("pooling_mode", [new for old, new in _OLD_POOLING.items() if settings.get(old)] or "mean")
    mode = mode[0] if isinstance(mode, list) and len(mode) == 1 else mode
    if mode not in ("cls", "mean", "max"):
        raise InputError(f"{file}: pooling is {short(mode)}, wanted one of cls, mean, max; {_ELSEWHERE}")
    return mode


def _truncate_dim(prompts: Mapping[str, Any], file: Path) -> int | None:
    value = prompts.get("truncate_dim")
    if value is not None and (type(value) is not int or value < 1):
        raise InputError(
            f"{file}: truncate_dim is {short(value)}, wanted an integer of at least 1 or null; correct the file"
        )
    return value


def _prompt(prompts: Mapping[str, Any], file: Path) -> str:
    """The default prompt, which is prepended to every text."""
    named = prompts.get("prompts") or {}
    if not isinstance(named, dict):
        raise InputError(
            f"{file}: prompts is {short(named)}, wanted a JSON object from names to strings; correct the file"
        )
    name = prompts.get("default_prompt_name")
    if name is not None and (not isinstance(name, str) or name not in named):
        known = ", ".join(map(short, list(named)[:5])) or "nothing"
        raise InputError(
            f"{file}: default_prompt_name is {short(name)}, wanted one of prompts, which has {known}; correct the file"
        )
    prompt = named.get(name) or ""
    if not isinstance(prompt, str):
        raise InputError(f"{file}: the prompt is {short(prompt)}, wanted a string; correct the file")
    return prompt
