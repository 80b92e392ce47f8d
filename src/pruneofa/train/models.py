"""Load models from folders or the hub, with errors that say what to do."""

import pickle
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from pruneofa import families
from pruneofa.data.tasks import token_types
from pruneofa.errors import InputError, first_line, is_panic, short
from pruneofa.families import base_name
from pruneofa.formats.architecture import check_additions, check_layers
from pruneofa.formats.files import file_fingerprint, fingerprint, is_there, read_optional
from pruneofa.formats.hub import check_model_name, not_on_hub
from pruneofa.formats.settings import sentence_files
from pruneofa.formats.source import refuse_non_finite
from pruneofa.formats.tensors import unsafe_binary
from pruneofa.formats.tokenizer_file import load_tokenizer as read_tokenizer_file
from pruneofa.formats.tokenizer_settings import CONFIG, check_same_settings, gives_types
from pruneofa.train.same_tokens import check_same_tokens

# The loader's progress bars and reports are silenced: they warn about heads that are new intentionally. Real errors
# are checked below.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
IDENTITY = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", *SENTENCEPIECE,
)  # fmt: skip


def load_config(path: str) -> Any:
    """Config of a supported encoder. Raises InputError for anything else."""
    check_model_name(path, "model ")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):  # the loader's advice is to run the code
            wanted = ", ".join(families.model_types())
            raise InputError(
                f"model {path}: needs Python code of its own, which is never run; wanted a model of type {wanted}"
            ) from None
        if not Path(path).is_dir():
            raise not_on_hub(path, error, "model ") from None
        raise InputError(f"model {path}: no readable config.json ({first_line(error)})") from None
    if families.find(config.model_type) is None:
        wanted = ", ".join(families.model_types())
        raise InputError(f"model {path}: model_type is {config.model_type!r}, wanted one of {wanted}")
    return config


def refuse_integers(path: str | Path, config: Mapping[str, Any]) -> None:
    """Raises InputError for a model whose weights are stored as integers, as `pruneofa export` writes them.

    `config` is what config.json says.
    """
    if config.get("quantization_config") is not None:
        raise InputError(
            f"model {path}: config.json has a quantization_config, so its weights are integers, wanted floats; give "
            "the folder that it was made from"
        )


def load_tokenizer(path: str | Path, *, types: bool | None = None) -> PreTrainedTokenizerBase:
    """The fast tokenizer in the model folder, which gives the tokens and token types that the engine gives.

    `types`: whether it gives token types in any case, for another model that gets the same inputs.

    Raises InputError when its files are missing, because transformers would then create a vocabulary of a few tokens,
    when it has ids without a word embedding in the model, or when tokenizer.json gives other tokens.
    """
    config = load_config(str(path))
    engines = None
    if (file := _file(path, "tokenizer.json")) is not None:
        engines = read_tokenizer_file(file)  # before the loader, which has no limits
        check_same_settings(engines, file.parent)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        used = [*tokenizer("a", "b")["input_ids"], *tokenizer("a")["input_ids"]]
    except BaseException as error:  # the loader's errors have no common type
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise InputError(
            f"model {path}: no readable tokenizer ({first_line(error)}); save the tokenizer in the same folder"
        ) from None
    if file is None:
        # Only the files of its own class are checked: with those of another class it creates a vocabulary itself.
        names = {name for name in tokenizer.vocab_files_names.values() if name != "tokenizer.json"} or {"vocab.txt"}
        if missing := sorted(name for name in names if _file(path, name) is None):
            raise InputError(
                f"model {path}: no tokenizer in it: got neither tokenizer.json nor {' and '.join(missing)}, wanted "
                "tokenizer.json (or vocab.txt, or vocab.json and merges.txt, or a sentencepiece model); copy the "
                "tokenizer files of the original model, or call tokenizer.save_pretrained on this folder"
            )
    largest = max([*tokenizer.get_vocab().values(), *used], default=0)
    if largest >= config.vocab_size:
        raise InputError(
            f"model {path}: its tokenizer has {len(tokenizer)} tokens with ids up to {largest}, but config.json gives "
            f"vocab_size {config.vocab_size}, wanted a word embedding for every id: tokens were added and the "
            "embeddings not resized; call model.resize_token_embeddings(len(tokenizer)) and save both, or copy the "
            "tokenizer files of the original model"
        )
    _set_types(tokenizer, token_types(config), types, path)
    if file is not None and engines is not None:
        check_same_tokens(tokenizer, file, engines)
    return tokenizer


