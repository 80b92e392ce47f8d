"""Export a Hugging Face folder to ONNX, OpenVINO or compressed-tensors, and verify the result by running it."""

import contextlib
import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pruneofa import recipe
from pruneofa.data.tasks import Task, longest_input
from pruneofa.errors import InputError
from pruneofa.export import compressed as export_compressed
from pruneofa.export import onnx as export_onnx
from pruneofa.export import openvino as export_openvino
from pruneofa.export.source import OUTPUTS, Arrays, Exported, Source, Traced, read_source
from pruneofa.formats.files import new_output, write_json
from pruneofa.formats.settings import copy_settings
from pruneofa.formats.tensors import weights_folder
from pruneofa.progress import progress
from pruneofa.train.evaluate import evaluate_model, task_of
from pruneofa.train.models import load_tokenizer
from pruneofa.train.quantize import FakeQuantizer

Precision = Literal["fp32", "int8"]
FORMATS: dict[str, Any] = {
    "onnx": export_onnx,
    "openvino": export_openvino,
    "compressed-tensors": export_compressed,
}
REPORT = "export.json"
MAX_LOSS = 0.2  # largest accepted loss of a metric, in points
# Limits of the relative L2 error of a sequence's outputs: median and maximum. In int8 an activation halfway between two
# codes can be rounded differently if sums have another order, which changes logits near 0 by some per cent, rarely.
_TOLERANCES = {"fp32": (1e-3, 1e-3), "int8": (2e-2, 0.5)}
_ROWS, _BATCH = 64, 16  # rows of the task whose logits are compared; metrics are computed on all rows
_TINY = float(np.finfo(np.float32).tiny)
_WEIGHTS = (".safetensors", ".onnx", ".data", ".xml", ".bin")
_SHAPES = ((1, 8), (4, 32), (2, 128))  # (sequences, tokens) of random inputs


class _Rejected(Exception):  # noqa: N818 - raised in the block that writes a folder, so that the folder is discarded
    pass


def export(
    path: str | Path,
    out: str | Path,
    *,
    to: str,
    precision: Precision | None = None,
    name: str | None = None,
    spec: recipe.Task | None = None,
    data_root: str | Path | None = None,
) -> dict[str, Any]:
    """Write the folder `out` of a Hugging Face folder or hub id, run it, and compare it with torch.

    Args:
        path: a model with a head that the engine supports; int8 needs the scales that `pruneofa quantize` writes.
        out: a folder that does not exist yet, or is empty. It is created only if the export passes all checks.
        to: "onnx", "openvino" or "compressed-tensors".
        precision: int8 is compared with torch's int8 simulation, fp32 with torch; None: int8 if the folder has scales.
        name: the task whose metrics are compared, with its section `spec` of a recipe; None: compare only logits.
        data_root: folder that relative data paths start from.

    Returns:
        The contents of export.json in `out`. "failures", if present, says why nothing was written: a layer that does
        not run in int8, a lost zero, logits outside the tolerance, or a loss of more than 0.2 points of a metric.

    Raises:
        InputError: the folder cannot be exported to this format, has lost the pattern of its run's sparse model, or
            the task's data do not fit the model.
        ImportError: a library that writes or runs the export is not installed.
    """
    if to not in FORMATS:
        raise InputError(f"to is {to!r}; wanted one of {', '.join(FORMATS)}")
    dense = to != "compressed-tensors"
    if not dense and precision == "fp32":
        raise InputError(f"compressed-tensors stores int8, got precision fp32; load {path} itself with transformers")
    _check_installed(to)
    folder = weights_folder(path)
    int8 = (None if precision is None else precision == "int8") if dense else True
    report: dict[str, Any] = {}
    with progress(f"export to {to}", 4) as advance, contextlib.suppress(_Rejected), new_output(out) as temporary:
        source = read_source(folder, int8=int8, whole=not dense)
        load_tokenizer(folder)  # it is copied: the exported model is of no use without it
        task = None if name is None or spec is None else _read_task(source, name, spec, data_root)
        advance(note="writing")
        copy_settings(folder, temporary)
        FORMATS[to].write(source, temporary)
        advance(note="loading")
        exported = FORMATS[to].load(source, temporary)
        advance(note="comparing")
        report |= {"from": str(path), "to": to, **_compare(source, exported, task, must_run_int8=dense)}
        report["sizes"] = {"source": _size(folder), "exported": _size(temporary)}
        report["versions"] = {package: importlib.metadata.version(package) for package in ("torch", *_packages(to))}
        write_json(temporary / REPORT, report)
        advance()
        if report["failures"]:
            raise _Rejected
    return report


