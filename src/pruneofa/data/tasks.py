"""Downstream tasks: any source of labelled text → a task with its labels and the features of each split."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pruneofa import families, recipe
from pruneofa.data import rows, squad
from pruneofa.data.classes import Classes, find_classes
from pruneofa.data.features import Item, TaskData, collate
from pruneofa.errors import InputError

EPOCH_ROWS = "epochs"  # key of the rows held out for evaluation after every epoch
_SPLITS = {"train": "training", EPOCH_ROWS: "held-out training"}  # as messages name them
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


@dataclass(frozen=True)
class Task:
    """A downstream task, ready for training and evaluation.

    Attributes:
        labels: names by class id; empty for question answering.
        train: None if only the evaluation rows were requested.
        evaluations: by the suffix of their metrics, `""` and for MNLI also `"_mm"`.
        train_fingerprint: hex sha256 of everything that training sees of the data; of no rows where train is None.
        evaluation_fingerprint: the same of evaluation.
        held_out: (rows held out for evaluation, rows in all) of data without evaluation rows, else None.
        epoch_rows: rows held out of training, to be evaluated after every epoch; None without `spec.check_epochs`.
        names_by_id: the names that the data's own file gives to class ids; None if it gives none.
    """

    name: str
    kind: Literal["classification", "qa"]
    labels: list[str]
    train: TaskData | None
    evaluations: dict[str, TaskData]
    train_fingerprint: str
    evaluation_fingerprint: str
    text: tuple[str, ...]
    pad_token_id: int
    held_out: tuple[int, int] | None = None
    epoch_rows: TaskData | None = None
    names_by_id: list[str] | None = None

    def model_kwargs(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`, which writes them to config.json; none for question answering."""
        if self.kind == "qa":
            return {}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
        }

    def notes(self) -> Iterator[str]:
        """A line about rows that are longer than `max_length`, and one about rows without text, if there are any."""
        splits = [data for data in (self.train, self.epoch_rows, *self.evaluations.values()) if data is not None]
        rows, longest = sum(map(len, splits)), max(int(data.lengths.max()) for data in splits)
        if cut := sum(data.cut for data in splits):
            yield (
                f"tasks.{self.name}: {cut:,} of {rows:,} rows are cut to {longest} tokens, the rest of them is not "
                "seen; raise max_length for more"
            )
        if blank := sum(data.blank for data in splits):
            yield f"tasks.{self.name}: {blank:,} of {rows:,} rows have no text, and count like the others"

    def collate(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """`collate` with this task's padding token."""
        return collate(items, self.pad_token_id)


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

    `train_rows` and `validation_rows` keep the first rows of the splits, not a sample.

    Args:
        name: sst2, mnli, qnli, qqp, squad, or any name when `spec` has data, text and label.
        spec: its section of the recipe; nulls are filled in by `resolved`.
        tokenizer: a transformers tokenizer.
        data_root: where relative paths are looked up.
        train: False leaves the training rows untokenized.
        whole: with `train` false, a file without validation rows is evaluated whole, not only the tenth
            that training would have held out, and a folder needs no training split.
        labels: names by class id of a model that exists already; default: the GLUE names, or the sorted
            distinct values of the training rows.
        max_positions: longest input of the model (`longest_input`), where it is known already.

    Raises:
        InputError: the data do not fit the task, the tokenizer or the model, or a setting is of another kind of task.
    """
    spec, where = spec.resolved(name), f"tasks.{name}"
    _refuse_unused(name, spec, where)
    max_length = _check_length(spec.max_length, tokenizer, max_positions, where)
    text, column = text_columns(name, spec), spec.label or "label"
    if name != "squad":
        _check_columns(text, column, where)
    splits, held_out = _read_splits(name, spec, text, column, where, train=train, whole=whole, data_root=data_root)
    known = _LABELS.get(name, ())
    classes = None if name == "squad" else find_classes(splits, column, where, known=known, of_model=labels)
    if train and spec.check_epochs:
        chosen = splits["train"].slice(0, spec.train_rows)
        splits["train"], splits[EPOCH_ROWS] = rows.hold_out(chosen, *_key(name, text, column), where, part=1)

    def tokenized(split: str, table: pa.Table) -> TaskData:
        if split != EPOCH_ROWS:
            table = table.slice(0, spec.train_rows if split == "train" else spec.validation_rows)
        if classes is None:
            return _question_answering(table, spec, tokenizer, split, where)
        targets = classes.ids(table, _SPLITS.get(split, f"validation{split}"))
        return _classification(table, text, targets, tokenizer, max_length, where)

    features = {split: tokenized(split, table) for split, table in splits.items() if train or split != "train"}
    trained, epoch_rows = features.pop("train", None), features.pop(EPOCH_ROWS, None)
    if classes is not None and trained is not None:
        _refuse_one_class(trained, classes, where)
    kind: Literal["classification", "qa"] = "qa" if classes is None else "classification"
    names = [] if classes is None else classes.names
    return Task(
        name,
        kind,
        labels=names,
        train=trained,
        evaluations=features,
        train_fingerprint=_fingerprint(kind, names, {"train": trained, EPOCH_ROWS: epoch_rows}, where),
        evaluation_fingerprint=_fingerprint(kind, names, features, where),
        text=tuple(text),
        pad_token_id=tokenizer.pad_token_id or 0,
        held_out=held_out,
        epoch_rows=epoch_rows,
        names_by_id=None if classes is None else classes.by_id,
    )


def _check_columns(text: Sequence[str], column: str, where: str) -> None:
    if column in text:
        raise InputError(f"{where}.label is the text column {column!r}, wanted the column of the classes; set it")
    if not 1 <= len(text) <= 2:
        raise InputError(f"{where}.text names {len(text)} columns, wanted one or two")


def _refuse_one_class(trained: TaskData, classes: Classes, where: str) -> None:
    targets = trained.targets
    assert targets is not None
    if len(np.unique(targets)) < 2:
        only = classes.names[int(targets[0])]
        raise InputError(f"{where}: all {len(targets)} training rows have the label {only!r}, wanted at least two")


def _refuse_unused(name: str, spec: recipe.Task, where: str) -> None:
    """Raises InputError for a setting of the other kind of task, which would have no effect."""
    squad = name == "squad"
    reason = "the data of squad have the columns question, context and answers" if squad else "only squad uses it"
    for key in ("text", "label") if squad else ("stride", "skip_bad_answers"):
        if (value := getattr(spec, key)) is not None and value is not False:
            raise InputError(f"{where}.{key} is {value!r}, but {reason}; {'rename the columns, and ' * squad}omit it")


def _read_splits(
    name: str,
    spec: recipe.Task,
    text: Sequence[str],
    column: str,
    where: str,
    *,
    train: bool,
    whole: bool,
    data_root: str | Path | None,
) -> tuple[dict[str, pa.Table], tuple[int, int] | None]:
    """The rows of each split, and (rows held out for evaluation, rows in all) of data without evaluation rows."""
    evaluations = {"": ("validation",)}
    if name == "mnli":
        evaluations = {"": ("validation_matched", "validation"), "_mm": ("validation_mismatched",)}
    splits = rows.load_splits(
        spec.data or ("rajpurkar/squad" if name == "squad" else _GLUE),
        where=where,
        evaluations=evaluations,
        config=name if name in recipe.GLUE and spec.data in (None, _GLUE) else None,
        validation=spec.validation,
        strict=name in recipe.KNOWN_TASKS,
        whole=whole and not train,
        data_root=data_root,
    )
    if "" in splits:
        return splits, None
    total = splits["train"].num_rows
    splits["train"], splits[""] = rows.hold_out(splits["train"], *_key(name, text, column), where)
    return splits, (splits[""].num_rows, total)


def _key(name: str, text: Sequence[str], column: str) -> tuple[Sequence[str], str | None]:
    """The columns by which rows are held out, those of one context together, and the column of the classes."""
    return (("context",), None) if name == "squad" else (text, column)


def text_columns(name: str, spec: recipe.Task) -> tuple[str, ...]:
    """The columns of a task's texts: one, or two for pairs."""
    return ("question", "context") if name == "squad" else _names(spec.text) or _TEXT.get(name, ())


def _names(value: str | list[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def longest_input(config: Any) -> int:
    """Maximum number of tokens of a transformers model, by its position embeddings."""
    return config.max_position_embeddings - families.of(config.model_type).first_position(config.pad_token_id)


def token_types(config: Any) -> int:
    """Number of token types of a transformers model; 0 if it has no embeddings of them."""
    return config.type_vocab_size if families.of(config.model_type).token_types else 0


def _check_length(max_length: int | None, tokenizer: Any, max_positions: int | None, where: str) -> int:
    assert max_length is not None  # resolved() fills it
    if max_length > tokenizer.model_max_length:
        raise InputError(
            f"{where}.max_length is {max_length} but the tokenizer's limit is {tokenizer.model_max_length}; lower it"
        )
    if max_positions is not None and max_length > max_positions:
        raise InputError(f"{where}.max_length is {max_length} but the model has {max_positions} positions; lower it")
    return max_length


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
    cut = 0
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
        cut += sum(bool(encoding.overflowing) for encoding in batch.encodings)
        ids.append(np.fromiter(chain.from_iterable(batch["input_ids"]), np.int32))
        if typed:
            types.append(np.fromiter(chain.from_iterable(batch["token_type_ids"]), np.uint8))
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    blank = lengths.count(tokenizer.num_special_tokens_to_add(pair=len(texts) == 2))
    kinds = np.concatenate(types) if typed else None
    return TaskData(np.concatenate(ids), kinds, bounds, targets, table, cut=cut, blank=blank)


def _question_answering(table: pa.Table, spec: recipe.Task, tokenizer: Any, split: str, where: str) -> TaskData:
    spans = None
    if split in ("train", EPOCH_ROWS):
        table, spans = squad.good_answers(table, skip=spec.skip_bad_answers, where=where)
    else:
        squad.gold_answers(table, where)
    windows = squad.cut_windows(table, tokenizer, max_length=spec.max_length or 0, stride=spec.stride or 0, where=where)
    targets = None if spans is None or split != "train" else squad.token_spans(windows, spans)
    return TaskData(windows.ids, windows.types, windows.bounds, targets, table, windows)


def _fingerprint(kind: str, labels: list[str], splits: Mapping[str, TaskData | None], where: str) -> str:
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
