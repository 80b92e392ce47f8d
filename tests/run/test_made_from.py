"""The models that a run publishes together were made from each other, whatever became of its folders since."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruneofa.errors import CheckFailed, InputError
from pruneofa.formats.files import read_json, write_json
from pruneofa.run import fine_tuning
from pruneofa.run.folder import refuse_changes
from pruneofa.run.inputs import Inputs
from pruneofa.run.plan import plan
from pruneofa.run.run import run
from pruneofa.run.stage import Stage

SEED = "tasks/mine/seed-0"
REPORTS = ("results.json", "table.md", "report.html", "sparse/README.md")


def changed(settings, folder):
    steps = plan(settings, Inputs(settings), folder)
    return {str(step): step.differences() for step in steps if isinstance(step, Stage) and step.status == "changed"}


def remake(folder, name):
    """Another model in the place of a stage's, with the same settings: a GPU gives other bits every time."""
    record = read_json(folder / name / "stage.json")
    write_json(folder / name / "stage.json", record | {"output": "another"})


def roll(folder):
    tensors = load_file(folder / "model.safetensors")
    rolled = {n: w.roll(1, 0) if "encoder" in n and w.ndim == 2 else w for n, w in tensors.items()}
    save_file({name: weight.contiguous() for name, weight in rolled.items()}, folder / "model.safetensors")


def test_a_record_says_which_weights_were_made_of_which(done):
    settings, folder = done
    records = {name: read_json(folder / name / "stage.json") for name in ("teacher", "sparse", f"{SEED}/teacher")}
    transfer = read_json(folder / SEED / "transfer" / "stage.json")
    assert records["teacher"]["made_from"] == {}  # its model has a fingerprint of its contents
    assert records["sparse"]["made_from"] == {"teacher": records["teacher"]["output"]}
    assert transfer["made_from"] == {
        "model": records["sparse"]["output"],
        "teacher": records[f"{SEED}/teacher"]["output"],
    }
    assert changed(settings, folder) == {}


@pytest.mark.parametrize(("name", "as_what"), [("sparse", "model"), (f"{SEED}/teacher", "teacher")])
def test_what_was_made_from_another_model_is_not_done(done, copy, name, as_what):
    settings, _ = done
    remake(copy, name)
    assert changed(settings, copy) == {f"{SEED}/transfer": [f"{as_what} made again"]}
    with pytest.raises(InputError, match=rf"changed: {SEED}/transfer \({as_what} made again\); --redo runs"):
        run(settings, copy)
    run(settings, copy, redo=True)
    assert read_json(copy / SEED / "transfer" / "stage.json")["made_from"][as_what] == "another"


def test_what_was_made_from_a_model_that_is_gone_is_not_done(done, copy):
    settings, _ = done
    shutil.rmtree(copy / "teacher")
    gone = f"teacher is gone: put {copy / 'teacher'} back"
    assert changed(settings, copy) == {"prune": [gone], f"{SEED}/transfer": ["model made again"]}


def test_work_that_was_begun_from_another_model_is_not_continued(done, copy, monkeypatch):
    settings, _ = done
    shutil.rmtree(copy / SEED / "transfer")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fine_tuning, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        run(settings, copy)
    steps = plan(settings, Inputs(settings), copy)
    refuse_changes(steps, copy, False)
    remake(copy, "sparse")
    with pytest.raises(InputError, match=rf"changed: {SEED}/transfer \(unfinished\); --redo"):
        run(settings, copy)


def test_weights_that_were_replaced_are_not_published_with_others(done, copy):
    settings, _ = done
    (copy / "table.md").unlink()
    roll(copy / "sparse")
    wanted = rf"{SEED}/transfer: lost the pattern of .*sparse: .* revived .*delete .*{SEED}/transfer and run again"
    with pytest.raises(CheckFailed, match=wanted):
        run(settings, copy)
    assert not (copy / "table.md").exists()


def test_reports_of_models_that_are_replaced_do_not_outlive_them(done, copy, monkeypatch):
    settings, _ = done
    assert all((copy / name).exists() for name in REPORTS)
    other = settings.model_copy(deep=True)
    other.tasks["mine"].dropout = 0.0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fine_tuning, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        run(other, copy, redo=True)
    assert not any((copy / name).exists() for name in REPORTS)
    run(settings, copy, redo=True)  # nothing else was lost
    assert all((copy / name).exists() for name in REPORTS)
    assert torch.equal(*(load_file(root / SEED / "transfer/model.safetensors")["classifier.weight"]
                         for root in (copy, done[1])))  # fmt: skip
