"""The charts of the report (Altair), from results and log of a run; None if there are no data for a chart."""

from collections.abc import Iterable, Sequence
from typing import Any

from pruneofa import families
from pruneofa.formats.files import is_number
from pruneofa.report.schema import METRIC_NAMES, VARIANTS
from pruneofa.report.table import variant_name

POINTS = 400  # per curve: more cannot be distinguished on a screen
LOSSES = {
    "loss": "total",
    "mlm": "masked words",
    "nsp": "next sentence",
    "kd": "distillation, words",
    "kd_nsp": "distillation, next sentence",
    "hidden": "distillation, hidden states",
}
COLORS = {
    "dense": "#2f6fb5", "transfer": "#2e8b62", "control": "#c8821a", "quantize": "#7a4fa3", "ptq": "#b05aa0",
    "majority": "#c3ccd6", "bag_of_words": "#8a97a6",
}  # fmt: skip
# {(stage, peak learning rate if the stage tries several): its logged steps}
Curve = tuple[str, float | None]
Logs = dict[Curve, list[dict[str, float]]]
STUDENT_CURVE: Curve = ("prune", None)
TEACHER, STUDENT, CONTROL = "#2f6fb5", "#2e8b62", "#c8821a"
WIDTH = 850
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"


def log_rows(events: Iterable[dict[str, Any]]) -> Logs:
    """Logged steps per curve, in order; if a step was logged again after a resume, the later line is used.

    Only finite numbers are kept, and at most POINTS steps of a stage, first and last included.
    """
    curves: dict[Curve, dict[int, dict[str, float]]] = {}
    for event in events:
        if event.get("event") != "log" or not isinstance(event.get("step"), int) or not is_number(event["step"]):
            continue
        numbers = {k: v for k, v in event.items() if is_number(v) and k in ("lr", "sparsity", *LOSSES)}
        peak = event.get("peak_lr")
        curve = (str(event.get("stage")), peak if is_number(peak) else None)
        curves.setdefault(curve, {})[event["step"]] = {"step": event["step"], **numbers}
    return {curve: _thin([steps[step] for step in sorted(steps)]) for curve, steps in curves.items()}


def _thin(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    if len(rows) <= POINTS:
        return rows
    return [rows[round(i * (len(rows) - 1) / (POINTS - 1))] for i in range(POINTS)]


def _style(chart: Any) -> Any:
    return (
        chart.configure(font=FONT, background="white")
        .configure_axis(
            labelColor="#3e4c59", titleColor="#3e4c59", titleFontWeight="normal", gridColor="#e8ecf1",
            domainColor="#9aa5b1", tickColor="#9aa5b1", labelFontSize=11, titleFontSize=12,
        )
        .configure_view(stroke=None)
        .configure_legend(labelFontSize=12, labelColor="#3e4c59", title=None, orient="top", symbolStrokeWidth=3)
        .configure_header(labelFontSize=12, labelColor="#1f2933", labelFontWeight="bold", title=None)
        .configure_title(fontSize=13, color="#1f2933", anchor="start", fontWeight="bold")
    )  # fmt: skip


def schedule_chart(logs: Logs) -> Any | None:
    """Sparsity over the steps of the prune stage, and the learning rate below it."""
    import altair as alt

    rows = [row for row in logs.get(STUDENT_CURVE, []) if "sparsity" in row and "lr" in row]
    if not rows:
        return None
    base = alt.Chart(alt.Data(values=rows)).encode(
        tooltip=[alt.Tooltip("step:Q", format=","), alt.Tooltip("sparsity:Q", format=".4f"), "lr:Q"]
    )
    x = alt.X("step:Q", axis=alt.Axis(format=",d", tickMinStep=1, tickCount=8), scale=alt.Scale(nice=False))
    sparsity = base.mark_area(
        interpolate="step-after", line={"color": STUDENT, "strokeWidth": 2}, color=STUDENT, opacity=0.15
    ).encode(
        x=x.title(None),
        y=alt.Y("sparsity:Q", title="encoder sparsity", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=5)),
    )
    rate = base.mark_line(color=CONTROL, strokeWidth=2).encode(
        x=x.title("step of the prune stage"),
        y=alt.Y("lr:Q", title="learning rate", axis=alt.Axis(format="~e", tickCount=4)),
    )
    return _style(
        alt.vconcat(sparsity.properties(width=WIDTH, height=170), rate.properties(width=WIDTH, height=110), spacing=12)
    )


