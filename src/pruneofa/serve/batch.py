"""Files of texts: the same rows with results, in parts that survive the process, joined at the end."""

import glob
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pruneofa import __version__
from pruneofa.engine.threads import choose_threads
from pruneofa.errors import CheckFailed, InputError
from pruneofa.formats.files import (
    file_fingerprint,
    fingerprint,
    new_file,
    new_folder,
    output_folder,
    read_json,
    recover,
    recover_like,
    remove_folder,
    user_path,
    write_json,
)
from pruneofa.formats.hub import FILES
from pruneofa.formats.locks import exclusive
from pruneofa.formats.tensors import weights_folder
from pruneofa.progress import progress
from pruneofa.serve import tables
from pruneofa.serve.chunks import Chunk, Job, Part, compute, find_parts

ROWS = 4096  # per part: what a kill loses, and what a process holds in memory
_RECORD = "prediction.json"
_JOINED = "joined"  # in the folder of parts, once OUT is about to be put in place
_MORE_ROWS = ("truncate", "skip_bad")  # parts made without them hold only rows for which they change nothing


def predict_files(
    model: str | Path,
    files: Sequence[str | Path],
    out: str | Path,
    *,
    processes: int = 1,
    threads: int | None = None,
    rows: int = ROWS,
    redo: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Write the rows of `files` with results to `out`; called again after it was killed, it continues.

    Args:
        model: folder, packed or not, or hub id.
        files: .parquet, .jsonl, .csv or .tsv.
        out: a file with one of these suffixes, for the rows of all files in order; or a folder, for a file per file.
        processes: number of processes, each with the model in memory.
        threads: compute threads of all processes together; default: as in `Engine.from_pretrained`.
        rows: rows of a part.
        redo: replace `out` if it exists, and unfinished parts that have other settings.
        settings: those of `serve.predictor.Predictor`: columns, prefix, truncate, skip_bad, precision, isa.

    Returns:
        {"out", "rows", "skipped", "resumed": rows found in parts, "seconds", "rows_per_second": of those computed now}.

    Raises:
        InputError: a file, row, column or setting is wrong, `out` exists, or other settings or another process are at
            work there.
    """
    for name, value in (("--processes", processes), ("--rows", rows)):
        if value < 1:
            raise InputError(f"{name} is {value}, wanted at least 1")
    target, paths = output_folder(out), [user_path(file) for file in files]
    _check_paths(target, paths)
    settings |= {
        "model": str(weights_folder(model).absolute()),
        "threads": max(1, choose_threads(threads).count // processes),
    }
    record = _record(target, paths, settings, rows)
    try:
        with exclusive(target, name=out, out="--out"):
            recover(target)
            work = _work_folder(target, record, redo)
            try:
                return _predict(target, paths, Job(settings, {}, work), processes, record)
            finally:
                if work.exists() and not find_parts(work):  # nothing to continue with
                    remove_folder(work)
    except (PermissionError, NotADirectoryError) as error:
        raise InputError(f"{error.filename or out}: {error.strerror}; choose another --out") from None


def _check_paths(target: Path, paths: Sequence[Path]) -> None:
    for path in paths:
        tables.check_file(path)
        if target.exists() and (os.path.samefile(path, target) or path.resolve().is_relative_to(target)):
            raise InputError(f"{path}: is read and would be replaced; choose another --out")
    if _is_folder(target):
        if target.suffix and not target.is_dir():
            raise InputError(f"{target}: got {target.suffix!r}, wanted {', '.join(tables.SUFFIXES)}, or a folder")
        if twice := [name for name, count in Counter(path.name for path in paths).items() if count > 1]:
            raise InputError(f"{twice[0]} is the name of two files, which cannot both lie in {target}; rename one")
    elif target.is_dir():
        raise InputError(f"{target}: is a folder with the name of a file; choose another --out")
    elif target.suffix == ".parquet":
        import pruneofa.serve.arrow  # noqa: F401 - says what to install


def _is_folder(target: Path) -> bool:
    return target.suffix not in tables.SUFFIXES


def _record(target: Path, paths: Sequence[Path], settings: dict[str, Any], rows: int) -> dict[str, Any]:
    """What decides the rows of the output. Processes and threads do not."""
    folder = Path(settings["model"])
    weights = sorted({file for pattern in FILES for file in folder.glob(pattern)} | set(folder.glob("*/config.json")))
    described = {key: value for key, value in settings.items() if key not in ("model", "threads")}
    return {
        "version": __version__,
        "format": target.suffix,
        "files": [_state(path) for path in paths],
        "model": fingerprint([(str(file.relative_to(folder)), file_fingerprint(file)) for file in weights]),
        "rows": rows,
        **{key: value for key, value in described.items() if value not in (None, False, "")},
    }


def _state(path: Path) -> list[Any]:
    found = path.stat()
    return [str(path.absolute()), found.st_size, found.st_mtime_ns]


def _work_folder(target: Path, record: dict[str, Any], redo: bool) -> Path:
    """The folder of parts for this record, made if need be. Raises InputError if something else is in its place."""
    key = fingerprint({name: value for name, value in record.items() if name not in _MORE_ROWS})
    work = target.with_name(f".{target.name}.{key[:16]}.parts")
    names = f".{glob.escape(target.name)}.{16 * '[0-9a-f]'}.parts"
    recover_like(target.parent, names)
    for folder in sorted(target.parent.glob(names)):
        if not find_parts(folder):  # killed before the first
            remove_folder(folder)
    others = {folder: changed for folder in target.parent.glob(names) if (changed := _changed(folder, record))}
    if others and not redo:
        raise InputError(
            f"{target}: unfinished with other settings ({', '.join(next(iter(others.values())))}); "
            "give the same again, or start anew with --redo"
        )
    if target.exists() and not redo and not (work / _JOINED).exists() and not _is_empty(target):
        raise InputError(f"{target}: exists; replace it with --redo, or choose another --out")
    if target.is_dir() and (kept := sorted({path.name for path in target.iterdir()} - _outputs(record))):
        raise InputError(f"{target}: contains {kept[0]}, which this command does not write; choose another --out")
    for other in others:
        remove_folder(other)
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / _RECORD, record)
    return work


def _outputs(record: dict[str, Any]) -> set[str]:
    """The names of the files in the folder that the prediction writes."""
    return {Path(file).name for file, _, _ in record["files"]}


def _is_empty(target: Path) -> bool:
    return target.is_dir() and not any(target.iterdir())


def _changed(work: Path, record: dict[str, Any]) -> list[str]:
    """Names of the settings in which the record in `work` differs, so that its parts are of no use."""
    try:
        found = read_json(work / _RECORD)
    except InputError:
        return ["unknown"]
    differ = [key for key in {**found, **record} if found.get(key) != record.get(key)]
    return [key for key in differ if key not in _MORE_ROWS or not record.get(key)]


def _predict(target: Path, paths: Sequence[Path], job: Job, processes: int, record: dict[str, Any]) -> dict[str, Any]:
    begun = time.monotonic()
    described = [tables.describe(path) for path in paths]
    counts = [count for _, count in described]
    job = job._replace(tables=dict(zip(paths, described, strict=True)))
    headers = [columns for columns, _ in described]
    if not _is_folder(target):
        headers = _one_header(target, paths, headers)
    check = _type_check(target, paths, job)
    found = find_parts(job.work)
    for part in found:
        check(part)
    done = {(part.file, part.start): part.rows for part in found}
    resumed, total = sum(done.values()), sum(counts)

    def left() -> Iterator[Chunk]:
        for file, path in enumerate(paths):
            suffix = path.suffix if _is_folder(target) else target.suffix
            for start, chunk in tables.chunks(path, record["rows"]):
                if (file, start) not in done:
                    yield Chunk(path, file, start, chunk, described[file][0], headers[file], suffix)

    try:
        with progress("predict", total, completed=resumed) as advance:
            if resumed < total or len({file for file, _ in done}) < len(paths):
                for part in compute(job, left(), processes):
                    check(part)
                    advance(part.rows)
    except KeyboardInterrupt:
        kept = sum(part.rows for part in find_parts(job.work))
        raise KeyboardInterrupt(f"{kept} of {total} rows are kept; the same command continues there") from None
    seconds = time.monotonic() - begun
    if [_state(path) for path in paths] != record["files"]:
        raise InputError("a file changed while it was read; start anew with --redo")
    skipped = _join(target, paths, job.work, counts)
    rate = (total - resumed) / seconds
    return {
        "out": str(target),
        "rows": total,
        "skipped": skipped,
        "resumed": resumed,
        "seconds": round(seconds, 3),
        "rows_per_second": round(rate, 1),
    }


def _one_header(target: Path, paths: Sequence[Path], columns: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """The columns of the first file, for all. Raises InputError if a file has others and the format needs the same.

    A .jsonl without rows has no columns, and counts for none of this.
    """
    known = [(path, found) for path, found in zip(paths, columns, strict=True) if found]
    first, header = known[0] if known else (target, [])
    for path, found in known:
        if target.suffix in (".csv", ".tsv") and set(found) != set(header):
            raise InputError(
                f"{path}: has the columns {', '.join(map(repr, found))}, {first} {', '.join(map(repr, header))};"
                f" {target.suffix} needs the same: choose a folder or .jsonl as --out"
            )
    return [header] * len(paths)


def _type_check(target: Path, paths: Sequence[Path], job: Job) -> Callable[[Part], None]:
    """What to call with every part: it raises InputError if parquet cannot hold its rows beside those of the others.

    Such a part is removed: kept, it would count as done. Raises InputError for files whose types differ already.
    """
    if target.suffix != ".parquet":
        return lambda part: None
    from pruneofa.serve import arrow

    arrow.check_types(job.tables)
    types = arrow.Types()

    def check(part: Part) -> None:
        if not part.rows:
            return
        try:
            types.add(part.path)
        except InputError as error:
            part.path.unlink()
            raise InputError(
                f"{paths[part.file]}: row {part.start + 1} and those after it: {error}: choose a .jsonl --out, or "
                "correct the rows and start anew with --redo"
            ) from None

    return check


def _join(target: Path, paths: Sequence[Path], work: Path, counts: Sequence[int]) -> int:
    """Join the parts to `target`, remove them, and return the number of skipped rows.

    Raises CheckFailed if the parts do not hold every row exactly once.
    """
    found = find_parts(work)
    by_file: list[list[Path]] = [[] for _ in paths]
    rows = [0] * len(paths)
    for part in found:
        if part.start != rows[part.file]:
            raise CheckFailed(f"{paths[part.file]}: the parts in {work} lack or repeat rows; start anew with --redo")
        rows[part.file] += part.rows
        by_file[part.file].append(part.path)
    if rows != list(counts):
        raise CheckFailed(
            f"{target}: the parts in {work} hold {sum(rows)} of {sum(counts)} rows; start anew with --redo"
        )
    if _is_folder(target):
        with new_folder(target) as folder:
            for path, files in zip(paths, by_file, strict=True):
                with open(folder / path.name, "wb") as file:
                    tables.join(files, file)
            (work / _JOINED).touch()
    else:
        with new_file(target) as temporary:
            # A .jsonl without rows has no columns: it would put those of the results first.
            filled = [part for part in found if part.rows or paths[part.file].suffix != ".jsonl"]
            with open(temporary, "wb") as file:
                tables.join([part.path for part in filled or found], file)
            (work / _JOINED).touch()  # killed from here on, the same command joins again, although OUT exists
    remove_folder(work)
    return sum(part.skipped for part in found)
