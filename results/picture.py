"""Draw docs/picture.svg for the README: accuracy, size and speed of dense and sparse models.

    python results/picture.py

Every number comes from committed records: of tasks, of a run of the whole method (sizes and times), and of
`pruneofa bench`.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import altair as alt
from int8 import evaluated

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "results/minilm-90/results.json"
BENCH = ROOT / "benchmarks/records/2026-11-23-xeon-amx-2-cores-engine/bench_amx.json"
PICTURE = ROOT / "docs/picture.svg"

DENSE, SPARSE, INT8 = "dense, fp32", "sparse, fp32", "sparse, int8"
INK = "#010203"  # altair refuses "currentColor", which takes its place in what is drawn
COLORS = {DENSE: "#8a97a6", SPARSE: "#2e8b62", INT8: "#2f6fb5"}
ROWS = ROOT / "results/rows.json"  # with the titles of those that are drawn
# Model: its variant in the run's latency, and what is counted as its size.
VARIANTS = {
    DENSE: ("dense", "dense_fp32"),
    SPARSE: ("transfer_engine", "nonzeros_bitmask_fp32"),
    INT8: ("quantize_engine", "packed_int8"),
}
CASE = "1x128"
Row = dict[str, Any]


def draw() -> str:
    """The picture as SVG; its text takes the colour of light or dark pages."""
    import vl_convert

    run, bench = (json.loads(path.read_text(encoding="utf-8")) for path in (RUN, BENCH))
    accuracy, size, latency = accuracy_rows(), size_rows(run), latency_rows(run)
    setting, sizes = run["latency"]["setting"], run["sizes"]
    machine = f"1 × {setting['tokens']} tokens, {setting['threads']} threads, {setting['isa'].upper()}"
    dense, int8 = (f"{sizes[key] / 1e6:.1f}" for key in ("model_fp32", "packed_int8_model"))
    whole = f"with embeddings and head: {dense} dense, {int8} sparse int8"
    scores = [_bars(rows, title, "", ".1f", longest=100) for title, rows in accuracy.items()]
    costs = [
        _bars(size, "Size: MB of the encoder's linear weights", whole, ".3~g"),
        _bars(latency, "Time: ms for one text", f"{machine}; dense: PyTorch, sparse: Engine", ".3~g"),
        _bars(bench_rows(bench), "Time: ms for one text, BERT-Base, int8", _bench_setting(bench), ".3~g"),
    ]
    title = alt.TitleParams(
        f"MiniLM with {100 * run['sparsity']:.0f} % of the encoder's weights pruned once, for all tasks",
        subtitle="validation data, mean of the seeds in the records; int8 is computed by pruneofa.Engine",
    )
    chart = alt.hconcat(alt.vconcat(*scores, spacing=6), alt.vconcat(*costs, spacing=22), spacing=40).properties(
        title=title, background="transparent"
    )
    chart = chart.configure(font="sans-serif").configure_view(stroke=None)
    chart = chart.configure_title(color=INK, subtitleColor=INK, anchor="start", fontSize=13)
    chart = chart.configure_axis(labelColor=INK, domain=False, ticks=False, labelLimit=200)
    svg = vl_convert.vegalite_to_svg(chart.to_dict())
    style = "<style>svg{color:#1f2933}@media(prefers-color-scheme:dark){svg{color:#d6dde6}}</style>"
    return re.sub(r"(<svg [^>]*>)", rf"\1{style}", svg, count=1).replace(INK, "currentColor") + "\n"


def accuracy_rows() -> dict[str, list[Row]]:
    """Title of a task: a row per model, percent on the validation data."""
    found = {}
    for row in json.loads(ROWS.read_text(encoding="utf-8")):
        if "picture" not in row:
            continue
        folder, task, metric = ROOT / "results" / row["run"], row["task"], row["metric"]
        means = json.loads((folder / "results.json").read_text(encoding="utf-8"))["tasks"][task][metric]
        values = {DENSE: means["dense"]["mean"], SPARSE: means["transfer"]["mean"]}
        values[INT8] = statistics.fmean(metrics[metric] for metrics in evaluated(folder, task))
        found[row["picture"]] = [{"model": model, "value": value} for model, value in values.items()]
    return found


def size_rows(run: Row) -> list[Row]:
    """A row per model: megabytes of the encoder's linear weights as stored."""
    return [{"model": model, "value": run["sizes"][size] / 1e6} for model, (_, size) in VARIANTS.items()]


def latency_rows(run: Row) -> list[Row]:
    """A row per model: median milliseconds of one text, the dense one in PyTorch."""
    return [{"model": model, "value": run["latency"][timed]["median_ms"]} for model, (timed, _) in VARIANTS.items()]


def bench_rows(record: Row) -> list[Row]:
    """A row per runtime of the record, dense peers first: median milliseconds of the case."""
    [row] = [row for row in record["rows"] if row["case"] == CASE]
    engine, *_ = record["models"]
    return [
        {
            "model": INT8 if runner["name"] == engine["name"] else runner["name"],
            "color": COLORS[INT8 if runner["name"] == engine["name"] else DENSE],
            "value": runner["median_ms"],
        }
        for runner in sorted(row["runners"], key=lambda runner: -runner["median_ms"])
    ]


def _bench_setting(record: Row) -> str:
    return f"{record['models'][0]['sparsity']:.2f} zeros, beside dense runtimes; random weights"


def _bars(
    rows: list[Row], title: str, subtitle: str, digits: str, *, longest: float | None = None
) -> alt.LayerChart | alt.FacetChart:
    rows = [{"color": COLORS.get(row["model"])} | row for row in rows]
    scale = alt.Scale(domain=[0, longest or max(row["value"] for row in rows)])
    y = alt.Y("model:N", sort=[row["model"] for row in rows], title=None, axis=alt.Axis(minExtent=68))
    base = alt.Chart(alt.Data(values=rows)).encode(x=alt.X("value:Q", axis=None, scale=scale), y=y)
    number = base.mark_text(align="left", dx=4, color=INK).encode(text=alt.Text("value:Q", format=digits))
    bars = base.mark_bar().encode(color=alt.Color("color:N", scale=None))
    named = alt.TitleParams(title, fontSize=11, subtitleFontSize=10, subtitle=subtitle or alt.Undefined)
    return alt.layer(bars, number).properties(width=230, height=17 * len(rows), title=named)


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
