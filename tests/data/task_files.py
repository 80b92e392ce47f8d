"""Rows of tasks, and files of them."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pruneofa import recipe

GOOD, BAD = ("a great film", "the good book was great"), ("a terrible game", "the bad story was terrible music")
ROWS = [
    {"text": f"{text} {n}", "label": label} for n in range(20) for label, texts in (("pos", GOOD), ("neg", BAD))
    for text in texts
]  # fmt: skip


def write(path: Path, table: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(table), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(table[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(table)
    return path


def own(**values) -> recipe.Task:
    return recipe.Task(**{"text": "text", "label": "label", "max_length": 32, **values})


def sst2(folder: Path, train=((0, "bad film"), (1, "good film")), validation=((1, "a great film"),)) -> Path:
    for split, pairs in (("train", train), ("validation", validation)):
        write(folder / f"{split}.parquet", [{"sentence": text, "label": label} for label, text in pairs])
    return folder


def not_utf8() -> pa.Array:
    """A column of strings that are not UTF-8, as programs write that do not check it."""
    return pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xff bad"]).buffers())