def summary(report: Mapping[str, Any]) -> str:
    """The report as a few lines of text, summed over layers."""
    logits, zeros, sizes = report["logits"], report["zeros"], report["sizes"]
    rows = {
        "precision": " ".join(filter(None, (report["precision"], report["activations"]))),
        "compared with": f"{report['compared_with']}, {logits['sequences']} sequences",
        "max difference of outputs": f"{logits['max_difference']:.2g}",
        "relative L2 (median, max)": f"{logits['relative_l2_median']:.2g}, {logits['relative_l2_max']:.2g}",
    }
    for name, value in (report["metrics"] or {}).items():
        rows[f"{name} (torch, exported)"] = f"{value['torch']:.2f}, {value['exported']:.2f}"
    if report["executed"]:
        rows["run in int8 as"] = ", ".join(f"{count} x {kernel}" for kernel, count in report["executed"].items())
    if report["settings"]:
        rows["set"] = ", ".join(f"{key}={value}" for key, value in report["settings"].items())
    rows["zeros (before, after, lost)"] = f"{zeros['before']:,}, {zeros['after']:,}, {zeros['lost']:,}"
    rows["MB (source, exported)"] = f"{sizes['source'] / 1e6:.2f}, {sizes['exported'] / 1e6:.2f}"
    width = max(map(len, rows))
    return "".join(f"{name.ljust(width)}  {value}\n" for name, value in rows.items())


def _check_installed(to: str) -> None:
    missing = [name for name in FORMATS[to].MODULES if importlib.util.find_spec(name) is None]
    if missing:
        extra = "compressed" if to == "compressed-tensors" else to
        raise ImportError(f"export --to {to} needs {', '.join(_packages(to))}: pip install 'pruneofa[{extra}]'")


def _packages(to: str) -> list[str]:
    return [module.replace("_", "-") for module in FORMATS[to].MODULES]


