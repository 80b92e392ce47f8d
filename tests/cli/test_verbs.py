"""Every verb on a small recipe: the first run as a program, what follows in this process."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from pruneofa.formats.files import read_json
from tests.cli.conftest import program, write_recipe
from tests.small import write_task, write_text

TEXT = ["--text", "sentence", "--label", "verdict"]
FAST = ["--epochs", "1", "--batch", "16", "--lr", "1e-3", "--max-length", "32", "--precision", "fp32"]
STAGES = {"teacher", "prune", "tasks/mine/seed-0/teacher", "tasks/mine/seed-0/transfer"}
STEPS = STAGES | {f"evaluate {stage}" for stage in STAGES if stage.startswith("tasks/")}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    file = write_recipe(root)
    said = program("run", file, "--out", root / "run", "--set", "prune.final=0.8", "--json")
    return root, file, said


@pytest.fixture
def again(done):
    """The arguments of that run."""
    root, file, _ = done
    return ["run", file, "--out", root / "run", "--set", "prune.final=0.8"]


def test_run_prints_results_and_nothing_else_on_stdout(done):
    root, _, said = done
    assert said.code == 0, said.err
    results = json.loads(said.out)
    assert results == read_json(root / "run" / "results.json")
    assert results["recipe"]["prune"]["final"] == 0.8 and results["sparsity"] == pytest.approx(0.8, abs=2e-3)
    assert set(results["stages"]) == STAGES
    assert "Traceback" not in said.err and "Warning" not in said.err
    assert sorted(path.name for path in root.iterdir()) == [
        "model", "recipe.yaml", "run", "task.csv", "text.jsonl", "validation.csv",
    ]  # fmt: skip


def test_running_again_skips_everything_and_shows_where_things_are(done, again, call):
    root, *_ = done
    before = {path: path.stat().st_mtime_ns for path in root.rglob("model.safetensors")}
    said = call(*again)
    assert said.code == 0, said.err
    model, rule, *rows = said.out.partition("\n\n")[0].splitlines()
    assert model.startswith("| Model | Sparsity |") and rule.startswith("| --- |")
    assert any(row.startswith("| small: Prune Once for All") for row in rows)
    for file in ("results.json", "table.md", "report.html", "sparse/README.md"):
        assert f"{root / 'run' / file}\n" in said.out
    model = root / "run/tasks/mine/seed-0/transfer"
    assert f"\nTask models:\n{model}\n" in said.out and said.out.endswith(f"\nNext: pruneofa pack {model} PACKED\n")
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("model.safetensors")}


def test_dry_run_says_what_it_would_cost_and_writes_nothing(done, again, call, tmp_path):
    said = call(*again, "--dry-run", "--json")
    rows = {row["stage"]: row for row in json.loads(said.out)}
    assert set(rows) == STEPS | {"total"}
    assert {rows[step]["status"] for step in STEPS} == {"done"}
    said = call("run", done[1], "--out", tmp_path / "new", "--dry-run")
    assert said.code == 0, said.err
    assert all(stage in said.out for stage in STAGES) and "minutes" in said.out and "tokens" in said.out
    assert list(tmp_path.iterdir()) == []


def test_changed_settings_stop_until_redo(done, again, call, refused, tmp_path):
    root, *_ = done
    copy = tmp_path / "run"
    shutil.copytree(root / "run", copy)
    changed = ["run", done[1], "--out", copy, "--set", "prune.final=0.8", "--set", "tasks.mine.temperature=3"]
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    line = refused(*changed)
    assert "tasks/mine/seed-0/transfer" in line and "--redo" in line and "prune" not in line.split(";")[0]
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    said = call(*changed, "--redo", "--json")
    assert said.code == 0, said.err
    record = read_json(copy / "tasks/mine/seed-0/transfer/stage.json")
    assert record["settings"]["losses"]["temperature"] == 3
    assert call(*changed, "--json").code == 0


def test_the_folder_of_another_recipe_is_refused(done, again, refused, tmp_path):
    line = refused(*again, "--set", "name=other")
    assert "contains the run 'small', this recipe is 'other'; choose another --out" in line
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "not a run's folder" in refused("run", done[1], "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_recipe_files_merge(done, call, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("prune: {final: 0.8}\nseeds: [0, 7]\n")
    said = call("run", done[1], over, "--out", done[0] / "run", "--dry-run", "--json")
    rows = {row["stage"]: row["status"] for row in json.loads(said.out)}
    assert rows["prune"] == "done" and rows["tasks/mine/seed-0/transfer"] == "done"
    assert rows["tasks/mine/seed-7/transfer"] == "run"


def test_inspect(done, call):
    root, *_ = done
    said = call("inspect", root / "run" / "sparse", "--json")
    found = json.loads(said.out)
    assert found["encoder"] == pytest.approx(0.8, abs=2e-3)
    assert len(found["layers"]) == 2 * 6 + 1 and len(found["pattern_hash"]) == 64
    assert found["sizes"]["entropy_bound_int8"] < found["sizes"]["dense_fp32"]
    said = call("inspect", root / "run" / "sparse")
    assert "encoder.layer.1.output.dense.weight" in said.out and found["pattern_hash"] in said.out
    assert "pooler.dense.weight" in said.out


def test_verify(done, call, tmp_path):
    sparse, transfer = done[0] / "run" / "sparse", done[0] / "run/tasks/mine/seed-0/transfer"
    said = call("verify", sparse, transfer)
    assert said.code == 0 and said.out.startswith("ok: every zero of BASE is zero in DERIVED, which has ")
    assert json.loads(call("verify", sparse, transfer, "--json").out)["ok"] is True
    shutil.copytree(transfer, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    weights = load_file(file)
    layer = "encoder.layer.1.attention.self.key.weight"
    weight = weights[f"bert.{layer}"]
    weight[tuple(index[0] for index in (weight == 0).nonzero())] = 1e-30
    save_file(weights, file, {"format": "pt"})
    said = program("verify", sparse, tmp_path / "broken")
    assert said.code == 1
    assert f"revived: {layer}: 1 weights" in said.out
    assert said.out.endswith("FAILED: 1 zero of BASE is not zero in DERIVED, in 1 layer\n")
    said = call("verify", sparse, tmp_path / "broken", "--json")
    assert said.code == 1 and json.loads(said.out)["revived"] == [{"layer": layer, "count": 1}]


def test_evaluate(done, call):
    root, *_ = done
    transfer = root / "run/tasks/mine/seed-0/transfer"
    options = ["--data", root / "task.csv", "--validation", root / "validation.csv", *TEXT, "--max-length", "32"]
    said = call("evaluate", transfer, *options, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out) == read_json(transfer / "metrics.json")
    assert "accuracy" in call("evaluate", transfer, *options).out


def test_evaluate_takes_every_row_of_a_file_and_says_how_many(done, call):
    root, *_ = done
    transfer = root / "run/tasks/mine/seed-0/transfer"
    said = call("evaluate", transfer, "--data", root / "validation.csv", *TEXT, "--max-length", "32", "--json")
    assert said.code == 0, said.err
    assert "evaluate custom: 40 rows\n" in said.err
    assert json.loads(said.out) == read_json(transfer / "metrics.json")


def test_columns_that_yaml_would_read_as_something_else(done, call, tmp_path):
    root, *_ = done
    rows = (root / "validation.csv").read_text().splitlines()
    for column in ("0", "#label", "null", "- x"):
        (tmp_path / "d.csv").write_text("\n".join([f"true,{column}", *rows[1:]]) + "\n")
        options = ["--data", tmp_path / "d.csv", "--text", "true", f"--label={column}", "--max-length", "32"]
        said = call("evaluate", root / "run/tasks/mine/seed-0/transfer", *options)
        assert said.code == 0, said.err


def test_transfer_on_a_file_of_ones_own(done, call, refused, tmp_path):
    sparse = done[0] / "run" / "sparse"
    data = write_task(tmp_path / "reviews.csv")
    command = ["transfer", sparse, tmp_path / "alone", "--data", data, *TEXT, *FAST]
    for loss in ("hard", "kd", "hidden", "temperature"):
        assert f"--{loss} was given, but without --teacher" in refused(*command, f"--{loss}", "1")
    said = call(*command, "--json")
    assert said.code == 0, said.err
    assert "no --teacher given" in said.err
    assert f"locking the pattern of {sparse}: 79.98 % of its encoder's weights" in said.err
    assert "warning" not in said.err
    result = json.loads(said.out)
    assert result.pop("out") == str(tmp_path / "alone")
    assert result == read_json(tmp_path / "alone" / "metrics.json")
    assert call("verify", sparse, tmp_path / "alone").code == 0
    assert read_json(tmp_path / "alone" / "config.json")["id2label"] == {"0": "bad", "1": "good"}
    again = call(*command)
    assert again.code == 0 and f"{tmp_path / 'alone'}: is done already, nothing is computed again" in again.err
    assert (tmp_path / "alone" / "model.safetensors").stat().st_mode & 0o044 == 0o044  # for the user of a server
    assert "--redo" in refused_lines(call(*command, "--seed", "1"))

    teacher = tmp_path / "teacher #1"
    shutil.copytree(done[0] / "run/tasks/mine/seed-0/teacher", teacher)
    taught = ["transfer", sparse, tmp_path / "taught", "--data", data, *TEXT, *FAST, "--teacher", teacher]
    said = call(*taught)
    assert said.code == 0 and "no --teacher" not in said.err, said.err
    assert call("verify", sparse, tmp_path / "taught").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "reviews.csv", "taught", "teacher #1"]


def refused_lines(said):
    """Like the fixture `refused`, where a note comes before the error."""
    assert said.code == 2
    return said.err.splitlines()[-1]


def test_prune_alone(done, call, tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    common = ["--corpus.source", text, "--corpus.max_length", "32", "--corpus.validation", "0.2", "--precision", "fp32"]
    steps = ["--prune.steps", "4", "--prune.batch", "8", "--prune.pattern", "2:4", "--prune.final", "0.5"]
    skip = ["--prune.skip", r"layer\.0\.", "pooler"]
    said = call("prune", done[0] / "model", tmp_path / "out", *common, *steps, *skip, "--no-teacher", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["loss"] > 0
    found = json.loads(call("inspect", tmp_path / "out", "--json").out)
    assert found["encoder"] == pytest.approx(0.25) and found["pooler"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.jsonl"]


def test_table_joins_runs(done, call, tmp_path):
    first = done[0] / "run" / "results.json"
    second = read_json(first)
    second["recipe"]["name"] = "another"
    (tmp_path / "results.json").write_text(json.dumps(second))
    said = call("table", first, tmp_path)
    assert said.code == 0 and "small" in said.out and "another" in said.out
    assert [row["recipe"]["name"] for row in json.loads(call("table", first, tmp_path, "--json").out)] == [
        "small",
        "another",
    ]
