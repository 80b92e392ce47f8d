"""`pruneofa serve`: its options. Heavy imports happen when it is called."""

import argparse
import os
import signal
from pathlib import Path
from typing import NoReturn

from pruneofa.cli.options import ISAS
from pruneofa.cli.show import say
from pruneofa.errors import InputError, short

KEY = "PRUNEOFA_API_KEY"
_MOST = 1 << 40
_RANGES = {
    "port": (0, 65_535),
    "workers": (1, 1024),
    "threads": (1, 1024),
    "max_batch_tokens": (1, _MOST),
    "max_concurrent_requests": (1, _MOST),
    "max_client_batch_size": (1, _MOST),
    "payload_limit": (1, _MOST),
    "grace": (0, 86_400),
}


def describe(verb: argparse.ArgumentParser) -> None:
    """Serve models over HTTP: routes of text-embeddings-inference, OpenAI, Cohere, Open Inference, and a page."""
    verb.epilog = "example: pruneofa serve packed-folder; pruneofa serve ranks=one-folder vectors=another --port 8080"
    add = verb.add_argument
    add("models", nargs="+", metavar="[NAME=]MODEL",
        help="folder or hub id, packed or not; the name defaults to the folder's. Where a request names no model, the "
        "first that does the task answers")  # fmt: skip
    add("--host", default="127.0.0.1", metavar="HOST",
        help="address to listen on (default 127.0.0.1: this machine only; 0.0.0.0: every network)")  # fmt: skip
    add("--port", type=int, default=3000, metavar="N", help="port to listen on (default 3000; 0: any free one)")
    add("--workers", type=int, default=1, metavar="N",
        help="processes that each load the models (default 1: all threads in one)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="compute threads of each worker (default: the CPUs over the workers)")
    add("--precision", choices=["int8", "fp32"], default="int8", help="of the engine (default int8)")
    add("--isa", metavar="ISA", help=f"{ISAS} (default: the fastest here)")
    add("--max-batch-tokens", type=int, default=2048, metavar="N", help="tokens computed together (default 2048)")
    add("--max-concurrent-requests", type=int, default=512, metavar="N",
        help="inputs in flight; more are refused with 429 (default 512)")  # fmt: skip
    add("--max-client-batch-size", type=int, metavar="N",
        help="inputs of one request (default 32, or --max-concurrent-requests where that is less; 2048 of OpenAI's "
        "embeddings)")  # fmt: skip
    add("--payload-limit", type=int, default=2_000_000, metavar="BYTES", help="of a request's body (default 2000000)")
    add("--no-auto-truncate", action="store_true",
        help="refuse inputs that are too long unless the request says truncate")  # fmt: skip
    add("--api-key-file", type=Path, metavar="FILE",
        help=f"file with the bearer token that clients must send (or set {KEY})")  # fmt: skip
    add("--grace", type=int, default=30, metavar="S", help="seconds for open requests after SIGTERM (default 30)")
    add("--otlp-endpoint", metavar="URL",
        help="OpenTelemetry collector for spans of requests, as http://localhost:4318 (default: none)")  # fmt: skip
    add("--no-access-log", action="store_true", help="do not write a line of JSON per request to stderr")
    verb.set_defaults(call=_call)


def _call(options: argparse.Namespace) -> int:
    from pruneofa.serve.settings import check_client_batch_size

    models = [_named(given) for given in options.models]
    names = [name for name, _ in models]
    if len(set(names)) < len(names):
        raise InputError(f"models are named {', '.join(names)}; give each a name of its own, as in NAME=MODEL")
    for name, (least, most) in _RANGES.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name.replace('_', '-')} is {short(value)}, wanted {least} to {most}")
    check_client_batch_size(
        options.max_client_batch_size,
        options.max_concurrent_requests,
        ("--max-client-batch-size", "--max-concurrent-requests"),
    )
    key = _key(options.api_key_file)
    # Until the server has handlers of its own: the first process of a container gets no signal that it does not handle.
    signal.signal(signal.SIGTERM, _end)
    # Each worker's engine computes in its own threads; a second pool in the tokenizer would only compete with it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from pruneofa.serve.server import serve
        from pruneofa.serve.settings import Settings
    except ImportError as error:
        raise ImportError(f"serving needs Starlette and uvicorn ({error}): pip install 'pruneofa[serve]'") from None
    settings = Settings(
        max_batch_tokens=options.max_batch_tokens,
        max_concurrent_requests=options.max_concurrent_requests,
        max_client_batch_size=options.max_client_batch_size,
        auto_truncate=not options.no_auto_truncate,
        payload_limit=options.payload_limit,
        api_key=key,
        access_log=not options.no_access_log,
    )
    engine = {"precision": options.precision, "threads": _threads(options), "isa": options.isa}

    def ready(url: str) -> None:
        say(f"serving {', '.join(names)} on {url}", 0)

    return serve(
        models,
        settings,
        host=options.host,
        port=options.port,
        workers=options.workers,
        grace=options.grace,
        engine=engine,
        otlp_endpoint=options.otlp_endpoint,
        ready=ready,
    )


def _end(*_: object) -> NoReturn:
    raise SystemExit(0)


def _named(given: str) -> tuple[str, str]:
    """The name and the path of NAME=MODEL, or of MODEL alone."""
    from pruneofa.serve.settings import NOT_IN_NAMES

    name, equals, path = given.partition("=")
    if not equals or os.path.exists(given):
        path = given
        name = Path(given).resolve().name if os.path.exists(given) else given.rstrip("/").rpartition("/")[2]
    if not name or "/" in name or not path:
        raise InputError(f"{given}: wanted a model, or NAME=MODEL with a name without a slash")
    if not name.isprintable() or NOT_IN_NAMES & set(name):
        raise InputError(f"{given}: clients cannot ask for a model of this name; give it another, as in NAME=MODEL")
    return name, path


def _key(file: Path | None) -> str | None:
    """The bearer token of a file, or of the environment."""
    from pruneofa.serve.settings import check_key

    if file is None:
        key, name = os.environ.get(KEY), KEY
        if key is None:
            return None
    else:
        name = f"--api-key-file {file}"
        try:
            key = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{name}: cannot be read ({error}); name a text file with the key") from None
    key = key.strip()
    check_key(key, name)
    return key


def _threads(options: argparse.Namespace) -> int | None:
    if options.threads is not None or options.workers == 1:
        return options.threads
    from pruneofa.engine.threads import choose_threads

    return max(1, choose_threads(None).count // options.workers)