def loss_chart(logs: Logs) -> Any | None:
    """The loss that teacher, student and control share: masked words, otherwise the total."""
    import altair as alt

    names = {("teacher", None): "teacher", STUDENT_CURVE: "student"}
    names |= {curve: f"control, lr {curve[1]:g}" for curve in logs if curve[0] == "control" and curve[1] is not None}
    shown = {curve: names[curve] for curve in logs if curve in names}
    key = "mlm" if all(any("mlm" in row for row in logs[curve]) for curve in shown) else "loss"
    rows = [
        {"step": row["step"], "loss": row[key], "model": name}
        for curve, name in shown.items()
        for row in logs[curve]
        if key in row
    ]
    if not rows:
        return None
    models = [name for name in shown.values() if any(row["model"] == name for row in rows)]
    palette = {"teacher": TEACHER, "student": STUDENT}
    amber = iter((CONTROL, "#7a4fa3", "#8a97a6", "#b05aa0") * len(models))
    title = "loss on masked words" if key == "mlm" else "training loss (each stage has its own sum of losses)"
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(strokeWidth=1.8)
        .encode(
            x=alt.X(
                "step:Q", title="step of the stage",
                axis=alt.Axis(format=",d", tickMinStep=1, tickCount=8), scale=alt.Scale(nice=False),
            ),
            y=alt.Y("loss:Q", title=title, scale=alt.Scale(zero=False)),
            color=alt.Color(
                "model:N", sort=models,
                scale=alt.Scale(domain=models, range=[palette.get(m) or next(amber) for m in models]),
            ),
            tooltip=["model:N", alt.Tooltip("step:Q", format=","), alt.Tooltip("loss:Q", format=".4f")],
        )
        .properties(width=WIDTH, height=240)
    )  # fmt: skip
    return _style(chart)


def parts_chart(logs: Logs) -> Any | None:
    """The parts of the student's loss, a panel each, because their scales differ."""
    import altair as alt

    rows = logs.get(STUDENT_CURVE, [])
    parts = [key for key in LOSSES if any(key in row for row in rows)]
    if len(parts) < 2:
        return None
    panels = []
    for key in parts:
        values = [{"step": row["step"], "loss": row[key]} for row in rows if key in row]
        flat = len({value["loss"] for value in values}) == 1  # a scale of zero length has no readable axis
        panels.append(
            alt.Chart(alt.Data(values=values))
            .mark_line(color=STUDENT, strokeWidth=1.6)
            .encode(
                x=alt.X(
                    "step:Q",
                    title=None,
                    axis=alt.Axis(format=",d", tickMinStep=1, tickCount=4),
                    scale=alt.Scale(nice=False),
                ),
                y=alt.Y("loss:Q", title=None, scale=alt.Scale(zero=flat), axis=alt.Axis(tickCount=4)),
                tooltip=[alt.Tooltip("step:Q", format=","), alt.Tooltip("loss:Q", format=".4f")],
            )
            .properties(width=240, height=110, title=LOSSES[key])
        )
    return _style(alt.concat(*panels, columns=3, spacing=18))