def _size(folder: Path) -> int:
    """Bytes of a model's files of weights and graph, without the tokenizer."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHTS)


def _read_task(source: Source, name: str, spec: recipe.Task, data_root: str | Path | None) -> Task:
    wanted = "start_logits" if name == "squad" else "logits"
    per_row = "SequenceClassification" in type(source.model).__name__
    if wanted not in source.outputs or (wanted == "logits" and not per_row):
        raise InputError(
            f"{source.folder}: {type(source.model).__name__} has no metrics on --task {name}; omit --task and "
            "--data to compare only its outputs"
        )
    return task_of(source.model, source.folder, name, spec, data_root=data_root, whole=True)


def _compare(source: Source, exported: Exported, task: Task | None, *, must_run_int8: bool) -> dict[str, Any]:
    """The report, without the sizes of files."""
    int8 = source.quantization
    simulation = None if int8 is None else FakeQuantizer.of(source.model, int8)
    try:
        with torch.no_grad():
            logits = _compare_logits(source, exported, task)
            metrics = None if task is None else _compare_metrics(source, exported, task)
    finally:
        if simulation is not None:
            simulation.release()
    layers = {name: _count_zeros(source.weight(name), exported.weights.get(name)) for name in source.linears}
    precision = "fp32" if int8 is None else "int8"
    executed = {name: exported.executed.get(name) for name in source.linears} if int8 and must_run_int8 else {}
    return {
        "precision": precision,
        "activations": None if int8 is None else "dynamic" if int8.input_activations.dynamic else "static",
        "compared_with": "torch in fp32" if int8 is None else "torch's simulation of the int8 arithmetic",
        "failures": [
            *(f"{name}: not found in the exported model" for name, count in layers.items() if count["after"] is None),
            *(f"{name}: {count['lost']} zeros lost" for name, count in layers.items() if count["lost"]),
            *(f"{name}: does not run in int8" for name, kernel in executed.items() if kernel is None),
            *_too_different(logits, metrics, _TOLERANCES[precision]),
        ],
        "logits": logits,
        "metrics": metrics,
        "settings": exported.settings,
        "executed": dict(Counter(kernel for kernel in executed.values() if kernel)),
        "zeros": {key: sum(count[key] or 0 for count in layers.values()) for key in ("before", "after", "lost")},
        "layers": layers,
    }


def _too_different(
    logits: Mapping[str, float], metrics: Mapping[str, Any] | None, limits: tuple[float, float]
) -> Iterator[str]:
    median, greatest = logits["relative_l2_median"], logits["relative_l2_max"]
    if not (median <= limits[0] and greatest <= limits[1]):  # NaN too
        yield (
            f"outputs differ from torch's by {median:.2g} (median) and {greatest:.2g} (maximum) in relative L2 of a "
            f"sequence; wanted at most {limits[0]:g} and {limits[1]:g}"
        )
    for name, value in (metrics or {}).items():
        if value["torch"] - value["exported"] > MAX_LOSS:
            yield f"{name} is {value['exported']:.2f}, by torch {value['torch']:.2f}: more than {MAX_LOSS} points lost"


def _count_zeros(weight: NDArray[np.float32], stored: NDArray[Any] | None) -> dict[str, int | None]:
    """Number of zeros of a weight before and after the export, and of zeros that are no longer zero."""
    zero = weight == 0
    if stored is None or stored.shape != weight.shape:
        return {"before": int(zero.sum()), "after": None, "lost": 0}
    return {
        "before": int(zero.sum()),
        "after": int(np.count_nonzero(stored == 0)),
        "lost": int(np.count_nonzero(zero & (stored != 0))),
    }


def _compare_logits(source: Source, exported: Exported, task: Task | None) -> dict[str, float]:
    """Differences of the outputs at all tokens that are not padding."""
    model = Traced(source.model, source)
    greatest, relative, sequences = 0.0, [], 0
    for inputs in _random_inputs(source) if task is None else _task_inputs(source, task):
        wanted = [output.numpy() for output in model(*map(torch.from_numpy, inputs.values()))]
        real = inputs["attention_mask"].astype(bool)
        sequences += len(real)
        for name, expected, got in zip(source.outputs, wanted, exported.run(inputs), strict=True):
            per_token = expected.ndim == 3 or name in OUTPUTS["question answering"]
            for row, mask in enumerate(real):
                a, b = (output[row][mask] if per_token else output[row] for output in (expected, got))
                greatest = float(np.maximum(greatest, np.abs(a - b).max()))  # NaN stays NaN
                relative.append(float(np.linalg.norm(a - b) / max(np.linalg.norm(a), _TINY)))
    return {
        "sequences": sequences,
        "max_difference": greatest,
        "relative_l2_median": float(np.median(relative)),
        "relative_l2_max": float(np.max(relative)),
    }


def _random_inputs(source: Source) -> Iterator[Arrays]:
    """Random tokens in batches of several shapes; all sequences of a batch but the first are padded."""
    random = np.random.default_rng(0)
    config = source.model.config
    for batch, tokens in _SHAPES:
        ids = random.integers(0, config.vocab_size, (batch, min(tokens, longest_input(config))))
        ids[ids == config.pad_token_id] = ((config.pad_token_id or 0) + 1) % config.vocab_size  # it may be the last one
        mask = np.ones_like(ids)
        for row in range(1, batch):
            end = int(random.integers(1, ids.shape[1]))
            ids[row, end:], mask[row, end:] = config.pad_token_id or 0, 0
        types = np.zeros_like(ids)
        types[:, ids.shape[1] // 2 :] = 1
        yield dict(zip(source.inputs, (ids, mask, types), strict=False))


def _task_inputs(source: Source, task: Task) -> Iterator[Arrays]:
    """The first features of the validation rows."""
    data = next(iter(task.evaluations.values()))
    for begin in range(0, min(_ROWS, len(data)), _BATCH):
        batch = task.collate([data[index] for index in range(begin, min(begin + _BATCH, len(data), _ROWS))])
        yield _arrays(source, batch)


def _arrays(source: Source, batch: Mapping[str, torch.Tensor]) -> Arrays:
    zeros = torch.zeros_like(batch["input_ids"])  # token types, if the tokenizer returns none
    return {name: batch.get(name, zeros).numpy() for name in source.inputs}


def _compare_metrics(source: Source, exported: Exported, task: Task) -> dict[str, dict[str, float]]:
    by_torch = evaluate_model(source.model, task).values
    found = evaluate_model(_Runner(source, exported), task).values
    return {name: {"torch": by_torch[name], "exported": found[name]} for name in by_torch}


class _Runner(nn.Module):
    """An exported model with the interface of a transformers model, for `evaluate_model`."""

    def __init__(self, source: Source, exported: Exported) -> None:
        super().__init__()
        self.config, self._source, self._run = source.model.config, source, exported.run
        self.register_parameter("on_the_cpu", nn.Parameter(torch.empty(0)))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> SimpleNamespace:
        """(batch, tokens) int64 to the outputs by name."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            given["token_type_ids"] = token_type_ids
        outputs = self._run(_arrays(self._source, given))
        return SimpleNamespace(**dict(zip(self._source.outputs, map(torch.from_numpy, outputs), strict=True)))
