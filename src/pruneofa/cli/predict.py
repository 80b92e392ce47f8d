"""The verb `predict`."""

import argparse

from pruneofa.cli.options import ISAS
from pruneofa.cli.show import print_value


def describe(verb: argparse.ArgumentParser) -> None:
    """Predict tables of texts with the engine: the same rows with results out. Needs no torch.

    Reads .csv, .tsv, .jsonl and .parquet (pip install 'pruneofa[predict]'), in parts, so memory does not grow with the
    files. Stopped or killed, the same command continues with the parts that are complete; no row is lost or repeated.
    """
    verb.usage = "pruneofa predict MODEL FILE... --out OUT [options]"
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.epilog = """\
columns of results:
  classification         label, score, scores (of every label)
  question answering     answer, start, end (characters of the context), score
  token classification   entities: label, score, word, start, end of each
  masked words           masks: label, score, scores of each
  embeddings             embedding: a list of fixed size in parquet, JSON in .csv and .tsv

examples:
  pruneofa predict packed reviews.csv --text review --out labelled.csv
  pruneofa predict packed-embedder shards/*.parquet --out vectors --processes 8
  pruneofa predict packed-squad questions.jsonl --question q --context passage --out answers.parquet
"""
    add = verb.add_argument
    add("model", metavar="MODEL", help="folder, packed or not, or hub id")
    add("files", metavar="FILE", nargs="+", help="table of texts; the suffix is the format")
    out = (
        "FILE.csv, .tsv, .jsonl or .parquet for the rows of all files, in order; otherwise a folder, one file per file"
    )
    add("--out", required=True, metavar="OUT", help=out)
    group = verb.add_argument_group("columns")
    column = group.add_argument
    column("--text", metavar="COLUMN", help='texts (default: "text", or the only column)')
    column("--text-pair", metavar="COLUMN", help="second texts, for a model of pairs")
    column("--question", metavar="COLUMN", help='questions (default "question")')
    column("--context", metavar="COLUMN", help='contexts of the questions (default "context")')
    column("--prefix", default="", metavar="P", help="put before the names of the columns of results")
    group = verb.add_argument_group("rows")
    row = group.add_argument
    row("--truncate", action="store_true", help="cut texts that are too long for the model (default: an error)")
    skip = "write nulls for a row without text, or too long, and count it (default: an error that names the row)"
    row("--skip-bad", action="store_true", help=skip)
    row("--rows", type=int, default=4096, metavar="N", help="rows of a part: what a kill loses (default 4096)")
    row("--redo", action="store_true", help="replace OUT, and unfinished parts with other settings")
    group = verb.add_argument_group("engine")
    engine = group.add_argument
    engine("--processes", type=int, default=1, metavar="N", help="processes that load the model each (default 1)")
    engine("--threads", type=int, metavar="N", help="threads of all processes together (default: one per core)")
    engine("--precision", choices=["int8", "fp32"], default="int8", help="int8 (default) or fp32")
    engine("--isa", metavar="ISA", help=f"instruction set: {ISAS} (default: the fastest)")
    add("--json", action="store_true", help="print the summary as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa.serve.batch import predict_files

        names = (
            *("processes", "threads", "rows", "redo", "text", "text_pair", "question", "context", "prefix"),
            *("truncate", "skip_bad", "precision", "isa"),
        )
        settings = {name: getattr(options, name) for name in names}
        print_value(predict_files(options.model, options.files, options.out, **settings), options.json)
        return 0

    verb.set_defaults(call=call)
