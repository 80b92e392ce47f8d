"""The published table as Markdown, from the results of runs."""

import html
import re
from collections.abc import Sequence
from typing import Any

from pruneofa.report.schema import VARIANTS, check_results

NO_ENCODER = ("majority", "bag_of_words")
INT8 = {"ptq", "quantize", "ptq_engine", "quantize_engine"}
# The published table's columns: title, task, metrics.
COLUMNS = (
    ("SQuADv1.1 (EM/F1)", "squad", ("exact_match", "f1")),
    ("MNLI-m (Acc)", "mnli", ("accuracy",)),
    ("MNLI-mm (Acc)", "mnli", ("accuracy_mm",)),
    ("QQP (Acc/F1)", "qqp", ("accuracy", "f1")),
    ("QNLI (Acc)", "qnli", ("accuracy",)),
    ("SST-2 (Acc)", "sst2", ("accuracy",)),
)
NOTES = (
    "Percent on the validation data, mean over the seeds ± half their range (one seed: no ±), of the last "
    "checkpoint of each run. Retention is Prune Once for All / dense. Sparsity and size are those of the encoder's "
    "linear weights, without embeddings and heads: size is all of them in fp32 for dense rows, non-zeros plus one "
    "bit per weight for sparse rows (an ordinary folder on disk still stores the zeros)."
)
INT8_NOTES = (
    "int8 rows: by torch the arithmetic of int8 is simulated, by the engine it is done; size is as packed in int8, "
    "scales counted."
)


def write_table(results: Sequence[dict[str, Any]], *, drop_empty: bool = False) -> str:
    """The published table as Markdown, a group of rows per run.

    `drop_empty` omits columns without numbers, for a terminal. Raises InputError for results that do
    not follow the schema.
    """
    header, rows = table_rows(results, drop_empty=drop_empty)
    right = ["---", *["--:"] * (len(header) - 1)]
    lines = ["| " + " | ".join(map(cell, line)) + " |" for line in [header, right, *rows]]
    return "\n".join(lines) + f"\n\n{notes(results)}\n"


def notes(results: Sequence[dict[str, Any]]) -> str:
    """Notes that explain the table; those about int8 only if it has int8 rows."""
    return f"{NOTES} {INT8_NOTES}" if any(set(variants_of(result)) & INT8 for result in results) else NOTES


