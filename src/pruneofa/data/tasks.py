"""Downstream tasks: any source of labelled text → token features, batches and labels."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pruneofa import families, recipe
from pruneofa.data import rows, squad
from pruneofa.errors import InputError

BUCKET = 50  # batches within which examples are sorted by length
_CHUNK = 1000  # rows per call of the tokenizer
_GLUE = "nyu-mll/glue"
_TEXT = {
    "sst2": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
}
_LABELS = {
    "sst2": ("negative", "positive"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "qqp": ("not_duplicate", "duplicate"),
}
_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
Item = dict[str, Any]


@dataclass(frozen=True)
class TaskData:
    """One split: the tokens of all features laid end to end, and the rows they were made from.

    `len()` counts features and `[i]` gives one as numpy arrays. In classification a feature is a row; in
    question answering it is a window, and several may come from one row.

    Attributes:
        ids: (tokens,) int32.
        types: (tokens,) uint8 segment ids, or None for models without them.
        bounds: (features + 1,) int64, where each feature begins in `ids`.
        targets: (features,) int64 class ids, (features, 2) first and last answer token, or None.
        rows: the raw table.
        windows: how features relate to the rows of question answering, else None.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.uint8] | None
    bounds: NDArray[np.int64]
    targets: NDArray[np.int64] | None
    rows: pa.Table
    windows: squad.Windows | None = None

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each feature, (features,) int64."""
        return np.diff(self.bounds)

    def __getitem__(self, index: int) -> Item:
        tokens = slice(self.bounds[index], self.bounds[index + 1])
        item: Item = {"input_ids": self.ids[tokens]}
        if self.types is not None:
            item["token_type_ids"] = self.types[tokens]
        if self.targets is not None and self.targets.ndim == 1:
            item["labels"] = int(self.targets[index])
        elif self.targets is not None:
            item["start_positions"], item["end_positions"] = map(int, self.targets[index])
        return item

    def train_dataset(self, batch: int, seed: int, epochs: int) -> "TrainDataset":
        """`epochs` passes over the features in shuffled batches of similar length; see `TrainDataset`."""
        return TrainDataset(self, batch, seed, epochs)


class TrainDataset(torch.utils.data.Dataset[Item]):
    """Features in training order: position → feature is a pure function of (seed, position).

    Read it in order (a sequential sampler) in batches of `batch`. Each epoch is a new permutation; within
    stretches of 50 batches features are sorted by length, so that a batch needs little padding, and then whole
    batches are shuffled. Every feature comes once per epoch; an epoch that does not divide into batches is
    filled up with the first features of its own permutation: no batch is short or straddles two epochs.
    """

    def __init__(self, data: TaskData, batch: int, seed: int, epochs: int) -> None:
        self.data, self.batch, self.seed, self.epochs = data, batch, seed, epochs
        self.steps_per_epoch = -(-len(data) // batch)
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch * self.batch

    def __getitem__(self, position: int) -> Item:
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        epoch, index = divmod(position, self.steps_per_epoch * self.batch)
        return self.data[int(self.order(epoch)[index])]

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Feature indices of one epoch, (steps_per_epoch · batch,) int64."""
        if epoch not in self._orders:
            if len(self._orders) > 1:  # a loader that fetches ahead needs the old epoch and the new one
                self._orders.pop(min(self._orders))
            self._orders[epoch] = self._shuffled(epoch)
        return self._orders[epoch]

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        random = np.random.default_rng([self.seed, epoch])
        order = np.resize(random.permutation(len(self.data)), self.steps_per_epoch * self.batch)
        lengths = self.data.lengths
        for begin in range(0, len(order), BUCKET * self.batch):
            stretch = order[begin : begin + BUCKET * self.batch]
            stretch[:] = stretch[np.argsort(lengths[stretch], kind="stable")]
        return random.permutation(order.reshape(-1, self.batch)).reshape(-1)


