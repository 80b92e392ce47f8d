"""The command line: parse, call, print. Heavy imports happen inside the verbs."""

import argparse
import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pruneofa import __version__
from pruneofa.bench.verb import bench
from pruneofa.errors import CheckFailed, InputError
from pruneofa.export_verb import export
from pruneofa.options import EVALUATED, add_fields, add_training, read_fields, read_task, refuse_unused

EXAMPLES = """\
examples:
  pruneofa demo                                        everything, in minutes, on text this machine already has
  pruneofa run minilm-90 --set data_root=DATA          one row of the table, from raw text to model card
  pruneofa transfer Intel/bert-base-uncased-sparse-90-unstructured-pruneofa out --task sst2
  pruneofa verify runs/minilm-90/sparse runs/minilm-90/tasks/sst2/seed-0/transfer

exit codes: 0 done, 1 a check failed, 2 wrong input, 3 anything else (disk full, a package missing), 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `pruneofa`; returns the exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _say(f"warning: {message}", 0)
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: Sequence[str]) -> int:
    options = _parser(arguments)
    try:
        code = options.call(options)
        sys.stdout.flush()
        return code
    except InputError as error:
        return _say(f"error: {error}", 3 if _disk_is_full(error) else 2)
    except CheckFailed as error:
        return _say(f"failed: {error}", 1)
    except KeyboardInterrupt as stop:
        after = stop.args[0] if stop.args else "the same command resumes from the last checkpoint"
        return _say(f"interrupted; {after}", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, ImportError) and error.name is None:  # ours, where an extra is missing
            return _say(f"error: {error}", 3)
        if _disk_is_full(error):
            reason = " ".join(str(error).split())
            return _say(f"error: disk full: {reason}; free space, the same command resumes from the last checkpoint", 3)
        import traceback

        traceback.print_exc()
        return 3


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether no space was left, here or in what led here: libraries raise errors of their own over the system's."""
    messages = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
    while error is not None:
        text = str(error)
        # torch's zip writer says only that bytes went missing.
        torch = "inline_container.cc" in text and ("unexpected pos" in text or "write failed" in text)
        if torch or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(m in text for m in messages):
            return True
        error = error.__cause__ or error.__context__
    return False


def _say(message: str, code: int) -> int:
    sys.stderr.write(f"pruneofa: {message}\n")
    return code


class _Parser(argparse.ArgumentParser):
    """Errors on one line, like all others."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is; exit 2."""
        self.exit(2, f"pruneofa: error: {' '.join(message.split())}; see {self.prog} --help\n")


