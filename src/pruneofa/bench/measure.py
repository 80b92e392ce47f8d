"""Time the engine and the installed peers on a case: same weights, inputs and threads; outputs are verified first.

Every runner has its own process (`peers.py`) and runs only on request. Runs alternate between the processes, so that
other load on the machine affects all of them equally. No torch in this process.
"""

import contextlib
import difflib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruneofa import __version__
from pruneofa.bench.figures import TOLERANCES, error_of, statistics, summary
from pruneofa.bench.machine import buffers, ceilings, machine, versions
from pruneofa.bench.models import DEFAULT_MIXED, Case, Model, Settings
from pruneofa.bench.peers import CAPPING, PEERS, PRUNEOFA, REFERENCE, Peer
from pruneofa.bench.workers import TimeLimitError, Worker, WorkerError
from pruneofa.errors import CheckFailed, InputError
from pruneofa.formats.files import fingerprint, read_json

ROUNDS = 10  # rounds per process; the timed runs are spread over them
MIN_RUNS, MIN_SECONDS = 3, 20.0  # a runner with this many runs and this many seconds needs no further round
SETTLE = 0.05  # seconds until the threads of the previous process have stopped spinning
ARTIFACTS = 2  # increase when other files are exported for the same case
TOGETHER = (None, 8, 4, 1)  # rows that a peer may be given at a time, sorted by length; None: the batch as it is