@dataclass(frozen=True)
class Task:
    """A downstream task, ready for training and evaluation.

    Attributes:
        labels: names by class id; empty for question answering.
        train: None where only the evaluation was asked for.
        evaluations: by the suffix of their metrics, `""` and for MNLI also `"_mm"`.
        fingerprint: hex sha256 of everything that training and evaluation see of the data.
    """

    name: str
    kind: Literal["classification", "qa"]
    labels: list[str]
    train: TaskData | None
    evaluations: dict[str, TaskData]
    fingerprint: str
    text: tuple[str, ...]
    max_length: int
    pad_token_id: int

    def model_kwargs(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`, which writes them to config.json; none for question answering."""
        if self.kind == "qa":
            return {}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
        }

    def collate(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """`collate` with this task's padding token and maximum length."""
        return collate(items, self.pad_token_id, max_length=self.max_length)


def collate(
    items: Sequence[Item], pad_token_id: int, *, multiple: int = 8, max_length: int | None = None
) -> dict[str, torch.Tensor]:
    """Stack items, padded on the right to the longest, rounded up to `multiple` but not beyond `max_length`.

    Returns:
        input_ids, token_type_ids if the items have it, and attention_mask: (batch, tokens) int64; labels, or
        start_positions and end_positions: (batch,) int64.
    """
    longest = max(len(item["input_ids"]) for item in items)
    width = -(-longest // multiple) * multiple
    if max_length is not None:
        width = max(longest, min(width, max_length))
    batch: dict[str, torch.Tensor] = {}
    for key in items[0]:
        if key in ("input_ids", "token_type_ids"):
            padded = np.full((len(items), width), pad_token_id if key == "input_ids" else 0, np.int64)
            for row, item in zip(padded, items, strict=True):
                row[: len(item[key])] = item[key]
            batch[key] = torch.from_numpy(padded)
        else:
            batch[key] = torch.tensor([item[key] for item in items], dtype=torch.int64)
    lengths = np.array([len(item["input_ids"]) for item in items])
    batch["attention_mask"] = torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64))
    return batch


def load_task(
    name: str,
    spec: recipe.Task,
    tokenizer: Any,
    *,
    data_root: str | Path | None = None,
    train: bool = True,
    whole: bool = False,
    labels: Sequence[str] | None = None,
    max_positions: int | None = None,
) -> Task:
    """Read and tokenize a task; nothing is written.

    `train_rows` and `validation_rows` keep the first rows of the splits, no sample of them.

    Args:
        name: sst2, mnli, qnli, qqp, squad, or any name when `spec` has data, text and label.
        spec: its section of the recipe; nulls are filled in by `resolved`.
        tokenizer: a transformers tokenizer.
        data_root: where relative paths are looked up.
        train: False leaves the training rows untokenized.
        whole: with `train` false, a file that brings no validation rows is evaluated whole, not only the tenth
            that training would have held out, and a folder needs no training split.
        labels: names by class id of a model that exists already; default: the GLUE names, or the sorted
            distinct values of the training rows.
        max_positions: longest input of the model (`longest_input`), where it is known already.

    Raises:
        InputError: one line that says what is wrong with the data.
    """
    spec, where = spec.resolved(name), f"tasks.{name}"
    max_length = _check_length(spec.max_length, tokenizer, max_positions, where)
    kind: Literal["classification", "qa"] = "qa" if name == "squad" else "classification"
    text = ("question", "context") if kind == "qa" else _names(spec.text) or _TEXT.get(name, ())
    label = None if kind == "qa" else spec.label or "label"
    evaluations = {"": ("validation",)}
    if name == "mnli":
        evaluations = {"": ("validation_matched", "validation"), "_mm": ("validation_mismatched",)}
    splits = rows.load_splits(
        spec.data or ("rajpurkar/squad" if kind == "qa" else _GLUE),
        where=where,
        evaluations=evaluations,
        key=("context",) if kind == "qa" else text,
        label=label,
        config=name if name in recipe.GLUE and spec.data in (None, _GLUE) else None,
        validation=spec.validation,
        strict=name in recipe.KNOWN_TASKS,
        whole=whole and not train,
        data_root=data_root,
    )
    if kind == "classification":
        if not 1 <= len(text) <= 2:
            raise InputError(f"{where}.text names {len(text)} columns, wanted one or two")
        given = _model_labels(labels, splits[""], str(label), where) if labels else None
        names = given or list(_LABELS.get(name, ())) or _distinct(splits.get("train", splits[""]), str(label), where)
    else:
        names = []
    features: dict[str, TaskData] = {}
    for split, table in splits.items():
        if split == "train" and not train:
            continue
        table = table.slice(0, spec.train_rows if split == "train" else spec.validation_rows)
        if kind == "qa":
            features[split] = _question_answering(table, spec, tokenizer, split == "train", where)
        else:
            targets = _targets(table, str(label), names, split, name in _LABELS, where, given is not None)
            features[split] = _classification(table, text, targets, tokenizer, max_length, where)
    trained = features.pop("train", None)
    if trained is not None and kind == "classification" and len(np.unique(trained.targets)) < 2:
        only = names[int(trained.targets[0])] if trained.targets is not None else ""
        raise InputError(f"{where}: all {len(trained)} training rows have the label {only!r}, wanted at least two")
    fingerprint = _fingerprint(kind, names, {"train": trained, **features}, where)
    pad = tokenizer.pad_token_id or 0
    return Task(name, kind, names, trained, features, fingerprint, tuple(text), max_length, pad)


def _names(value: str | list[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def longest_input(config: Any) -> int:
    """Tokens that a transformers model has positions for."""
    return config.max_position_embeddings - families.of(config.model_type).first_position(config.pad_token_id)


def _check_length(max_length: int | None, tokenizer: Any, max_positions: int | None, where: str) -> int:
    assert max_length is not None  # resolved() fills it
    if max_length > tokenizer.model_max_length:
        raise InputError(
            f"{where}: max_length is {max_length} but the tokenizer's limit is {tokenizer.model_max_length}; lower it"
        )
    if max_positions is not None and max_length > max_positions:
        raise InputError(f"{where}: max_length is {max_length} but the model has {max_positions} positions; lower it")
    return max_length


def _label_name(value: Any, row: int, column: str, where: str) -> str:
    """A label of any type as text; 1, 1.0, "1" and "1.0" are the same label."""
    if isinstance(value, list | tuple | dict):
        raise InputError(
            f"{where}: label column {column!r} holds a {type(value).__name__} in row {row}, wanted one class a row; "
            "several labels a row are not supported yet"
        )
    if value is None or (isinstance(value, float) and math.isnan(value)) or not (name := str(value).strip()):
        raise InputError(f"{where}: label column {column!r} is empty in row {row}")
    if isinstance(value, float) and not value.is_integer():
        raise _regression(name, row, column, where)
    if isinstance(value, float):
        return str(int(value))
    return str(int(name.partition(".")[0])) if re.fullmatch(r"[-+]?\d+\.0+", name) else name


def _label_names(table: pa.Table, column: str, where: str, known: Sequence[str] = ()) -> list[str]:
    """The labels as text. Raises InputError for numbers that are no classes, unless they are `known` labels."""
    values = rows.column(table, column, "label", where).to_pylist()
    names = [_label_name(value, row, column, where) for row, value in enumerate(values, 1)]
    if set(names) <= set(known):
        return names
    if all(name[0] == "[" and name[-1] == "]" for name in names):
        _label_name([names[0]], 1, column, where)
    if all(re.fullmatch(_NUMBER, name) for name in names):
        for row, name in enumerate(names, 1):
            if not float(name).is_integer():
                raise _regression(name, row, column, where)
    return names


def _regression(name: str, row: int, column: str, where: str) -> InputError:
    return InputError(
        f"{where}: label column {column!r} holds the number {name} in row {row}, wanted classes; "
        "regression is not supported yet"
    )


def _model_labels(labels: Sequence[str], table: pa.Table, column: str, where: str) -> list[str] | None:
    """The labels of a model; None where they were never named, and the table has names for them."""
    if any(name != f"LABEL_{index}" for index, name in enumerate(labels)):
        return list(labels)
    numbers = {str(index) for index in range(len(labels))}
    found = set(_label_names(table, column, where, labels))
    return list(labels) if found <= numbers or found <= set(labels) else None


def _distinct(table: pa.Table, column: str, where: str) -> list[str]:
    names = set(_label_names(table, column, where))
    whole = all(name.lstrip("-").isdecimal() for name in names)
    return sorted(names, key=int) if whole else sorted(names)


def _targets(
    table: pa.Table, column: str, labels: list[str], split: str, known: bool, where: str, of_model: bool = False
) -> NDArray[np.int64]:
    """Class ids; a known task's labels may be names or the numbers of GLUE.

    Labels `of_model` may be its class ids where none of its names is found.
    """
    numbers = {str(index): index for index in range(len(labels))}
    ids = {label: index for index, label in enumerate(labels)}
    ids |= {str(int(label.partition(".")[0])): i for label, i in ids.items() if re.fullmatch(r"[-+]?\d+\.0+", label)}
    if known:
        ids |= numbers
    names = _label_names(table, column, where, labels)
    if of_model and (found := set(names)) <= set(numbers) and not found & set(ids):
        ids = numbers
    unknown = next(((row, name) for row, name in enumerate(names, 1) if name not in ids), None)
    if unknown is None:
        return np.fromiter((ids[name] for name in names), np.int64, len(names))
    row, name = unknown
    place = "training" if split == "train" else f"validation{split}"
    if known and name == "-1":
        raise InputError(f"{where}: label -1 in {place} row {row}: the split has no labels (GLUE test); use another")
    among = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
    raise InputError(f"{where}: label {name!r} in {place} row {row} is not one of the labels known: {among}")


def _classification(
    table: pa.Table,
    text: Sequence[str],
    targets: NDArray[np.int64],
    tokenizer: Any,
    max_length: int,
    where: str,
) -> TaskData:
    texts = [rows.text_column(table, name, where).to_pylist() for name in text]
    typed = "token_type_ids" in tokenizer.model_input_names
    ids: list[NDArray[np.int32]] = []
    types: list[NDArray[np.uint8]] = []
    lengths: list[int] = []
    for begin in range(0, table.num_rows, _CHUNK):
        batch = tokenizer(
            *(column[begin : begin + _CHUNK] for column in texts),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=typed,
        )
        lengths.extend(map(len, batch["input_ids"]))
        ids.append(np.fromiter(chain.from_iterable(batch["input_ids"]), np.int32))
        if typed:
            types.append(np.fromiter(chain.from_iterable(batch["token_type_ids"]), np.uint8))
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TaskData(np.concatenate(ids), np.concatenate(types) if typed else None, bounds, targets, table)


def _question_answering(table: pa.Table, spec: recipe.Task, tokenizer: Any, train: bool, where: str) -> TaskData:
    spans = None
    if train:
        table, spans = squad.good_answers(table, skip=spec.skip_bad_answers, where=where)
    else:
        squad.gold_answers(table, where)
    windows = squad.cut_windows(table, tokenizer, max_length=spec.max_length or 0, stride=spec.stride or 0, where=where)
    targets = None if spans is None else squad.token_spans(windows, spans)
    return TaskData(windows.ids, windows.types, windows.bounds, targets, table, windows)


def _fingerprint(kind: str, labels: list[str], splits: dict[str, TaskData | None], where: str) -> str:
    digest = hashlib.sha256(json.dumps([kind, labels]).encode())
    for name, data in splits.items():
        if data is None:
            continue
        digest.update(name.encode())
        for array in (data.ids, data.types, data.bounds, data.targets):
            if array is not None:
                digest.update(array.tobytes())
        if kind == "qa":
            digest.update(squad.content(data.rows, where))
    return digest.hexdigest()
