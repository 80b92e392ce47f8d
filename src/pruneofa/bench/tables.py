"""Records of `pruneofa bench` as tables for the terminal and the documentation, and as a chart."""

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pruneofa import families
from pruneofa.bench.machine import CHANGE, FIGURES, largest_change
from pruneofa.bench.peers import PRUNEOFA
from pruneofa.errors import InputError
from pruneofa.formats.files import read_json

_MARKED = "(!)"  # marks a peer whose output exceeds the tolerance


def aligned(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as text in columns, the first one to the left; lines are never wrapped."""
    if not rows:
        return ""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    parts = (
        "  ".join(text.rjust(width) if index else text.ljust(width) for index, (text, width) in enumerate(fields))
        for fields in (list(zip(line, widths, strict=True)) for line in lines)
    )
    return "".join(f"{part.rstrip()}\n" for part in parts) + "\n"


def case_rows(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table of one case: the fastest first."""
    many = row["batch"] > 1
    return [
        {
            row["case"]: runner["name"] + ("" if runner["verified"] in (True, None) else f" {_MARKED}"),
            "median ms": _short(runner["median_ms"]),
            "p10": _short(runner["p10_ms"]),
            "p90": _short(runner["p90_ms"]),
            "x pruneofa": f"{runner['ratio']:.2f}",
            **({"seq/s": _short(runner["per_second"])} if many else {}),
            "error": "not verified" if runner["error"] is None else f"{runner['error']:.1e}",
            "peak MB": _megabytes(runner["peak"]),
            "above imports": _megabytes(runner["peak"] - runner["baseline"]),
            "first answer s": _short(runner["first_answer"]),
            "disk MB": _megabytes(runner["disk"]),
        }
        for runner in sorted(row["runners"], key=lambda runner: runner["median_ms"])
    ]


def remarks(record: Mapping[str, Any]) -> list[str]:
    """Notes that explain the tables, one line each."""
    found = []
    for row in record["rows"]:
        share = f", {100 * row['share_of_peak']:.0f} % of the machine's peak" if row["share_of_peak"] else ""
        limits = row.get("ceilings")
        rate = f"{_short(row['tera_per_second'])} x 10^12 operations/s of the dense model{share}"
        if row["ratio"] is None:
            found.append(f"{row['case']}: {rate}; no peer to compare with")
        else:
            found.append(f"{row['case']}: {row['ratio']:.2f} times as fast as {row['fastest_dense']}; {rate}")
        found += [f"{row['case']}: {line}" for line in _ceilings(limits, record["threads"])] if limits else []
        for runner in row["runners"]:
            if together := runner.get("together"):
                size = "one sequence" if together == 1 else f"{together} sequences of similar length"
                found.append(f"{row['case']}: {runner['name']} is fastest with {size} at a time")
            if runner["verified"] is False:
                text = f"its output error is {runner['error']:.2g}, tolerance {runner['tolerance']:g}"
                found.append(f"{row['case']}: {_MARKED} {runner['name']}: {text}; timed nevertheless")
    if any(runner["verified"] is None for row in record["rows"] for runner in row["runners"]):
        found.append("outputs were not verified: this needs torch and transformers; pip install 'pruneofa[train]'")
    if record["break_even"]:
        found.append(break_even_remark(record["break_even"]))
    repeats = record.get("repeats", 0)
    few = [(runner["name"], len(runner["seconds"])) for row in record["rows"] for runner in row["runners"]]
    few = sorted({(name, runs) for name, runs in few if runs < repeats})
    if few:
        found.append(f"fewer than {repeats} runs: " + ", ".join(f"{name} {runs}" for name, runs in few))
    if not record.get("complete", True):
        found.append("incomplete: the run ended before all measurements")
    found += [f"left out: {name}: {reason}" for name, reason in record["left_out"].items()]
    load, cpus = record["machine"]["load_average"][0], record["machine"]["cpus"] or 1
    if load > 0.3 * cpus:
        found.append(f"other programs were running (load average {load:.1f} on {cpus} CPUs): measure again when idle")
    return found


def _ceilings(limits: Mapping[str, Any], threads: int) -> Iterator[str]:
    """What the machine could do before and after a row, and whether it changed."""
    states = [limits[when]["all_threads"] for when in ("before", "after") if limits[when]]
    figures = (f"{name} {', '.join(_short(state[key]) for state in states)} {unit}" for key, name, unit in FIGURES)
    when = "before and after" if len(states) > 1 else "before"
    yield f"{when}, {threads} {'thread' if threads == 1 else 'threads'} reached: {'; '.join(figures)}"
    change, text = largest_change(limits)
    if change > CHANGE:
        yield f"the machine changed while this row was measured ({text}): measure again"


def break_even_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A table of microseconds per layer: pruneofa by sparsity, the dense peer, and the break-even sparsity."""
    return [
        {
            "layer": "x".join(map(str, row["shape"])),
            "tokens": row["tokens"],
            **{f"pruneofa at {sparsity}, us": _short(value) for sparsity, value in row["ours_us"].items()},
            "dense int8, us": "-" if row["dense_us"] is None else _short(row["dense_us"]),
            "break-even": _break_even(row),
        }
        for row in rows
    ]


def _break_even(row: Mapping[str, Any]) -> str:
    if row["dense_us"] is None:
        return "unknown: no dense peer"
    return "none of these" if row["pays_from"] is None else f"{row['pays_from']:g}"


def break_even_remark(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence that explains the break-even table."""
    known = [row for row in rows if row["dense_us"] is not None]
    if not known:
        return "break-even: no dense peer to compare with; pip install torch"
    never = sum(row["pays_from"] is None for row in known)
    text = "one layer, one thread, with the conversion of the engine's input and output"
    if never == len(known):
        return f"break-even ({text}): no sparsity up to 0.95 is faster than dense int8 on this machine"
    from_ = max(row["pays_from"] for row in known if row["pays_from"] is not None)
    if never:
        faster = f"{len(known) - never} of {len(known)} layers"
        return f"break-even ({text}): {faster} are faster than dense int8, from sparsity {from_:g}"
    return f"break-even ({text}): on this machine every layer is faster than dense int8 from sparsity {from_:g}"


def read_records(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Records from files of `pruneofa bench --json`, with the name of their "folder". Raises InputError for others."""
    records = []
    for path in paths:
        record = read_json(path)
        if not isinstance(record, dict) or record.get("format") != "pruneofa-bench":
            raise InputError(f"{path}: wanted a file that `pruneofa bench --json` or --record wrote")
        records.append(record | {"folder": path.parent.name})
    return records


def speed_table(records: Iterable[Mapping[str, Any]]) -> str:
    """The table (Markdown) of records for docs/results.md: one line per model, kernels and case."""
    head = ["Model", "Kernels", "Record", "Batch"]
    head += ["Ours", "Fastest dense peer", "Speed-up", "DeepSparse, fp32", "Share of peak"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- | --- | --- " + "| --: " * (len(head) - 4) + "|"]
    for record in records:
        for row in record["rows"]:
            by_name = {runner["name"]: runner for runner in row["runners"]}
            dense, sparse = by_name.get(row["fastest_dense"]), by_name.get("deepsparse")
            for model in record["models"]:
                engine = by_name[model["name"]]
                speed = [_time(engine, row), *_against(dense, engine, row)]
                share = row["share_of_peak"] and row["share_of_peak"] * row["runners"][0]["median_ms"]
                lines.append(
                    "| "
                    + " | ".join([
                        _model(model),
                        record["isa"] + (" (capped)" if record["capped"] else ""),
                        _machine(record),
                        _batch(row),
                        *speed,
                        f"{sparse['median_ms'] / engine['median_ms']:.2f}×" if sparse else "-",
                        f"{100 * share / engine['median_ms']:.0f} %" if share else "-",
                    ])
                    + " |"
                )  # fmt: skip
    return "\n".join(lines) + "\n"


def _machine(record: Mapping[str, Any]) -> str:
    """A link to the record's folder, named after its machine: 2026-11-30-zen5-engine is zen5."""
    folder = record.get("folder", "")
    name = re.sub(r"^[\d-]+-|-engine$", "", folder)
    return f"[{name}](../benchmarks/records/{folder}/README.md)" if name else "-"


def _against(peer: Mapping[str, Any] | None, engine: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    if peer is None:
        return ["-", "-"]
    off = "" if peer["verified"] is not False else f" {_MARKED}"
    padded = " (one padded batch)" if "-" in row["case"] and peer.get("together") is None else ""
    return [f"{peer['name']}{off}, {_time(peer, row)}{padded}", f"**{peer['median_ms'] / engine['median_ms']:.2f}×**"]


def _model(model: Mapping[str, Any]) -> str:
    # Families have shapes of the same size. Records of earlier versions name the class only.
    by_class = families.by_class(model.get("architecture"))
    known = families.find(model.get("family")) or (by_class and by_class[0])
    titles = (
        shape.title
        for family, shape in families.shapes().values()
        if family is known and (shape.layers, shape.hidden) == (model["layers"], model["hidden"])
    )
    name = next(titles, f"{model['layers']} layers of {model['hidden']}")
    pattern = "" if model["patterns"] == ["unstructured"] else f" {'/'.join(model['patterns'])}"
    return f"{name}, {100 * model['sparsity']:.0f} %{pattern}, {model['precision']}"


def _batch(row: Mapping[str, Any]) -> str:
    lengths = row["case"].partition("x")[2]
    return f"{row['batch']} × {lengths.replace('-', '–')} tokens"


def _time(runner: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    if "-" in row["case"]:
        return f"{_short(runner['per_second'])} seq/s"
    return f"{_short(runner['median_ms'])} ms"


def _short(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f}" if count < 1e8 else f"{count / 1e6:.0f}"


def check_picture(path: Path) -> None:
    """Check before the measurement that the chart can be drawn.

    Raises:
        InputError: the file name has another suffix.
        ImportError: altair, of the train extra, is not installed.
    """
    if path.suffix not in (".svg", ".html"):
        raise InputError(f"--picture {path}: wanted a name that ends in .svg or .html")
    for module in ("altair", "vl_convert"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"a picture needs {module}: pip install 'pruneofa[train]'")


def picture(record: Mapping[str, Any], path: Path) -> None:
    """Bars of the medians with p10 and p90, a panel per case, as .svg or self-contained .html.

    Raises as `check_picture` does.
    """
    check_picture(path)
    import altair

    rows = [
        {"case": row["case"], "pruneofa": PRUNEOFA in runner["name"]}
        | {key: runner[key] for key in ("name", "median_ms", "p10_ms", "p90_ms")}
        for row in record["rows"]
        for runner in row["runners"]
    ]
    base = altair.Chart(altair.Data(values=rows)).encode(
        y=altair.Y("name:N", sort=altair.EncodingSortField("median_ms", op="min"), title=None)
    )
    bars = base.mark_bar().encode(
        x=altair.X("median_ms:Q", title="median, ms (line: p10 to p90)"),
        color=altair.Color(
            "pruneofa:N", legend=None, scale=altair.Scale(domain=[False, True], range=["#b0b7c3", "#1f6feb"])
        ),
    )
    spread = base.mark_rule().encode(x="p10_ms:Q", x2="p90_ms:Q")
    chart = (bars + spread).properties(width=480).facet(row=altair.Row("case:N", title=None)).resolve_scale(
        x="independent", y="independent"
    )  # fmt: skip
    chart.save(str(path), inline=path.suffix == ".html")