class Bench:
    """The checked settings, the chosen peers, and the environment of their processes."""

    def __init__(self, settings: Settings) -> None:
        """Raises InputError as `run` does."""
        from pruneofa.engine.engine import Engine, choose_isa
        from pruneofa.engine.threads import choose_threads

        available = Engine.available_isas()
        self.settings = settings
        self.threads = choose_threads(settings.threads).count
        self.isa = choose_isa(settings.isa) if available else ""
        self.cap = self.isa if available and self.isa != available[-1] else None
        self.peers, self.left_out = choose(settings, self.cap)
        self._load = os.getloadavg()[0]
        if settings.repeats < 1:
            raise InputError(f"repeats is {settings.repeats}, wanted at least 1")
        if not settings.limit > 0:
            raise InputError(f"limit is {settings.limit:g} seconds, wanted more than 0")

    def steps(self, models: int) -> int:
        """Number of progress units of one case."""
        runners = models + len(self.peers)
        return sum(bool(peer.artifact) for peer in self.peers) + models + runners * (1 + self._rounds)

    @property
    def _rounds(self) -> int:
        return min(ROUNDS, self.settings.repeats)

    def head(self) -> dict[str, Any]:
        """What identifies a record: versions, machine, settings."""
        return {
            "pruneofa": __version__,
            "machine": machine() | {"load_average": [self._load, os.getloadavg()[0]]},
            "versions": versions(),
            "threads": self.threads,
            "isa": self.isa,
            "capped": self.cap is not None,
            "precision": self.settings.precision,
            "repeats": self.settings.repeats,
            "peak": self.settings.peak,
        }

    def environment(self, peer: Peer) -> dict[str, str]:
        """Variables of a peer's process."""
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1",
                 "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        kept = {name: value for name, value in os.environ.items() if name not in (*CAPPING, "PRUNEOFA_ISA")}
        return kept | quiet | threads | (dict(peer.caps.get(self.cap, {})) if self.cap else {})

    def worker(self, peer: Peer, root: Path, *, here: bool = False, program: str = "peers") -> Worker:
        """A process of `program` for `peer`; `here`: by this interpreter in any case."""
        python = None if here else self.settings.pythons.get(peer.name)
        log, limit = root / f"{peer.name}.log", self.settings.limit
        return Worker(peer.name, log, self.environment(peer), python, limit, program)

    def measure(
        self, case: Case, models: Sequence[Model], root: Path, advance: Callable[..., None]
    ) -> Iterator[dict[str, Any]]:
        """Prepare, load, verify and time all runners on one case; yields the row so far whenever one has run."""
        config = read_json(models[0].folder / "config.json")
        inputs = root / f"{case.name}.npz"
        arrays: dict[str, Any] = dict(case.inputs(models[0].rows("word"), config.get("pad_token_id") or 0))
        np.savez(inputs, **arrays)
        with self._artifacts(models[0], case, root) as artifacts, contextlib.ExitStack() as stack:
            jobs = {model.label: self._job(model, artifacts, inputs) for model in models}
            first = jobs[models[0].label]
            for peer in [peer for peer in self.peers if peer.artifact and peer.name not in self.left_out]:
                advance(note=f"{case.name}: preparing {peer.name}")
                with (
                    self.tried(peer.name, case.name),
                    self.worker(peer, root, here=True, program="peer_files") as worker,
                ):
                    worker.ask("prepare", peer=peer.name, job=first)
            wanted = {}
            for model in models:
                advance(note=f"{case.name}: reference output of {model.label}")
                wanted[model.label] = self._reference(jobs[model.label], root)
            runners = [(label, PEERS[PRUNEOFA], job) for label, job in jobs.items()]
            runners += [(peer.name, peer, first) for peer in self.peers if peer.name not in self.left_out]
            loaded: list[tuple[Worker, dict[str, Any]]] = []
            for label, peer, job in runners:
                advance(note=f"{case.name}: loading {label}")
                with self.tried(label, case.name, fatal=peer.name == PRUNEOFA):
                    if peer.divides and len(case.lengths) > 1:
                        job = job | {"together": self._together(peer, job, case, root)}
                    worker = stack.enter_context(self.worker(peer, root))
                    row = self._load_and_verify(worker, label, job, wanted.get(label, wanted[models[0].label]))
                    loaded.append((worker, row))
            yield from self._time(case, models[0], loaded, advance)

    def _job(self, model: Model, artifacts: Path, inputs: Path) -> dict[str, Any]:
        paths = {"folder": model.folder, "packed": model.packed, "artifacts": artifacts, "inputs": inputs}
        own = {"threads": self.threads, "isa": self.isa, "precision": self.settings.precision}
        return {name: str(path.absolute()) for name, path in paths.items()} | own

    @contextlib.contextmanager
    def _artifacts(self, model: Model, case: Case, root: Path) -> Iterator[Path]:
        """Folder of the exported models of a case: kept for later runs if `work` is set, otherwise temporary."""
        if self.settings.work is not None:
            key = fingerprint([model.manifest.source, versions(), ARTIFACTS])[:16]
            folder = self.settings.work / key / case.name
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
            return
        with tempfile.TemporaryDirectory(dir=root) as folder:
            yield Path(folder)

    def _together(self, peer: Peer, job: Mapping[str, Any], case: Case, root: Path) -> int | None:
        """With which of TOGETHER the peer is fastest; a way that fails is recorded as left out. None if all fail."""
        seconds: dict[int | None, float] = {None: math.inf}
        for together in TOGETHER:
            if together is not None and together >= len(case.lengths):
                continue
            given = {"peer": peer.name, "job": dict(job) | {"together": together}}
            way = f"{peer.name}, {together or 'all'} at a time"
            with self.tried(way, case.name), self.worker(peer, root) as worker:
                worker.ask("start", **given)
                worker.ask("build", **given)
                seconds[together] = min(worker.ask("time", key=peer.name, count=2)["seconds"])
        return min(seconds, key=seconds.__getitem__)

    @contextlib.contextmanager
    def tried(self, label: str, where: str, *, fatal: bool = False) -> Iterator[None]:
        """Record a peer that fails or exceeds the time limit as left out; the other peers continue."""
        try:
            yield
        except TimeLimitError as error:
            if fatal:
                raise InputError(f"{where}: {label} {error}") from None
            self.left_out[label] = f"{where}: {error}"
        except WorkerError as error:
            if fatal:
                kind, _, message = str(error).partition(": ")
                raise InputError(message) if kind == "InputError" else error from None
            self.left_out[label] = f"{where}: {error}"

    def _reference(self, job: Mapping[str, Any], root: Path) -> NDArray[np.float32] | None:
        """The output of torch in fp32; None if torch is not installed."""
        peer = PEERS[REFERENCE]
        if peer.missing():
            return None
        path = root / "reference.npy"
        with self.worker(peer, root, here=True) as worker:
            try:
                worker.ask("start", peer=peer.name, job=job)
                worker.ask("build", peer=peer.name, job=job)
                worker.ask("save", peer=peer.name, job=job, path=str(path))
            except WorkerError as error:
                raise InputError(f"{job['folder']}: torch cannot run this model ({error})") from None
        return np.load(path)

    def _load_and_verify(
        self, worker: Worker, label: str, job: Mapping[str, Any], wanted: NDArray[np.float32] | None
    ) -> dict[str, Any]:
        peer = PEERS[worker.peer]
        kind = self.settings.precision if peer.name == PRUNEOFA else peer.kind
        baseline = worker.ask("start", peer=peer.name, job=job)["baseline"]
        row: dict[str, Any] = {"name": label, "peer": peer.name, "kind": kind, "dense": peer.dense}
        row |= {"together": job.get("together")}
        row |= worker.ask("build", peer=peer.name, job=job)
        path = Path(job["inputs"]).with_name("output.npy")
        worker.ask("save", peer=peer.name, job=job, path=str(path))
        row |= {"baseline": baseline, "disk": peer.size(job), "tolerance": TOLERANCES[kind]}
        if wanted is not None:
            with np.load(job["inputs"]) as stored:
                mask = stored["attention_mask"] == 1 if "attention_mask" in stored else None
            row["error"] = error_of(np.load(path), wanted, kind, mask)
            row["verified"] = bool(row["error"] <= row["tolerance"])
            if peer.name != PRUNEOFA and not math.isfinite(row["error"]):
                raise WorkerError("its output has another shape, or contains NaN or infinity")
            if peer.name == PRUNEOFA and not row["verified"]:
                raise CheckFailed(
                    f"{label}: error {row['error']:.3g} against torch fp32, wanted at most {row['tolerance']:g}; "
                    "it was not timed"
                )
        else:
            row |= {"error": None, "verified": None}
        return row

    def _time(
        self, case: Case, model: Model, loaded: Sequence[tuple[Worker, dict[str, Any]]], advance: Callable[..., None]
    ) -> Iterator[dict[str, Any]]:
        count = math.ceil(self.settings.repeats / self._rounds)
        time.sleep(SETTLE)
        limits: dict[str, Any] = buffers() | {"before": self._ceilings(), "after": None}
        seconds: dict[str, list[float]] = {row["name"]: [] for _, row in loaded}
        for turn in range(self._rounds):
            alive = [(worker, row) for worker, row in loaded if row["name"] not in self.left_out]
            shift = turn % len(alive)
            for worker, row in alive[shift:] + alive[:shift]:  # so that the order of the runners changes
                name, peer = row["name"], row["peer"]
                advance(note=f"{case.name}: {name}")
                if len(seconds[name]) >= MIN_RUNS and sum(seconds[name]) > MIN_SECONDS:
                    continue
                time.sleep(SETTLE)
                with self.tried(name, case.name, fatal=peer == PRUNEOFA):
                    seconds[name] += worker.ask("time", key=peer, count=count)["seconds"]
                    row["peak"] = worker.ask("memory")["peak"]
                yield self._row(case, model, loaded, seconds, limits)
        time.sleep(SETTLE)
        yield self._row(case, model, loaded, seconds, limits | {"after": self._ceilings()})

    def _ceilings(self) -> dict[str, dict[str, float]]:
        return ceilings(self.isa, self.settings.precision, self.threads)

    def _row(
        self,
        case: Case,
        model: Model,
        loaded: Sequence[tuple[Worker, dict[str, Any]]],
        seconds: Mapping[str, Sequence[float]],
        limits: Mapping[str, Any],
    ) -> dict[str, Any]:
        timed = [one for _, one in loaded if seconds[one["name"]] and one["name"] not in self.left_out]
        runners = [one | statistics(seconds[one["name"]]) for one in timed]
        return summary(case, model.operations(case), runners, self.settings.peak, limits)