def table_rows(results: Sequence[dict[str, Any]], *, drop_empty: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows of `write_table` as plain text, one row per run and variant, then the retention."""
    for index, result in enumerate(results):
        check_results(result, "results" if len(results) == 1 else f"results {index + 1} of {len(results)}")
    columns = columns_of(results, drop_empty=drop_empty)
    rows = []
    for result in results:
        for variant in variants_of(result):
            numbers = [_score(result, task, metrics, variant) for _, task, metrics in columns]
            name = f"{result['recipe']['name']}: {variant_name(variant)} ({seeds(result, variant)})"
            rows.append([name, _sparsity(result, variant), _size(result, variant), *numbers])
        for variant in ("quantize", "transfer"):
            kept = [_retention(result, task, metrics, variant) for _, task, metrics in columns]
            of = " of int8 in training" if variant == "quantize" else ""
            if not of or set(kept) != {"-"}:
                rows.append([f"{result['recipe']['name']}: retention{of} (%)", "-", "-", *kept])
    return ["Model", "Sparsity", "Model size", *(title for title, _, _ in columns)], rows


def columns_of(results: Sequence[dict[str, Any]], *, drop_empty: bool) -> list[tuple[str, str, tuple[str, ...]]]:
    """Title, task and metrics of the table's columns: the published ones, then those of other tasks."""
    known = {task for _, task, _ in COLUMNS}
    own = dict.fromkeys(task for result in results for task in result["tasks"] if task not in known)
    columns = [*COLUMNS, *(_own_column(task, results) for task in own)]
    if drop_empty:
        columns = [c for c in columns if any(set(c[2]) & set(r["tasks"].get(c[1], {})) for r in results)]
    return columns


def _own_column(task: str, results: Sequence[dict[str, Any]]) -> tuple[str, str, tuple[str, ...]]:
    measured = {metric for result in results for metric in result["tasks"].get(task, {})}
    metrics = tuple(m for m in ("accuracy", "f1", "exact_match") if m in measured) or ("accuracy",)
    short = {"accuracy": "Acc", "f1": "F1", "exact_match": "EM"}
    return f"{task} ({'/'.join(short[m] for m in metrics)})", task, metrics


def variants_of(result: dict[str, Any]) -> list[str]:
    """The variants measured in this run, in the order of VARIANTS, each followed by its result with the engine."""
    measured = {v for metrics in result["tasks"].values() for variants in metrics.values() for v in variants}
    return [v for base in VARIANTS for v in (base, f"{base}_engine") if v in measured]


def variant_name(variant: str) -> str:
    """The name of a variant in the table."""
    engine = ", by the engine" if variant.endswith("_engine") else ""
    return VARIANTS[variant.removesuffix("_engine")] + engine


def _runs(result: dict[str, Any], task: str, metric: str, variant: str) -> list[float]:
    entry = result["tasks"].get(task, {}).get(metric, {}).get(variant)
    return [run["value"] for run in entry["runs"]] if entry else []


def _score(result: dict[str, Any], task: str, metrics: Sequence[str], variant: str) -> str:
    scores = []
    for values in (_runs(result, task, metric, variant) for metric in metrics):
        if not values:
            scores.append("-")
            continue
        spread = f"±{(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
        scores.append(f"{sum(values) / len(values):.2f}{spread}")
    return "-" if set(scores) == {"-"} else "/".join(scores)


def retention(result: dict[str, Any], task: str, metric: str, variant: str = "transfer") -> float | None:
    """`variant` / dense in percent, or None if one of the two was not measured."""
    kept, dense = _runs(result, task, metric, variant), _runs(result, task, metric, "dense")
    if not kept or not sum(dense):
        return None
    return 100 * (sum(kept) / len(kept)) / (sum(dense) / len(dense))


def _retention(result: dict[str, Any], task: str, metrics: Sequence[str], variant: str) -> str:
    ratios = [retention(result, task, metric, variant) for metric in metrics]
    return "-" if ratios.count(None) == len(ratios) else "/".join("-" if r is None else f"{r:.1f}" for r in ratios)


def seeds(result: dict[str, Any], variant: str) -> str:
    """Number of seeds of a variant over all tasks: "2 seeds", or "1–3 seeds" if it differs between tasks."""
    counts = {
        len(variants[variant]["runs"])
        for metrics in result["tasks"].values()
        for variants in metrics.values()
        if variant in variants
    }
    few, many = min(counts), max(counts)
    return f"{few}–{many} seeds" if few != many else f"{many} seed{'s' if many > 1 else ''}"


def _sparsity(result: dict[str, Any], variant: str) -> str:
    base = variant.removesuffix("_engine")
    if base in NO_ENCODER:
        return "-"
    return "0" if base == "dense" else f"{result['sparsity']:.3g}"


def _size(result: dict[str, Any], variant: str) -> str:
    base, sizes = variant.removesuffix("_engine"), result.get("sizes") or {}
    fp32 = {"dense": "dense_fp32", "transfer": "nonzeros_bitmask_fp32", "control": "nonzeros_bitmask_fp32"}
    size = sizes.get(fp32[base]) if base in fp32 else sizes.get("packed_int8", sizes.get("nonzeros_bitmask_int8"))
    return "-" if size is None or base in NO_ENCODER else megabytes(size)


def megabytes(size: float) -> str:
    """Bytes as MB with three significant digits."""
    return f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e6:.0f} MB"


def cell(value: Any) -> str:
    """`value` as the text of a cell of a Markdown table, in which nothing is markup, HTML or a link."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\|`\[\]])", r"\\\1", text)


def code(value: Any) -> str:
    """`value` as a code span of Markdown, also within a table."""
    text = " ".join(str(value).split()).replace("|", "\\|") or "-"
    ticks = "`" * (1 + _longest_ticks(text))
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def code_block(text: str, language: str) -> str:
    """`text` as a block of code of Markdown, which nothing in it can end."""
    ticks = "`" * max(3, 1 + _longest_ticks(text))
    return f"{ticks}{language}\n{text}\n{ticks}"


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
