"""Tables of size and latency from a run's results, and all its tables as Markdown."""

from typing import Any

from pruneofa.report.table import cell, megabytes, variant_name
from pruneofa.report.training import LOST_NOTE, Rows, lost_rows, training_note, training_rows

ENCODER = (
    ("dense, fp32", "dense_fp32"),
    ("non-zeros and a bit per weight, fp32", "nonzeros_bitmask_fp32"),
    ("packed int8, scales counted", "packed_int8"),
    ("packed int8, compressed", "compressed_int8"),
    ("bound by entropy, int8", "entropy_bound_int8"),
)
MODEL = (
    ("whole model, fp32", "model_fp32"),
    ("whole model, packed int8", "packed_int8_model"),
    ("whole model, packed int8, compressed", "compressed_int8_model"),
)


def size_rows(results: dict[str, Any]) -> Rows:
    """Header and rows: the encoder's linear weights, then the whole model; no rows if nothing was packed."""
    sizes = results.get("sizes") or {}
    rows: list[list[str]] = []
    if "packed_int8" in sizes:
        for group, dense in ((ENCODER, "dense_fp32"), (MODEL, "model_fp32")):
            for name, key in group:
                if sizes.get(key) and sizes.get(dense):
                    bits = f"{32 * sizes[key] / sizes[dense]:.3g}" if group is ENCODER else "-"
                    rows.append([name, megabytes(sizes[key]), bits, f"{sizes[dense] / sizes[key]:.1f}×"])
    return ["Stored as", "Size", "Bits per weight", "Smaller than fp32"], rows


def latency_rows(results: dict[str, Any]) -> Rows:
    """Header and rows, beginning with the dense model in torch if it was timed; no rows if nothing was timed."""
    found = results.get("latency") or {}
    timed = {name: value for name, value in found.items() if name != "setting"}
    dense = timed.get("dense")
    names = sorted(timed, key=lambda name: (name != "dense", -timed[name]["median_ms"]))
    rows = []
    for name in names:
        low, median, high = (f"{timed[name][key]:.3g}" for key in ("p10_ms", "median_ms", "p90_ms"))
        speed = f"{dense['median_ms'] / timed[name]['median_ms']:.2f}×" if dense else "-"
        runner = "" if name.endswith("_engine") else ", by torch in fp32"
        rows.append([variant_name(name) + runner, median, f"{low}–{high}", speed])
    return ["Model", "Median, ms", "p10–p90", "Times as fast"], rows


def latency_setting(results: dict[str, Any]) -> str:
    """One sentence about how latency was measured."""
    setting = (results.get("latency") or {}).get("setting") or {}
    if not setting:
        return ""
    return (
        f"Encoder alone, {setting['batch']} sequence of {setting['tokens']} tokens, {setting['threads']} threads, "
        f"median of {setting['repeats']} alternating runs, engine on {setting['isa']}, {setting['cpu']}."
    )


def cost_tables(results: dict[str, Any]) -> str:
    """All tables beside that of the metrics as Markdown, each after an empty line."""
    text = ""
    tables = (
        (lost_rows(results), LOST_NOTE),
        (training_rows(results), training_note(results)),
        (size_rows(results), ""),
        (latency_rows(results), latency_setting(results)),
    )
    for table, note in tables:
        if table[1]:
            text += "\n" + markdown(table)
            text += f"\n{note}\n" if note else ""
    return text


def markdown(table: Rows) -> str:
    """A header and rows as a Markdown table; the columns after the first are aligned right."""
    header, rows = table
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(map(cell, line)) + " |\n" for line in lines)
