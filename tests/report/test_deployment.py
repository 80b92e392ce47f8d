"""The columns and tables of int8: in the table, the card and the report, and only where a run has them."""

import json
import re
from pathlib import Path

import pytest

from pruneofa.errors import InputError
from pruneofa.report.charts import accuracy_chart
from pruneofa.report.deployment import cost_tables, latency_rows, size_rows
from pruneofa.report.report import write_report
from pruneofa.report.schema import check_results, read_results
from pruneofa.report.table import NOTES, table_rows, write_table
from tests.report.example_run import entry, example_events, example_inspection, example_recipe, example_results
from tests.report.test_card import card_of

COMMITTED = sorted((Path(__file__).parents[2] / "results").glob("*/results.json"))


def times(median):
    return {"median_ms": median, "p10_ms": 0.9 * median, "p90_ms": 1.1 * median}


@pytest.fixture
def int8():
    """`example_results` with SST-2 quantized both ways, computed by torch and by the engine."""
    results = example_results()
    accuracy = results["tasks"]["sst2"]["accuracy"]
    accuracy |= {"ptq": entry(86.0), "quantize": entry(87.1), "quantize_engine": entry(87.0)}
    accuracy |= {"dense_engine": entry(89.8)}
    results["sizes"] |= {
        "model_fp32": 90_000_000, "packed_int8": 2_450_000, "packed_int8_model": 14_000_000,
        "compressed_int8": 1_790_000, "compressed_int8_model": 12_500_000,
    }  # fmt: skip
    setting = {"batch": 1, "tokens": 128, "threads": 2, "isa": "amx", "repeats": 30, "cpu": "Some CPU"}
    results["latency"] = {
        "setting": setting, "dense": times(20.0), "dense_engine": times(15.0), "quantize_engine": times(2.5),
    }  # fmt: skip
    return results


def test_rows_of_int8_follow_the_others_with_their_packed_size(int8):
    header, rows = table_rows([int8], drop_empty=True)
    names = [row[0].removeprefix("minilm-90: ") for row in rows]
    assert names == [
        "bag of words (1 seed)",
        "dense (1–2 seeds)",
        "dense, by the engine (1 seed)",
        "Prune Once for All (1–2 seeds)",
        "control: pruned once, same tokens (1 seed)",
        "Prune Once for All + int8 after training (1 seed)",
        "Prune Once for All + int8 in training (1 seed)",
        "Prune Once for All + int8 in training, by the engine (1 seed)",
        "retention of int8 in training (%)",
        "retention (%)",
    ]
    cells = dict(zip(names, rows, strict=True))
    assert cells["Prune Once for All + int8 in training (1 seed)"][1:3] == ["0.9", "2.45 MB"]
    sst2 = header.index("SST-2 (Acc)")
    assert cells["retention of int8 in training (%)"][sst2] == "97.0"  # 87.1 / 89.8
    assert cells["retention (%)"][sst2] == "97.1"
    assert "by the engine it is done" in write_table([int8])


def test_sizes_and_latency_are_computed_from_what_was_measured(int8):
    check_results(int8)
    sizes = {row[0]: row[1:] for row in size_rows(int8)[1]}
    assert sizes["packed int8, scales counted"] == ["2.45 MB", "1.85", "17.3×"]
    assert sizes["packed int8, compressed"] == ["1.79 MB", "1.35", "23.7×"]
    assert sizes["whole model, packed int8"] == ["14 MB", "-", "6.4×"]
    rows = latency_rows(int8)[1]
    assert [row[0] for row in rows] == [
        "dense, by torch in fp32", "dense, by the engine", "Prune Once for All + int8 in training, by the engine",
    ]  # fmt: skip
    assert rows[2][1:] == ["2.5", "2.25–2.75", "8.00×"]
    text = cost_tables(int8)
    assert "1 sequence of 128 tokens, 2 threads, median of 30 alternating runs, engine on amx, Some CPU." in text
    del int8["latency"]["dense"]
    assert [row[3] for row in latency_rows(int8)[1]] == ["-", "-"]


def test_card_and_report_show_both(int8, tmp_path):
    assert "| packed int8, compressed | 1.79 MB | 1.35 | 23.7× |" in card_of(tmp_path, results=int8)
    values = {"results": int8, "recipe": example_recipe(), "inspection": example_inspection()}
    page = write_report(tmp_path / "report.html", **values, events=example_events()).read_text(encoding="utf-8")
    assert re.findall(r"<h2>(Results|Size|Latency|Accuracy per task)</h2>", page) == [
        "Results", "Size", "Latency", "Accuracy per task",
    ]  # fmt: skip
    assert "<td>23.7×</td>" in page
    chart = json.dumps(accuracy_chart(int8).to_dict())
    assert "#2f6fb5" in chart and "#97b7da" in chart  # the engine's bar is lighter


def test_a_run_without_int8_has_no_tables_of_int8(tmp_path):
    results = example_results()
    assert "Stored as" not in cost_tables(results) and write_table([results]).endswith(f"\n\n{NOTES}\n")
    assert "packed int8" not in card_of(tmp_path, results=results)
    assert size_rows(results | {"sizes": None})[1] == latency_rows(results | {"latency": None})[1] == []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_results_still_give_their_table(path):
    results = read_results(path)
    assert write_table([results]) + cost_tables(results) == path.with_name("table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("latency", "message"),
    [
        ([1], r"^x: latency is \[1\], wanted a mapping"),
        ({"quantise": times(1)}, r"^x: latency has 'quantise'; did you mean 'quantize'\?"),
        ({"quantize_engine": {"median_ms": -1}}, r"^x: latency.quantize_engine.median_ms is -1, wanted a number"),
        ({"dense": 3}, r"^x: latency.dense is 3, wanted a mapping"),
    ],
)
def test_latency_that_breaks_the_schema(latency, message):
    with pytest.raises(InputError, match=message):
        check_results(example_results() | {"latency": latency}, "x")
