"""Tables for `predict`: written, predicted and read."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pruneofa.serve import chunks
from pruneofa.serve.batch import predict_files
from tests.tiny import WORDS, write_folder

HEADS = {
    "classifier": "ForSequenceClassification",
    "answers": "ForQuestionAnswering",
    "tokens": "ForTokenClassification",
    "masks": "ForMaskedLM",
    "vectors": "Model",
}
ROWS = 60


def write_models(tmp_path_factory):
    """Folders of tiny models by what they do."""
    root = tmp_path_factory.mktemp("models")
    return {name: write_folder(root / name, head) for name, head in HEADS.items()}


def rows(count=ROWS):
    """Rows whose texts have commas, quotes, and line breaks of two kinds alone, and lengths of 1 to 12 words."""
    random = np.random.default_rng(0)
    words = [word for word in WORDS.split() if not word.startswith("#")]
    ends = (', "x"\ny é', "\ny", "\ry")
    return [
        {"id": str(i), "text": " ".join(random.choice(words, random.integers(1, 12))) + ends[i % 3]}
        for i in range(count)
    ]


def write(path, given):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(given), path, row_group_size=25)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in given), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, given[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(given)
    return path


def read(path):
    """Rows of a file as Python objects; the results of CSV are understood."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with open(path, newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    for row in found:
        row |= {"score": float(row["score"]), "scores": json.loads(row["scores"])}
    return found


def predict(model, files, out, **settings):
    return predict_files(model, files, out, threads=1, **{"rows": 16} | settings)


def parts(out):
    return [part for folder in out.parent.glob(f".{out.name}.*.parts") for part in chunks.find_parts(folder)]
