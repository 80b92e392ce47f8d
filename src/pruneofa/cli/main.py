"""The command line: parse, call, print. Heavy imports happen inside the verbs."""

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from pruneofa import __version__
from pruneofa.cli import (
    bench,
    demo,
    evaluate,
    export,
    inspect,
    pack,
    prune,
    quantize,
    run,
    serve,
    table,
    transfer,
    unpack,
    verify,
)
from pruneofa.cli.show import say
from pruneofa.errors import CheckFailed, InputError

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
        warnings.showwarning = lambda message, *_: say(f"warning: {message}", 0)
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: Sequence[str]) -> int:
    options = _parser(arguments)
    try:
        code = options.call(options)
        sys.stdout.flush()
        return code
    except InputError as error:
        return say(f"error: {error}", 3 if _disk_is_full(error) else 2)
    except CheckFailed as error:
        return say(f"failed: {error}", 1)
    except KeyboardInterrupt as stop:
        after = stop.args[0] if stop.args else "the same command resumes from the last checkpoint"
        return say(f"interrupted; {after}", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, ImportError) and error.name is None:  # ours, where an extra is missing
            return say(f"error: {error}", 3)
        if _disk_is_full(error):
            reason = " ".join(str(error).split())
            return say(f"error: disk full: {reason}; free space, the same command resumes from the last checkpoint", 3)
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


VERBS: list[tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = [
    ("run", "carry out a recipe, from raw text to model card", run.describe),
    ("demo", "the whole method in minutes, on text this machine has", demo.describe),
    ("prune", "teacher preparation and pruning alone", prune.describe),
    ("transfer", "fine-tune a sparse model on a task, pattern locked", transfer.describe),
    ("quantize", "make an int8 model of a task model, zeros kept", quantize.describe),
    ("evaluate", "metrics of a task model, packed or not", evaluate.describe),
    ("inspect", "sparsity per layer, pattern hash, sizes", inspect.describe),
    ("verify", "prove that a derived model keeps the pattern", verify.describe),
    ("pack", "store a model at a fraction of its size", pack.describe),
    ("unpack", "make a Hugging Face folder of a packed one", unpack.describe),
    ("export", "write it for ONNX Runtime, OpenVINO or compressed-tensors", export.describe),
    ("bench", "speed, memory and size beside the peers", bench.describe),
    ("serve", "answer over HTTP, as text-embeddings-inference does", serve.describe),
    ("table", "join results.json files into one table", table.describe),
]
