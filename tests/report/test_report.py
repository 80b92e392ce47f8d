import json
import math
import re

import pytest

from pruneofa.errors import InputError
from pruneofa.report.charts import (
    POINTS,
    accuracy_chart,
    layer_chart,
    log_rows,
    loss_chart,
    parts_chart,
    schedule_chart,
)
from pruneofa.report.report import write_report
from tests.report.example_run import HOME, example_events, example_inspection, example_recipe, example_results


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    results = example_results() | {"versions": {"</script><b>": "1"}}
    values = {"results": results, "recipe": example_recipe(), "inspection": example_inspection()}
    return write_report(path, **values, events=example_events()).read_text(encoding="utf-8")


def data_of(chart):
    """Every inline row of a chart."""
    found = []

    def walk(value):
        if isinstance(value, dict):
            if isinstance(value.get("values"), list):
                found.extend(value["values"])
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(chart.to_dict())
    return found


def test_report_is_one_file_that_loads_nothing(page):
    markup = re.sub(r"(<script>).*?(</script>)", r"\1\2", page, flags=re.DOTALL)
    assert len(markup) < 30_000
    assert not re.search(r"src=|href=|@import|url\(|https?:", markup)
    assert page.count("window.vegaEmbed=") == 1
    assert len(re.findall(r"<div id=\"\w+\"></div>", page)) == 5
    assert "&lt;/script&gt;&lt;b&gt;" in page
    assert HOME not in page


def test_report_shows_the_table_and_the_numbers_on_top(page):
    assert "<td>dense (1–2 seeds)</td>" in page
    assert "<b>1.06 M of 10.6 M</b>" in page
    assert "<b>12.1 M</b>" in page
    assert "QNLI" not in re.search(r"<table>.*</table>", page, re.DOTALL)[0]


def test_a_step_logged_again_after_a_resume_counts_once():
    rows = log_rows(
        [
            {"event": "log", "stage": "prune", "step": 20, "loss": 9.0},
            {"event": "start", "stage": "prune", "step": 10},
            {"event": "log", "stage": "prune", "step": 10, "loss": 2.0, "lr": None, "note": "x"},
            {"event": "log", "stage": "prune", "step": 20, "loss": 1.0, "kd": math.nan},
        ]
    )
    assert rows == {("prune", None): [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}]}


def test_long_logs_are_thinned_to_what_a_screen_shows():
    rows = log_rows({"event": "log", "stage": "prune", "step": step, "loss": 1.0} for step in range(100_000))[
        "prune", None
    ]
    assert len(rows) == POINTS
    assert (rows[0]["step"], rows[-1]["step"]) == (0, 99_999)


def test_loss_curves_hold_teacher_student_and_control():
    rows = data_of(loss_chart(log_rows(example_events())))
    assert {row["model"] for row in rows} == {"teacher", "student", "control, lr 5e-05"}
    assert max(row["step"] for row in rows if row["model"] == "student") == 2000
    title = json.dumps(loss_chart(log_rows(example_events())).to_dict())
    assert "loss on masked words" in title


def test_without_a_vocabulary_loss_the_totals_are_compared():
    events = [
        {"event": "log", "stage": stage, "step": step, "loss": 1.0, "hidden": 1.0}
        for stage in ("teacher", "prune")
        for step in (1, 2)
    ]
    assert "each stage has its own" in json.dumps(loss_chart(log_rows(events)).to_dict())
    assert len(data_of(parts_chart(log_rows(events)))) == 4


def test_schedule_and_layers_and_accuracy_hold_what_was_logged_and_measured():
    schedule = data_of(schedule_chart(log_rows(example_events())))
    assert {"step": 2000, "sparsity": 0.9}.items() <= schedule[-1].items()
    layers = data_of(layer_chart(example_inspection(layers=24)))
    assert len(layers) == 144
    assert {row["kind"] for row in layers} >= {"attention self query", "output dense"}
    bars = data_of(accuracy_chart(example_results()))
    assert {
        "panel": "SST-2, accuracy",
        "variant": "dense",
        "value": 89.8,
        "low": 89.5,
        "high": 90.1,
        "seeds": 2,
    }.items() <= next(bar for bar in bars if bar["panel"] == "SST-2, accuracy" and bar["variant"] == "dense").items()


def test_distilbert_layers_come_in_the_order_of_the_forward_pass():
    names = ("ffn.lin2", "attention.out_lin", "attention.v_lin", "ffn.lin1", "attention.q_lin", "attention.k_lin")
    layer = {"shape": [8, 8], "sparsity": 0.9, "nonzeros": 6}
    layers = {f"transformer.layer.0.{name}.weight": layer for name in names}
    spec = layer_chart({"layers": layers}).to_dict()
    assert spec["facet"]["sort"] == [
        "attention q_lin", "attention k_lin", "attention v_lin", "attention out_lin", "ffn lin1", "ffn lin2",
    ]  # fmt: skip


def test_a_run_without_log_or_tasks_still_has_a_report(tmp_path):
    results = example_results() | {"tasks": {}, "stages": {}}
    path = tmp_path / "report.html"
    recipe = example_recipe(model_is_sparse=True, teacher=None, prune=None, corpus=None, control=False, tasks={})
    write_report(path, results=results, recipe=recipe, inspection=example_inspection(), events=[])
    assert re.findall(r"<div id=\"(\w+)\"></div>", path.read_text()) == ["layers"]
    with pytest.raises(InputError, match="tasks is missing"):
        write_report(path, results={"recipe": "x", "sparsity": 1, "versions": {}, "stages": {}}, recipe=recipe,
                     inspection=example_inspection(), events=[])  # fmt: skip
