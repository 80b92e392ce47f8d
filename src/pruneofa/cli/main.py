"""The command line: parse, call, print. Heavy imports happen inside the verbs."""

import argparse
import difflib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pruneofa import __version__
from pruneofa.cli import (
    bench,
    demo,
    evaluate,
    export,
    inspect,
    pack,
    predict,
    prune,
    quantize,
    run,
    serve,
    table,
    transfer,
    unpack,
    verify,
)
from pruneofa.cli.options import with_option_names
from pruneofa.cli.show import printable_lines, say
from pruneofa.errors import CheckFailed, InputError, explained, printable

EXAMPLES = """\
examples:
  pruneofa demo                                        the whole method in minutes, on text of this machine
  pruneofa run minilm-90 --set data_root=DATA          a whole recipe, from plain text to model card
  pruneofa transfer runs/minilm-90/sparse out --task sst2
  pruneofa verify runs/minilm-90/sparse runs/minilm-90/tasks/sst2/seed-0/transfer

exit codes: 0 done, 1 a check failed, 2 wrong input, 3 anything else (disk full, a package missing), 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `pruneofa`; returns the exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _main(sys.argv[1:] if arguments is None else arguments)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {message}", 0)


def _main(arguments: Sequence[str]) -> int:
    options = argparse.Namespace()
    try:
        options = _parser(arguments)
        if getattr(options, "offline", False):
            os.environ["HF_HUB_OFFLINE"] = "1"  # read by the libraries of the hub when they are imported
        code = options.call(options)
        sys.stdout.flush()
        return code
    except CheckFailed as error:
        return say(f"failed: {error}", 1)
    except KeyboardInterrupt as stop:
        resumes = _verb(arguments) in RESUMED
        after = "the same command resumes from the last checkpoint" if resumes else "run the same command again"
        after = stop.args[0] if stop.args else after
        return say(f"interrupted; {after}", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        if found := explained(error):
            line = with_option_names(found[0], options) if isinstance(error, InputError) else found[0]
            return say(f"error: {line}", found[1])
        if not isinstance(error, Exception):
            raise
        import traceback

        sys.stderr.write(printable_lines("".join(traceback.format_exception(error))))
        return 3


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all other errors, and that takes no abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Print the error and where to find help; exit with code 2."""
        self.exit(2, f"pruneofa: error: {printable(' '.join(message.split()))}; see {self.prog} --help\n")


def _parser(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="pruneofa",
        description="Prune a pretrained encoder once, then fine-tune the sparse model to every task.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    called = _verb(arguments)
    for name, help_text, describe in VERBS:
        verb = verbs.add_parser(name, help=help_text, description=describe.__doc__)
        # Options generated from the recipe's models need pydantic, so only the verb that is called adds its options.
        if name == called:
            describe(verb)
            if name not in LOCAL:
                verb.add_argument("--offline", action="store_true", help=OFFLINE)
    options, unknown = parser.parse_known_args(arguments)
    if unknown and called:
        verb = verbs.choices[called]
        shown = [action for action in verb._actions if action.help is not argparse.SUPPRESS]
        flags = [flag for action in shown for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1)
        hint = f"; did you mean {near[0]}" if near else ""
        verb.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return options


def _verb(arguments: Sequence[str]) -> str | None:
    return next((word for word in arguments if not word.startswith("-")), None)


RESUMED = ("run", "demo", "prune", "transfer", "quantize")  # verbs that write checkpoints
LOCAL = ("table",)  # verbs that never ask the hub
OFFLINE = "never ask the Hugging Face hub; models and data sets in its cache are still found by their ids"
VERBS: list[tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = [
    ("run", "run a recipe, from plain text to model card", run.describe),
    ("demo", "run the whole method in minutes, on text of this machine", demo.describe),
    ("prune", "prune a dense encoder on plain text", prune.describe),
    ("transfer", "fine-tune a sparse model on a task, pattern locked", transfer.describe),
    ("quantize", "quantize a task model to int8, pattern locked", quantize.describe),
    ("evaluate", "compute the metrics of a task model", evaluate.describe),
    ("inspect", "print sparsity per layer, pattern hash and sizes", inspect.describe),
    ("verify", "check that a derived model keeps the pattern", verify.describe),
    ("pack", "store a model without its zeros", pack.describe),
    ("unpack", "convert a packed folder to a Hugging Face folder", unpack.describe),
    ("export", "export for ONNX Runtime, OpenVINO or compressed-tensors", export.describe),
    ("bench", "compare speed, memory and size with other runtimes", bench.describe),
    ("serve", "answer over HTTP, as text-embeddings-inference does", serve.describe),
    ("predict", "predict tables of texts: the same rows with results", predict.describe),
    ("table", "join results.json files into one table", table.describe),
]
