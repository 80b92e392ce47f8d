"""Tables of what is lost against dense and of what training took."""

import pytest

from pruneofa.errors import InputError
from pruneofa.report.deployment import cost_tables
from pruneofa.report.report import write_report
from pruneofa.report.schema import check_results
from pruneofa.report.training import lost_rows, training_note, training_rows
from tests.report.example_run import example_events, example_inspection, example_recipe, example_results
from tests.report.test_card import card_of


@pytest.fixture
def results():
    results = example_results()
    tasks = results["tasks"]
    tasks["sst2"]["accuracy"]["transfer"]["lost"] = {"mean": 2.6, "standard_error": 0.71}
    tasks["squad"]["f1"]["transfer"]["lost"] = {"mean": -0.1, "standard_error": 0.2}
    stage = "tasks/sst2/seed-{}/transfer"
    epochs = [[{"accuracy": 80.0, "f1": 1.0}, {"accuracy": 84.0, "f1": 1.0}], [{"accuracy": 82.0}, {"accuracy": 83.0}]]
    results["stages"] |= {
        stage.format(seed): {
            "tokens": 1_000_000 * (1 + seed),
            "seconds": 60.0,
            "hardware": "Some GPU",
            "epochs": epochs[seed],
        }
        for seed in (0, 1)
    }
    check_results(results)
    return results


def test_what_is_lost_stands_in_the_columns_of_the_table(results):
    header, rows = lost_rows(results)
    cells = dict(zip(header, rows[0], strict=True))
    assert len(rows) == 1 and rows[0][0] == "Prune Once for All"
    assert cells["SST-2 (Acc)"] == "2.60 ± 0.71" and cells["SQuADv1.1 (EM/F1)"] == "- / -0.10 ± 0.20"
    assert cells["QQP (Acc/F1)"] == "-"
    assert lost_rows(example_results())[1] == []


def test_seeds_of_a_stage_are_one_line_with_their_means(results):
    header, rows = training_rows(results)
    cells = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    assert cells["sst2: Prune Once for All (2 seeds)"] == {
        "Tokens": "1.5 M", "Time": "1:00", "Hardware": "Some GPU",
        "After each epoch": "accuracy 81.00, 83.50", "The last epoch gave": "+2.50",
    }  # fmt: skip
    assert cells["pruning"]["Hardware"] == "-" == cells["pruning"]["After each epoch"]
    assert "held out" in training_note(results) and "held out" not in training_note(example_results())
    assert training_rows(example_results())[0] == ["Stage", "Tokens", "Time"]  # an older run's records say no more


def test_table_card_and_report_show_them(results, tmp_path):
    assert "| Prune Once for All | - / -0.10 ± 0.20 |" in cost_tables(results)
    assert "accuracy 81.00, 83.50" in card_of(tmp_path, results=results)
    values = {"results": results, "recipe": example_recipe(), "inspection": example_inspection()}
    page = write_report(tmp_path / "report.html", **values, events=example_events()).read_text(encoding="utf-8")
    assert "<h2>Lost against dense</h2>" in page and "<td>2.60 ± 0.71</td>" in page and "<td>Some GPU</td>" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hardware": 3}, r"seed-1/transfer\.hardware is 3, wanted a string"),
        ({"epochs": 3}, r"epochs is 3, wanted the metrics of every epoch"),
        ({"epochs": [{"accuracy": 101}]}, r"epochs, epoch 1, accuracy is 101, wanted a number from 0 to 100"),
        ({"epochs": [{"acuracy": 1}]}, r"epochs has 'acuracy'; did you mean 'accuracy'"),
    ],
)
def test_a_wrong_record_of_a_stage_is_named(results, change, message):
    results["stages"]["tasks/sst2/seed-1/transfer"] |= change
    with pytest.raises(InputError, match=message):
        check_results(results)


@pytest.mark.parametrize(
    "lost", [{"mean": 2.0}, {"mean": 200, "standard_error": 1.0}, {"mean": 2, "standard_error": -1}]
)
def test_a_wrong_difference_is_named(results, lost):
    results["tasks"]["sst2"]["accuracy"]["transfer"]["lost"] = lost
    with pytest.raises(InputError, match=r"tasks\.sst2\.accuracy\.transfer\.lost\.(mean|standard_error) is"):
        check_results(results)
