"""Load encoders from folders or the hub, with errors a user can act on."""

import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pruneofa.errors import InputError, first_line
from pruneofa.formats.files import cache_root, file_fingerprint, fingerprint, new_folder

# The loader's own bars and reports speak of heads that are meant to be new; what matters is checked below.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SUPPORTED = ("bert", "distilbert", "roberta")
IDENTITY = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt",
)  # fmt: skip
# Parameters that a folder may lack because a new head is trained on top of it.
HEADS = ("cls.", "lm_head.", "vocab_", "classifier.", "pre_classifier.", "qa_outputs.", "pooler.")


def load_config(path: str) -> Any:
    """Config of a supported encoder. Raises InputError for anything else."""
    _explain_missing_folder(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"model {path}: no readable config.json ({first_line(error)})") from None
    if config.model_type not in SUPPORTED:
        raise InputError(f"model {path}: model_type is {config.model_type!r}, wanted one of {', '.join(SUPPORTED)}")
    return config


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model folder's own fast tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model {path}: no readable tokenizer ({first_line(error)}); save the tokenizer in the same folder"
        ) from None


def load_for_pretraining(path: str, *, nsp: bool, trained_head: bool = False) -> PreTrainedModel:
    """Encoder with MLM head (and NSP head): a head that the folder lacks is new, on tied embeddings.

    Raises InputError when encoder weights are missing, NSP is asked of an architecture without it, or a
    `trained_head` is needed and missing: the logits of a new one would be noise to distil from.
    """
    config = load_config(path)
    if nsp and config.model_type != "bert":
        raise InputError(f"corpus.nsp is true but {config.model_type} has no next-sentence head; set corpus.nsp=false")
    new = () if trained_head else HEADS
    if config.model_type != "bert":
        return _load(transformers.AutoModelForMaskedLM, path, new)
    if nsp:
        return _load(transformers.AutoModelForPreTraining, path, new)
    # BertForMaskedLM would drop the pooler, which classification starts from; the unused NSP head may be new.
    _, info = read_model(transformers.AutoModel, path)
    has_pooler = not any(name.startswith("pooler.") for name in info["missing_keys"])
    architecture = transformers.AutoModelForPreTraining if has_pooler else transformers.AutoModelForMaskedLM
    return _load(architecture, path, new or ("cls.seq_relationship.",))


def load_for_task(path: str, kind: str, **head: Any) -> PreTrainedModel:
    """Encoder with a classification ("classification") or span ("qa") head, new where the folder has none."""
    load_config(path)
    if kind == "qa":
        return _load(transformers.AutoModelForQuestionAnswering, path)
    return _load(transformers.AutoModelForSequenceClassification, path, ignore_mismatched_sizes=True, **head)


def read_model(architecture: Any, path: str | Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """`architecture.from_pretrained` in float32, and its loading info. Raises InputError for whatever goes wrong."""
    # from_pretrained reads a .bin with weights_only=True; safetensors needs no such care.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return architecture.from_pretrained(path, output_loading_info=True, dtype=torch.float32, **options)
    except pickle.UnpicklingError:
        raise InputError(_more_than_weights(path)) from None
    except Exception as error:  # the loader's errors have no common type: OSError, SafetensorError, RuntimeError...
        raise InputError(
            f"model {path}: not a loadable model folder or hub id ({type(error).__name__}: {first_line(error)}); "
            "wanted a complete folder with model.safetensors"
        ) from None


def _load(architecture: Any, path: str, new: tuple[str, ...] = HEADS, **options: Any) -> PreTrainedModel:
    model, info = read_model(architecture, path, **options)
    prefix = f"{model.base_model_prefix}."
    missing = [name for name in info["missing_keys"] if not name.removeprefix(prefix).startswith(HEADS)]
    untrained = [name for name in info["missing_keys"] if not name.removeprefix(prefix).startswith(new)]
    if untrained and not missing:
        raise InputError(
            f"model {path}: its pre-training head is missing ({sorted(untrained)[0]}), so its logits cannot be "
            "distilled; add a teacher stage, or set distill to hard: 0, kd: 0, hidden: 1"
        )
    if missing:
        raise InputError(
            f"model {path}: {len(missing)} encoder weights are missing, such as {sorted(missing)[0]}; "
            "the folder is half-written or of another architecture"
        )
    return model


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of `model`; its config, and so the saved folder, keeps the rates it had."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


@torch.no_grad()
def reorder_classes(model: PreTrainedModel, order: list[int]) -> None:
    """Permute the last layer of a classifier so that its i-th logit is the former `order[i]`-th."""
    last = getattr(model.classifier, "out_proj", model.classifier)
    last.weight.copy_(last.weight[order].clone())
    last.bias.copy_(last.bias[order].clone())


def with_safetensors(path: str) -> str:
    """`path` where it holds safetensors, else a copy of it that does: published sparse models may have only a .bin.

    The copy is made once, in the cache, and read with weights_only=True. Raises InputError for a .bin that
    holds more than weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.txt", "*.safetensors", "pytorch_model*.bin"]
        try:
            folder = Path(snapshot_download(path, allow_patterns=patterns))
        except Exception as error:  # hub, HTTP and validation errors have no common type
            raise InputError(f"model {path}: neither a folder nor a model on the hub ({first_line(error)})") from None
    binaries = sorted(folder.glob("pytorch_model*.bin"))
    if any(folder.glob("*.safetensors")) or not binaries:
        return str(path)
    copy = cache_root() / "models" / model_fingerprint(path)[:32]
    if not copy.exists():
        weights: dict[str, torch.Tensor] = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickle protocols: what matters is refused below
                for file in binaries:
                    weights |= torch.load(file, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError:
            raise InputError(_more_than_weights(path)) from None
        except (RuntimeError, EOFError) as error:
            raise InputError(f"{file}: damaged ({first_line(error)}); copy or download it again") from None
        with new_folder(copy) as target:
            plain = {name: value.clone().contiguous() for name, value in weights.items()}
            save_file(plain, target / "model.safetensors", {"format": "pt"})
            for extra in [*folder.glob("*.json"), *folder.glob("*.txt")]:
                shutil.copyfile(extra, target / extra.name)
    return str(copy)


def model_fingerprint(path: str) -> str:
    """Content fingerprint of a local model folder, tokenizer included; of a hub id, its present commit."""
    folder = Path(path)
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.name in IDENTITY or p.suffix in (".safetensors", ".bin"))
        return fingerprint({p.name: file_fingerprint(p) for p in files})
    _explain_missing_folder(path)
    from huggingface_hub import hf_hub_download

    try:  # the folder of a cached file is named after the commit, so this works offline too
        return Path(hf_hub_download(path, "config.json")).parent.name
    except Exception as error:  # hub, HTTP and validation errors have no common type
        raise InputError(f"model {path}: neither a folder nor a model on the hub ({first_line(error)})") from None


def _explain_missing_folder(path: str) -> None:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise InputError(f"model {path}: no such folder")


def _more_than_weights(path: str | Path) -> str:
    return (
        f"model {path}: its .bin file holds more than weights and could run code when read, so it was not; "
        "wanted model.safetensors"
    )