def accuracy_chart(results: dict[str, Any]) -> Any | None:
    """A bar per variant in a panel per task and metric; a dot per seed if there are several seeds."""
    import altair as alt

    order = [v for base in VARIANTS for v in (base, f"{base}_engine")]
    bars = [
        {
            "panel": _panel(task, metric), "variant": variant_name(variant), "value": entry["mean"],
            "low": min(run["value"] for run in entry["runs"]), "high": max(run["value"] for run in entry["runs"]),
            "seeds": len(entry["runs"]), "order": order.index(variant),
        }
        for task, metrics in results["tasks"].items()
        for metric, variants in metrics.items()
        for variant, entry in variants.items()
    ]  # fmt: skip
    if not bars:
        return None
    present = sorted({bar["order"] for bar in bars})
    names = [variant_name(order[i]) for i in present]
    colors = [_lighter(COLORS[order[i - 1]]) if i % 2 else COLORS[order[i]] for i in present]  # odd: engine results
    panels = list(dict.fromkeys(bar["panel"] for bar in bars))
    columns = min(len(panels), 4)
    base = alt.Chart().encode(
        x=alt.X("variant:N", sort=names, title=None, axis=alt.Axis(labels=False, ticks=False)),
        y=alt.Y("value:Q", title="percent", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=5)),
        tooltip=["variant:N", alt.Tooltip("value:Q", format=".2f"), "seeds:Q", "low:Q", "high:Q"],
    )
    color = alt.Color("variant:N", sort=names, scale=alt.Scale(domain=names, range=colors))
    legend = alt.Legend(columns=min(len(names), 4), labelLimit=300)
    spread = base.mark_rule(color="#1f2933", strokeWidth=1.5).encode(y="low:Q", y2="high:Q")
    text = base.mark_text(dy=-8, fontSize=11, color="#1f2933").encode(
        y=alt.Y("high:Q"), text=alt.Text("value:Q", format=".1f")
    )
    chart = alt.layer(
        base.mark_bar(cornerRadiusTopLeft=2, cornerRadiusTopRight=2).encode(color=color.legend(legend)), spread, text
    ).properties(width=max(40 * len(names), min(110 * len(names), WIDTH // columns - 28)), height=170)
    faceted = chart.facet(
        facet=alt.Facet("panel:N", sort=panels, title=None), columns=columns, data=alt.Data(values=bars), spacing=16
    )
    return _style(faceted)


def _lighter(color: str) -> str:
    """#rrggbb halfway to white."""
    return "#" + "".join(f"{(int(color[i : i + 2], 16) + 255) // 2:02x}" for i in (1, 3, 5))


def _panel(task: str, metric: str) -> str:
    known = {"squad": "SQuAD v1.1", "mnli": "MNLI-m", "qqp": "QQP", "qnli": "QNLI", "sst2": "SST-2"}
    name = "MNLI-mm" if metric == "accuracy_mm" else known.get(task, task)
    return f"{name}, {METRIC_NAMES[metric].lower() if metric != 'f1' else 'F1'}"


def layer_chart(inspection: dict[str, Any]) -> Any | None:
    """Sparsity of every encoder layer: a panel per kind of weight, a bar per block."""
    import altair as alt

    rows = [
        {
            "kind": (name.partition(f".{block}.")[2] or name).removesuffix(".weight").replace(".", " "),
            "block": block, "layer": name,
            "sparsity": layer["sparsity"], "nonzeros": layer["nonzeros"], "shape": " x ".join(map(str, layer["shape"])),
        }
        for name, layer in inspection["layers"].items()
        if (block := families.layer_index(name)) is not None
    ]  # fmt: skip
    if not rows:
        return None
    kinds: Sequence[str] = sorted({row["kind"] for row in rows}, key=_kind_order)
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar(color=STUDENT, cornerRadiusTopLeft=2, cornerRadiusTopRight=2)
        .encode(
            x=alt.X("block:O", title=None, axis=alt.Axis(labelAngle=0, labelOverlap=True, ticks=False)),
            y=alt.Y("sparsity:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=5)),
            tooltip=["layer:N", "shape:N", alt.Tooltip("nonzeros:Q", format=","),
                     alt.Tooltip("sparsity:Q", format=".4f")],
        )
        .properties(width=262, height=100)
        .facet(facet=alt.Facet("kind:N", sort=list(kinds), title=None), columns=3, spacing=16)
    )  # fmt: skip
    return _style(chart)


def _kind_order(kind: str) -> tuple[int, str]:
    """Order of the forward pass: query, key, value, attention output, then the two feed-forward layers."""
    order = {
        module.replace(".", " "): index
        for family in families.FAMILIES
        for index, module in enumerate(family.layer.modules().values())
    }
    return order.get(kind, len(order)), kind