def _set_types(tokenizer: Any, count: int, types: bool | None, path: str | Path) -> None:
    """Let a tokenizer give token types by the engine's rule, or as `types` says; what it saves then says so too.

    `count` is the number of types of the model. What already does so is not changed, nor is what it saves.
    """
    stated = tokenizer.init_kwargs.get("model_input_names")
    file = _file(path, CONFIG)
    named = None if file is None else read_optional(file).get("tokenizer_class")
    own = count > 1 and gives_types(stated, named)
    if types and count > 1 and stated and not own:
        raise InputError(
            f"model {path}: model_input_names is {short(stated)} in tokenizer_config.json, so the engine gives it no "
            f"token types, wanted those of its teacher too, because it has {count}; add token_type_ids to the list"
        )
    typed = own if types is None else types
    if ("token_type_ids" in tokenizer.model_input_names) != typed:
        names = ["input_ids", *(["token_type_ids"] if typed else []), "attention_mask"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names


def _file(path: str | Path, name: str) -> Path | None:
    """A file of a folder, or of a hub model; None if it has none of this name."""
    if Path(path).is_dir():
        file = Path(path) / name
        if is_there(file) and not file.is_file():
            raise InputError(f"{file}: not a regular file; copy the file again")
        return file if is_there(file) else None
    missing: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    found = cached_file(str(path), name, **missing)
    return None if found is None else Path(found)


def load_for_pretraining(path: str, *, nsp: bool, trained_head: bool = False) -> PreTrainedModel:
    """Encoder with MLM head (and NSP head); a head that the folder lacks is newly initialized, on tied embeddings.

    Raises InputError when encoder weights are missing, when `nsp` is set for an architecture without it, or when a
    `trained_head` is required and missing: the logits of a new head are useless for distillation.
    """
    config = load_config(path)
    refuse_integers(path, vars(config))
    next_sentence = families.of(config.model_type).next_sentence
    if nsp and next_sentence is None:
        raise InputError(f"corpus.nsp is true but {config.model_type} has no next-sentence head; set corpus.nsp=false")
    if nsp and (types := token_types(config)) < 2:
        raise InputError(f"corpus.nsp is true but {path} has {types} token type, wanted 2; set corpus.nsp=false")
    new = () if trained_head else _heads(config)
    if next_sentence is None:
        return _load(transformers.AutoModelForMaskedLM, path, new)
    if nsp:
        return _load(transformers.AutoModelForPreTraining, path, new)
    # The class for masked-LM would drop the pooler, which classification starts from; the unused NSP head may be new.
    _, info = read_model(transformers.AutoModel, path)
    has_pooler = not any(name.startswith("pooler.") for name in info["missing_keys"])
    architecture = transformers.AutoModelForPreTraining if has_pooler else transformers.AutoModelForMaskedLM
    return _load(architecture, path, new or (f"{next_sentence}.",))


def has_pretraining_head(path: str) -> bool:
    """Whether a folder has every weight of a masked-LM head. Raises InputError as `load_for_pretraining` does."""
    model, info = read_model(transformers.AutoModelForMaskedLM, path)
    check_encoder(model, info, path)
    prefix = f"{model.base_model_prefix}."
    return all(name.startswith(prefix) for name in info["missing_keys"])


def load_for_task(path: str, kind: str, **head: Any) -> PreTrainedModel:
    """Encoder with a classification ("classification") or span ("qa") head, new where the folder has none that fits.

    Raises InputError when weights of the encoder are missing or not of the shape that config.json gives.
    """
    refuse_integers(path, vars(load_config(path)))
    if kind == "qa":
        # Start and end logits, whatever number of classes the head in the folder has.
        model = _load(transformers.AutoModelForQuestionAnswering, path, new_head=True, num_labels=2)
    else:
        model = _load(transformers.AutoModelForSequenceClassification, path, new_head=True, **head)
    # What turned the scores of the task before into its answers would be saved with the new one.
    model.config.problem_type = None
    for cross_encoder in ("sentence_transformers", "sbert_ce_default_activation_function"):
        if hasattr(model.config, cross_encoder):
            delattr(model.config, cross_encoder)
    return model


def read_model(
    architecture: Any, path: str | Path, *, new_head: bool = False, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """`architecture.from_pretrained` in float32, and its loading info. Raises InputError for every failure.

    A weight that is NaN or infinite is an error. So is one whose shape differs from config.json, unless `new_head`
    allows it outside the encoder, and one of a layer beyond the number of layers in config.json.
    """
    # from_pretrained reads a .bin with weights_only=True; safetensors files are safe anyway. Mismatched weights are
    # allowed here and reported below by name, because the loader's own error does not name the weight.
    options |= {"ignore_mismatched_sizes": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = architecture.from_pretrained(
                path, output_loading_info=True, dtype=torch.float32, trust_remote_code=False, **options
            )
    except pickle.UnpicklingError:
        raise InputError(unsafe_binary(path)) from None
    except Exception as error:  # the loader's errors have no common type: OSError, SafetensorError, RuntimeError...
        raise InputError(
            f"model {path}: not a loadable model folder or hub id ({type(error).__name__}: {first_line(error)}); "
            "wanted a complete folder with model.safetensors"
        ) from None
    unfit = sorted(key for key in info["mismatched_keys"] if not (new_head and _in_head(model, key[0])))
    if unfit:
        name, got, wanted = unfit[0]
        raise InputError(
            f"model {path}: {len(unfit)} weights do not fit config.json, such as {name}: the file has shape "
            f"{tuple(got)}, config.json wants {tuple(wanted)}; copy the config.json that was saved with these weights, "
            "or save model and config again with model.save_pretrained"
        )
    unused = [base_name(name) for name in info["unexpected_keys"]]
    check_layers(families.of(model.config.model_type), model.config.num_hidden_layers, unused, f"model {path}")
    check_additions((), unused, f"model {path}")
    for name, weight in model.named_parameters():
        refuse_non_finite(f"model {path}: {name}", weight.numpy(force=True))
    return model, info


def _heads(config: Any) -> tuple[str, ...]:
    """Prefixes of parameter names that a folder may lack, because a new head is trained in their place."""
    return tuple(f"{module}." for module in families.of(config.model_type).head_modules())


def _in_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter lies outside the encoder."""
    return model.base_model is not model and not name.startswith(f"{model.base_model_prefix}.")


def check_encoder(model: PreTrainedModel, info: dict[str, Any], path: str | Path) -> None:
    """Raises InputError when weights of the encoder, except the pooler, were not in the file."""
    prefix = f"{model.base_model_prefix}."
    missing = sorted(
        name for name in info["missing_keys"] if not name.removeprefix(prefix).startswith(_heads(model.config))
    )
    if missing:
        shape = tuple(model.state_dict()[missing[0]].shape)
        raise InputError(
            f"model {path}: {len(missing)} encoder weights are missing, such as {missing[0]}: the file has none, "
            f"config.json wants shape {shape}; the folder is incomplete or of another architecture; copy or "
            "save it again"
        )


def _load(architecture: Any, path: str, new: tuple[str, ...] | None = None, **options: Any) -> PreTrainedModel:
    """The model; only weights with a prefix in `new` may be missing, or with None those of any head."""
    model, info = read_model(architecture, path, **options)
    check_encoder(model, info, path)
    prefix = f"{model.base_model_prefix}."
    new = _heads(model.config) if new is None else new
    untrained = [name for name in info["missing_keys"] if not name.removeprefix(prefix).startswith(new)]
    if untrained:
        raise InputError(
            f"model {path}: its pre-training head is missing ({sorted(untrained)[0]}), so its logits cannot be "
            "distilled; add a teacher stage, or set distill to hard: 0, kd: 0, hidden: 1"
        )
    return model


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout rate of `model`; its config, and so the saved folder, keeps the original rates."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


@torch.no_grad()
def reorder_classes(model: PreTrainedModel, order: list[int]) -> None:
    """Permute the last layer of a classifier so that its i-th logit is the former `order[i]`-th."""
    last = cast(nn.Linear, model.get_submodule(families.of(model.config.model_type).classification.output))
    last.weight.copy_(last.weight[order].clone())
    last.bias.copy_(last.bias[order].clone())


def model_fingerprint(path: str) -> str:
    """Content hash of a local model folder, with its tokenizer and its settings of sentence-transformers.

    For a hub id it is the current commit.

    Raises InputError for what is neither a folder nor a model of the hub.
    """
    folder = Path(path)
    if folder.is_dir():
        names = {p.name for p in folder.iterdir() if p.name in IDENTITY or p.suffix in (".safetensors", ".bin")}
        with suppress(InputError):  # settings that are not followed are not kept either
            names.update(sentence_files(folder))
        return fingerprint({name: file_fingerprint(folder / name) for name in sorted(names)})
    check_model_name(path, "model ")
    from huggingface_hub import hf_hub_download

    try:  # the folder of a cached file is named after the commit, so this works offline too
        return Path(hf_hub_download(path, "config.json")).parent.name
    except Exception as error:  # hub, HTTP and validation errors have no common type
        raise not_on_hub(path, error, "model ") from None


def all_finite(model: nn.Module) -> bool:
    """Whether no weight is NaN or infinite."""
    return all(bool(weight.isfinite().all()) for weight in model.parameters())


def recompute_activations(student: PreTrainedModel) -> None:
    """Compute activations again in the backward pass. Raises InputError for a model that cannot."""
    if not student.supports_gradient_checkpointing:
        raise InputError(
            f"checkpoint_activations is true, which transformers' {type(student).__name__} does not support; set it to "
            "false, and a smaller micro_batch if memory is short"
        )
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