def settings_of(options: Any) -> Settings:
    """The settings from the command line's options. Raises InputError for a --python that is not PEER=FILE."""
    pythons = {}
    for spec in options.python:
        peer, _, file = spec.partition("=")
        if not os.access(file, os.X_OK):
            raise InputError(f"--python {spec}: wanted PEER=FILE, where FILE is a Python interpreter that has PEER")
        pythons[peer] = file
    same = ("path", "random", "sparsity", "pattern", "batch", "threads", "isa", "precision", "repeats", "work", "peak",
            "limit")  # fmt: skip
    return Settings(
        **{name: getattr(options, name) for name in same},
        also=tuple(options.also),
        seq=tuple(options.seq),
        mixed=tuple(options.mixed or [DEFAULT_MIXED]) if options.mixed is not None else (),
        peers=None if options.peers is None else () if options.peers == ["none"] else tuple(options.peers),
        pythons=pythons,
    )


def choose(settings: Settings, cap: str | None) -> tuple[list[Peer], dict[str, str]]:
    """The peers to run, and for each of the others the reason why it is left out.

    Raises:
        InputError: an unknown peer, or a requested one that is not installed.
    """
    known = [name for name in PEERS if name != PRUNEOFA]
    for name in (*(settings.peers or ()), *settings.pythons):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0)[0]
            raise InputError(f"peer {name!r} is unknown, wanted {', '.join(known)} or none; did you mean {near}?")
    chosen, left_out = [], {}
    for name in known if settings.peers is None else dict.fromkeys(settings.peers):
        peer = PEERS[name]
        missing = peer.missing(elsewhere=name in settings.pythons)
        if missing and settings.peers is not None:
            raise InputError(f"peer {name}: {', '.join(missing)} not installed; run: pip install {peer.packages}")
        if missing:
            left_out[name] = f"not installed ({', '.join(missing)}): pip install {peer.packages}"
        elif cap is not None and cap not in peer.caps:
            left_out[name] = f"cannot be limited to {cap}"
        else:
            chosen.append(peer)
    return chosen, left_out
