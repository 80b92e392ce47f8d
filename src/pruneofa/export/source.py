"""A Hugging Face folder prepared for an exporter, and the exported model to be verified."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pruneofa.errors import InputError
from pruneofa.families import POOLER_WEIGHT, Task, canonical_name
from pruneofa.formats import pattern, scales
from pruneofa.formats.architecture import Architecture, read_architecture
from pruneofa.formats.manifest import is_packed, kind_of, read_config
from pruneofa.formats.scales import Quantization
from pruneofa.formats.sentence import read_sentence
from pruneofa.train.models import check_encoder, read_model, refuse_integers

Arrays = dict[str, NDArray[Any]]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS: Mapping[Task, tuple[str, ...]] = {
    "embedding": ("last_hidden_state",),
    "classification": ("logits",),
    "question answering": ("start_logits", "end_logits"),
    "token classification": ("logits",),
    "masked-LM": ("logits",),
}


@dataclass
class Source:
    """A torch model and the scales of its folder.

    Attributes:
        folder: the source folder.
        model: the model on the CPU, float32, in eval mode.
        quantization: the scales for an int8 export; None for an fp32 export.
        linears: {canonical name of the weight: name of the module in `model`} of the encoder's linear layers and the
            pooler. These are quantized, and must keep all zeros.
        tables: the same for the embedding tables that are used only for look-up.
        inputs: names of the model's inputs, in the order of INPUTS.
        outputs: names of the model's outputs, as in transformers.
    """

    folder: Path
    model: Any
    quantization: Quantization | None
    linears: dict[str, str]
    tables: dict[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def weight(self, name: str) -> NDArray[np.float32]:
        """The weight of one of `linears` or `tables`, float32 (rows, columns)."""
        return self.model.get_submodule((self.linears | self.tables)[name]).weight.detach().numpy()

    def codes(self, name: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """int8 codes (rows, columns) and scales (rows,) of a weight. Raises InputError if it is not code * scale."""
        assert self.quantization is not None
        scale = self.quantization.weight_scale[name]
        lowest = self.quantization.lowest if name in self.linears else -127
        return scales.codes(name, self.weight(name), scale, lowest), scale

    def stored_as(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
        """{name: name in `arrays`} of those of `linears` that are stored in `arrays`.

        An exporter stores several equal tensors once, under the name of the first.
        """
        aliases = {}
        for name in self.linears:
            if name not in arrays:
                wanted = self.weight(name) if self.quantization is None else self.codes(name)[0]
                equal = (other for other in self.linears if other in arrays and np.array_equal(arrays[other], wanted))
                aliases[name] = next(equal, "")
            else:
                aliases[name] = name
        return {name: alias for name, alias in aliases.items() if alias}


@dataclass
class Exported:
    """An exported model, loaded again by the library that runs it.

    Attributes:
        run: maps input arrays by name, int64 (batch, tokens), to outputs in the order of `Source.outputs`.
        weights: {canonical name: stored array (rows, columns) of codes or floats} of the linears.
        executed: {canonical name of a linear's weight: operator that runs it in int8, such as "MatMulIntegerToFloat"}.
        settings: settings of the library that differ from its defaults.
    """

    run: Callable[[Arrays], tuple[NDArray[np.float32], ...]]
    weights: Mapping[str, NDArray[Any]]
    executed: dict[str, str]
    settings: dict[str, str]


class Traced(nn.Module):
    """The model of `source` with positional inputs in the order of INPUTS and a tuple of outputs."""

    def __init__(self, model: nn.Module, source: Source) -> None:
        super().__init__()
        self.model, self._inputs, self._outputs = model, source.inputs, source.outputs

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """All of shape (batch, tokens)."""
        given = zip(INPUTS, (input_ids, attention_mask, token_type_ids), strict=True)
        output = self.model(**{name: value for name, value in given if name in self._inputs})
        return tuple(output[name] for name in self._outputs)


def read_source(folder: Path, *, int8: bool | None = None, whole: bool = False) -> Source:
    """Load a Hugging Face folder with the class that its config names, or as an encoder where there is pooling.

    Args:
        folder: a model with a head that the engine supports.
        int8: whether to export int8 codes; None: if the folder has scales.
        whole: keep modules that the outputs do not need: the pooler of a bare encoder, a next-sentence head.

    Raises:
        InputError: the folder is packed, weights are missing or not code * scale, the pattern has changed since
            quantization, or int8 is requested of a folder without scales.
    """
    if is_packed(folder):
        raise InputError(
            f"{folder}: is packed, wanted a Hugging Face folder; make one with: pruneofa unpack {folder} OUT"
        )
    found = scales.read(folder)
    if int8 and found is None:
        raise InputError(
            f"{folder}: no {scales.SETTINGS} in it, so there are no int8 scales to export; make them with "
            f"`pruneofa quantize {folder} OUT`, or export --precision fp32"
        )
    config = read_config(folder)
    refuse_integers(folder, config)
    architecture = read_architecture(config, folder)
    if read_sentence(folder) is not None:  # it gives vectors, whatever head config.json names, as in pack and engine
        config = config | {"architectures": [architecture.family.classes["embedding"]]}
        architecture = read_architecture(config, folder)
    model = _load(folder, config, architecture, whole)
    names = {canonical_name(f"{name}.weight"): (name, module) for name, module in model.named_modules()}
    source = Source(
        folder=folder,
        model=model,
        quantization=found,
        linears={name: at for name, (at, module) in names.items() if _is(name, "linear", module)},
        tables={name: at for name, (at, module) in names.items() if _is(name, "embedding", module)},
        inputs=tuple(name for name in INPUTS if name != "token_type_ids" or architecture.types > 1),
        outputs=("prediction_logits",)
        if type(model).__name__ == architecture.family.pretraining
        else OUTPUTS[architecture.task],
    )
    if found is not None:
        for name in source.linears | (source.tables if found.embeddings else {}):
            source.codes(name)
        hashes = pattern.inspect(folder)
        scales.check_pattern(folder, found, hashes["pattern_hash"], hashes["pooler_hash"])
    if int8 is False:
        source.quantization = None
    head = model.get_output_embeddings()  # the tied decoder of masked-LM: its table is also a weight and stays float
    source.tables = {n: at for n, at in source.tables.items() if head is None or head.weight is not _weight(model, at)}
    return source


def _load(folder: Path, config: Mapping[str, Any], architecture: Architecture, whole: bool) -> Any:
    import transformers

    family = architecture.family
    name = (config.get("architectures") or ["AutoModel"])[0]
    if name == family.pretraining and not whole:
        name = family.classes["masked-LM"]
    options = {}
    if architecture.task == "embedding" and family.pooler:
        stored = {
            canonical_name(name) for name, _ in pattern.read_weights(folder, lambda name, _: name == POOLER_WEIGHT)
        }
        options["add_pooling_layer"] = whole and bool(stored)
    model, info = read_model(getattr(transformers, name), folder, **options)
    check_encoder(model, info, folder)
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{folder}: {len(missing)} weights of {name} are missing, such as {missing[0]}; the folder is incomplete "
            "or not fine-tuned, or its config.json names another head"
        )
    return model.eval()


def _is(name: str, kind: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) and kind_of(name, 2) == kind


def _weight(model: nn.Module, at: str) -> Any:
    return model.get_submodule(at).weight


def example_inputs(source: Source) -> tuple[torch.Tensor, ...]:
    """Inputs for tracing the model: two sequences of 8 tokens, one of them padded."""
    ids = torch.arange(16).reshape(2, 8) % source.model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return (ids, mask, torch.zeros_like(ids))[: len(source.inputs)]