def _parser(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="pruneofa",
        description="Prune a pretrained encoder once, then fine-tune the sparse model to every task.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, help_text, describe in VERBS:
        verb = verbs.add_parser(name, help=help_text, description=describe.__doc__)
        # Options generated from the recipe's models need pydantic: only the verb that is called pays for it.
        if next((word for word in arguments if not word.startswith("-")), None) == name:
            describe(verb)
    return parser.parse_args(arguments)


def _run(verb: argparse.ArgumentParser) -> None:
    """Carry out a recipe: finished stages are skipped, a broken one resumes."""
    verb.add_argument(
        "recipe", nargs="+", help="recipe file(s), later ones win key by key; or the name of a shipped one"
    )
    verb.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key (repeatable)")
    verb.add_argument("--out", type=Path, help="the run's folder (default: runs/NAME)")
    verb.add_argument("--dry-run", action="store_true", help="print the stages, their cost, and what would be skipped")
    verb.add_argument("--redo", action="store_true", help="make stages again whose settings changed")
    verb.add_argument("--json", action="store_true", help="print results as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa import recipe

        loaded = recipe.load([_recipe_file(name) for name in options.recipe], options.set)
        folder = options.out or Path("runs") / loaded.name
        if options.dry_run:
            from pruneofa.train.estimate import estimate

            rows = estimate(loaded, folder)
            _print(rows, options.json, lambda: _table(rows))
            return 0
        from pruneofa.train import pipeline

        _print_results(pipeline.run(loaded, folder, redo=options.redo), folder, options.json)
        return 0

    verb.set_defaults(call=call)


def _demo(verb: argparse.ArgumentParser) -> None:
    """Everything, on real text that is already on this machine: the documentation of the installed Python."""
    verb.add_argument("--out", type=Path, default=Path("runs/demo"), help="the run's folder (default: runs/demo)")
    verb.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key of recipes/demo.yaml")
    verb.add_argument("--redo", action="store_true", help="make stages again whose settings changed")
    verb.add_argument("--json", action="store_true", help="print results as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa.train import demo

        results = demo.run_demo(options.out, _recipe_file("demo"), options.set, redo=options.redo)
        _print_results(results, options.out, options.json)
        if not options.json:
            sys.stdout.write(demo.next_steps(options.out))
        return 0

    verb.set_defaults(call=call)


def _prune(verb: argparse.ArgumentParser) -> None:
    """Teacher preparation and pruning alone: MODEL and plain text in, a sparse pre-trained model out."""
    from pruneofa import recipe

    verb.usage = "pruneofa prune MODEL OUT --corpus.source TEXT [options]"
    verb.epilog = (
        "example: pruneofa prune google-bert/bert-base-uncased sparse --corpus.source wiki/ --prune.final 0.85"
    )
    verb.add_argument("model", help="folder or hub id of a dense encoder")
    verb.add_argument("out", type=Path, help="folder of the sparse model; OUT-teacher holds the prepared teacher")
    verb.add_argument("--no-teacher", action="store_true", help="distil from MODEL as it is")
    sections = {
        "corpus": recipe.Corpus,
        "teacher": recipe.Teacher,
        "prune": recipe.Prune,
        "distill": recipe.Distill,
    }
    for name, model in sections.items():
        add_fields(verb, model, f"{name}.")
    add_training(verb)

    def call(options: argparse.Namespace) -> int:
        from pruneofa.train import alone

        values: dict[str, Any] = {"name": options.out.name, "model": options.model, "seed": options.seed}
        values |= {"precision": options.precision, "data_root": options.data_root}
        for name, model in sections.items():
            values[name] = read_fields(options, model, f"{name}.")
        if options.no_teacher:
            values["teacher"] = None
        metrics = alone.prune(recipe.validate(recipe.Recipe, values), options.out, redo=options.redo)
        _print({"out": str(options.out), **metrics}, options.json)
        return 0

    verb.set_defaults(call=call)


def _transfer(verb: argparse.ArgumentParser) -> None:
    """Fine-tune an existing sparse model on a task, its sparsity pattern locked."""
    from pruneofa import recipe

    verb.usage = (
        "pruneofa transfer SPARSE OUT (--task T | --data FILE --text A [B] --label L) [--teacher DIR] [options]"
    )
    verb.epilog = "example: pruneofa transfer runs/minilm-90/sparse out --data reviews.csv --text review --label stars"
    verb.add_argument("sparse", help="folder or hub id of a model whose zeros are its pattern")
    verb.add_argument("out", type=Path, help="folder of the task model")
    verb.add_argument("--task", metavar="T", help="sst2, mnli, qnli, qqp or squad; or a name for your own --data")
    # They set how a run trains the dense teacher and the int8 model.
    add_fields(verb, recipe.Task, "", without=("dense_epochs", "dense_lr", "qat_epochs", "qat_lr", "qat_rows"))
    add_training(verb)

    def call(options: argparse.Namespace) -> int:
        from pruneofa.train import alone

        name, spec = read_task(options)
        _say_pattern(options.sparse)
        if spec.teacher is None:
            sys.stderr.write("no --teacher given: learning from the task's own labels alone\n")
            spec = spec.model_copy(update={"hard": 1.0, "kd": 0.0, "hidden": 0.0})
        training = {"seed": options.seed, "precision": options.precision}
        root, redo = options.data_root, options.redo
        metrics = alone.transfer(options.sparse, options.out, name, spec, data_root=root, redo=redo, **training)
        _print({"out": str(options.out), **metrics}, options.json)
        return 0

    verb.set_defaults(call=call)


def _quantize(verb: argparse.ArgumentParser) -> None:
    """Make an int8 model of a task model: train through int8 arithmetic, its zeros locked; or round it as it is.

    OUT is an ordinary Hugging Face folder whose weights are on the int8 grid, with its scales in quantization.json
    and quantization.safetensors beside them; `pruneofa pack OUT PACKED` stores and the engine computes just that.
    """
    from pruneofa import recipe

    verb.usage = (
        "pruneofa quantize FOLDER OUT (--task T | --data FILE --text A [B] --label L) [--teacher DIR | --ptq] [options]"
    )
    verb.epilog = (
        "example: pruneofa quantize runs/minilm-90/tasks/sst2/seed-0/transfer out --task sst2 --data sst2 "
        "--teacher runs/minilm-90/tasks/sst2/seed-0/teacher"
    )
    verb.add_argument("folder", help="folder or hub id of a task model; its zeros are kept")
    verb.add_argument("out", type=Path, help="folder of the int8 model")
    verb.add_argument("--task", metavar="T", help="sst2, mnli, qnli, qqp or squad; or a name for your own --data")
    ptq = "post-training quantization: no training, static ranges from --calibration examples; takes seconds"
    verb.add_argument("--ptq", action="store_true", help=ptq)
    add_fields(verb, recipe.Quantize, "", without=("ptq",), title="int8")
    # They set how a run trains the models that this verb is given.
    add_fields(verb, recipe.Task, "", without=("dense_epochs", "dense_lr", "epochs", "lr"))
    add_training(verb)

    def call(options: argparse.Namespace) -> int:
        from pruneofa.train import alone

        name, spec = read_task(options)
        refuse_unused(options)
        values = read_fields(options, recipe.Quantize, "") | {"ptq": options.ptq}
        settings = recipe.validate(recipe.Quantize, values)
        _say_pattern(options.folder)
        if spec.teacher is None and not options.ptq:
            sys.stderr.write("no --teacher given: learning from the task's own labels alone\n")
            spec = spec.model_copy(update={"hard": 1.0, "kd": 0.0, "hidden": 0.0})
        training = {"seed": options.seed, "precision": options.precision}
        root, redo = options.data_root, options.redo
        metrics = alone.quantize(
            options.folder, options.out, name, spec, settings, data_root=root, redo=redo, **training
        )
        _print({"out": str(options.out), **metrics}, options.json)
        return 0

    verb.set_defaults(call=call)


def _evaluate(verb: argparse.ArgumentParser) -> None:
    """Metrics of any task model's folder: a packed one by the engine, another one by torch or by the engine.

    Task data is read and tokenized by the train extra, for the engine too: pip install '.[train]'.
    """
    from pruneofa import recipe

    verb.usage = "pruneofa evaluate PATH (--task T | --data FILE --text A [B] --label L) [options]"
    verb.epilog = "example: pruneofa evaluate runs/minilm-90/tasks/sst2/seed-0/transfer --task sst2 --data sst2"
    verb.add_argument("path", help="folder or hub id of a task model")
    verb.add_argument("--task", metavar="T", help="sst2, mnli, qnli, qqp or squad; or a name for your own --data")
    add_fields(verb, recipe.Task, "", only=EVALUATED)
    verb.add_argument("--data-root", help="relative data paths are resolved here")
    group = verb.add_argument_group("engine")
    group.add_argument("--engine", action="store_true", help="by the engine, as packed folders are in any case")
    choice = "of the engine (default int8), or fp32 instead of the int8 that torch simulates of a quantized folder"
    group.add_argument("--precision", choices=["int8", "fp32"], help=choice)
    group.add_argument("--threads", type=int, metavar="N", help="of the engine (default: one per CPU)")
    group.add_argument("--isa", metavar="ISA", help="hold the engine to amx, avx512vnni, avx2 or scalar")
    verb.add_argument("--json", action="store_true", help="print as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa.train.evaluate import evaluate

        name, spec = read_task(options)
        engine = {key: getattr(options, key) for key in ("engine", "precision", "threads", "isa")}
        _print(evaluate(options.path, name, spec, data_root=options.data_root, whole=True, **engine), options.json)
        return 0

    verb.set_defaults(call=call)


def _say_pattern(path: str) -> None:
    from pruneofa import pattern
    from pruneofa.train.models import with_safetensors

    sparsity = pattern.inspect(with_safetensors(path))["encoder"]
    sys.stderr.write(f"locking the pattern of {path}: {100 * sparsity:.2f} % of its encoder's weights are zero\n")
    if sparsity == 0:
        _say(f"warning: {path} has no zeros to keep: the result will be dense; name a sparse model", 0)


def _pack(verb: argparse.ArgumentParser) -> None:
    """Store a Hugging Face folder at a fraction of its size: a bit per weight, and the non-zeros.

    int8 keeps the scales of `pruneofa quantize`. Embedding tables are int8 too, even where training left them float.
    """
    verb.epilog = "example: pruneofa pack runs/minilm-90/tasks/sst2/seed-0/transfer packed"
    verb.add_argument("folder", help="folder or hub id; its zeros are the pattern")
    verb.add_argument("out", type=Path, help="the packed folder; must not exist, or be empty")
    choice = "int8 (default), or fp32: unpack gives every bit back"
    verb.add_argument("--precision", choices=["int8", "fp32"], default="int8", help=choice)
    verb.add_argument("--compress", action="store_true", help="zstd over the tensors: smaller to send, slower to load")
    verb.add_argument("--json", action="store_true", help="print the manifest as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa import packed, packing

        found = packing.pack(options.folder, options.out, precision=options.precision, compress=options.compress)
        if note := packing.unlike_training(options.folder, options.precision):
            _say(f"note: {note}", 0)
        _print(found, options.json, lambda: _show_model(packed.inspect(options.out), layers=False))
        return 0

    verb.set_defaults(call=call)


def _unpack(verb: argparse.ArgumentParser) -> None:
    """Make a Hugging Face folder of a packed one: bit-identical from fp32, the rounded values from int8."""
    verb.epilog = "example: pruneofa unpack packed model"
    verb.add_argument("packed", help="packed folder or hub id")
    verb.add_argument("out", type=Path, help="the Hugging Face folder; must not exist, or be empty")
    verb.add_argument("--json", action="store_true", help="print as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa import packing

        packing.unpack(options.packed, options.out)
        _print({"out": str(options.out)}, options.json)
        return 0

    verb.set_defaults(call=call)


def _inspect(verb: argparse.ArgumentParser) -> None:
    """Sparsity per layer, non-zeros, pattern hash and sizes of a model folder, packed or not."""
    verb.add_argument("path", help="folder or hub id")
    verb.add_argument("--engine", action="store_true", help="how the engine multiplies each layer here, and why")
    verb.add_argument("--json", action="store_true", help="print as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa import manifest, packed, pattern

        module = packed if manifest.is_packed(pattern.local_folder(options.path)) else pattern
        found = module.inspect(options.path)
        if options.engine:
            from pruneofa.engine import Engine

            precision = "int8" if found.get("precision", "int8") == "int8" else "fp32"
            engine = Engine.from_pretrained(options.path, precision=precision)
            layers = dict(engine.choices())
            found["engine"] = {"isa": engine.isa, "activations": engine.activations, "layers": layers}
        _print(found, options.json, lambda: _show_model(found))
        return 0

    verb.set_defaults(call=call)


def _show_model(found: dict[str, Any], layers: bool = True) -> None:
    if layers:
        _table([{"layer": name, **values} for name, values in found["layers"].items()])
    _table([{"": k, "value": v} for k, v in found.items() if not isinstance(v, dict)])
    _table([{"stored as": k, "MB": v / 1e6} for k, v in found["sizes"].items()])
    if "engine" in found:
        where = f"on {found['engine']['isa']}, {found['engine']['activations']} activations"
        _table([{where: k, "choice": v} for k, v in found["engine"]["layers"].items()])


def _verify(verb: argparse.ArgumentParser) -> None:
    """Prove that every zero of BASE's pattern is exactly zero in DERIVED; exit 1 if not."""
    verb.add_argument("base", help="the sparse pre-trained model")
    verb.add_argument("derived", help="a model made from it")
    verb.add_argument("--json", action="store_true", help="print as JSON")

    def call(options: argparse.Namespace) -> int:
        from pruneofa import pattern

        found = pattern.verify(options.base, options.derived)

        def show() -> None:
            for layer in found["revived"]:
                sys.stdout.write(f"revived: {layer['layer']}: {layer['count']} weights\n")
            for layer in found["missing"]:
                sys.stdout.write(f"missing: {layer}\n")
            if found["missing_pooler"]:
                sys.stdout.write("the pooler is missing in the derived model (question-answering heads drop it)\n")
            sys.stdout.write(f"{'ok' if found['ok'] else 'FAILED'}: {found['extra_zeros']} zeros more than the base\n")

        _print(found, options.json, show)
        return 0 if found["ok"] else 1

    verb.set_defaults(call=call)


def _results_table(verb: argparse.ArgumentParser) -> None:
    """Join results.json files into the published table's layout (Markdown)."""
    verb.add_argument("results", nargs="+", type=Path, help="results.json files, or the folders that hold them")
    verb.add_argument("--json", action="store_true", help="print the results as one JSON list")

    def call(options: argparse.Namespace) -> int:
        from pruneofa.train.card import read_results, write_table

        results = [read_results(path) for path in options.results]
        _print(results, options.json, lambda: sys.stdout.write(write_table(results)))
        return 0

    verb.set_defaults(call=call)


VERBS: list[tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = [
    ("run", "carry out a recipe, from raw text to model card", _run),
    ("demo", "the whole method in minutes, on text this machine has", _demo),
    ("prune", "teacher preparation and pruning alone", _prune),
    ("transfer", "fine-tune a sparse model on a task, pattern locked", _transfer),
    ("quantize", "make an int8 model of a task model, zeros kept", _quantize),
    ("evaluate", "metrics of a task model, packed or not", _evaluate),
    ("inspect", "sparsity per layer, pattern hash, sizes", _inspect),
    ("verify", "prove that a derived model keeps the pattern", _verify),
    ("pack", "store a model at a fraction of its size", _pack),
    ("unpack", "make a Hugging Face folder of a packed one", _unpack),
    ("export", "write it for ONNX Runtime, OpenVINO or compressed-tensors", export),
    ("bench", "speed, memory and size beside the peers", bench),
    ("table", "join results.json files into one table", _results_table),
]


def _recipe_file(name: str) -> Path:
    """A path, or the name of a recipe that ships with the package."""
    if name.endswith((".yaml", ".yml")) or os.sep in name or Path(name).exists():
        return Path(name)
    here = Path(__file__).parent
    for folder in (here / "recipes", here.parents[1] / "recipes"):
        if (folder / f"{name}.yaml").exists():
            return folder / f"{name}.yaml"
    return Path(name)


def _print(value: Any, as_json: bool, show: Callable[[], Any] | None = None) -> None:
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
    elif show is not None:
        show()
    else:
        _table([{"": key, "value": item} for key, item in value.items()])


def _print_results(results: dict[str, Any], folder: Path, as_json: bool) -> None:
    def show() -> None:
        from pruneofa.train.card import write_table

        sys.stdout.write(write_table([results], drop_empty=True))
        files = ["results.json", "table.md", "report.html", "sparse/README.md"]
        sys.stdout.write("\n" + "".join(f"{folder / file}\n" for file in files if (folder / file).exists()))

    if results:  # empty in all processes of a torchrun but the first
        _print(results, as_json, show)


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in rows[0] if rows else []:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
