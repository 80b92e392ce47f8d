"""What a stage's fingerprint and record hold: every setting that decides its result, and no other."""

from dataclasses import replace
from pathlib import Path

import pytest

from pruneofa import recipe
from pruneofa.errors import InputError
from pruneofa.formats.files import write_json
from pruneofa.formats.locks import exclusive
from pruneofa.run import single, stage
from pruneofa.run.folder import refuse_changes
from pruneofa.run.inputs import Inputs
from pruneofa.run.plan import plan
from pruneofa.run.pretraining import PruneSettings
from pruneofa.run.run import run
from tests.small import small_recipe, write_task

SEED = "tasks/mine/seed-0"
BOTH = {f"{SEED}/transfer", f"{SEED}/control"}  # the sparse and the control model on the task
# As small_recipe has no teacher of its own for the task, one is fine-tuned, on which all else of the task depends.
TEXT = {"teacher", "prune", "control"}
ALL = TEXT | BOTH | {f"{SEED}/{name}" for name in ("teacher", "ptq", "quantize")}
INT8 = {f"{SEED}/ptq", f"{SEED}/quantize"}
TASK = {f"{SEED}/{name}" for name in ("teacher", "transfer", "control", "ptq", "quantize")}
AFTER_PRUNE = {"prune", f"{SEED}/transfer", *INT8}
AFTER_CONTROL = {"control", f"{SEED}/control"}
STUDENTS = AFTER_PRUNE | AFTER_CONTROL  # whatever comes of the losses and settings of the prune section
TUNED = {*BOTH, *INT8}
SAME: set[str] = set()
REFUSED = None
QUANTIZE = {f"{SEED}/quantize"}
PTQ = {f"{SEED}/ptq"}
# The tiny teacher starts at the model, so the dense task model does not depend on the stages on text.
AFTER_TEACHER = TEXT | TUNED
EVALUATED = {f"evaluate {name}" for name in TASK}

CHANGES = {
    "teacher": {
        "steps": (5, AFTER_TEACHER),
        "lr": (2e-3, AFTER_TEACHER),
        "batch": (4, AFTER_TEACHER),
        "micro_batch": (2, SAME),
        "warmup": (0.1, AFTER_TEACHER),
        "weight_decay": (0.02, AFTER_TEACHER),
        "max_grad_norm": (2.0, AFTER_TEACHER),
        "dropout": (0.0, AFTER_TEACHER),
        "checkpoint_activations": (True, SAME),
        "save_steps": (1, SAME),
        "save_minutes": (1.0, SAME),
    },
    "prune": {
        "score": ("hessian", AFTER_PRUNE),
        "one_shot": (True, AFTER_PRUNE),
        "calibration": (64, SAME),  # of other scores, as the next three
        "gradients": (64, SAME),
        "block": (16, SAME),
        "dampening": (0.1, SAME),
        "steps": (11, STUDENTS),
        "lr": (2e-3, AFTER_PRUNE),
        "batch": (4, STUDENTS),
        "micro_batch": (2, SAME),
        "warmup": (0.1, STUDENTS),
        "weight_decay": (0.02, STUDENTS),
        "max_grad_norm": (2.0, STUDENTS),
        "dropout": (0.0, STUDENTS),
        "checkpoint_activations": (True, SAME),
        "save_steps": (1, SAME),
        "save_minutes": (1.0, SAME),
        "skip_zeros": (False, SAME),
        "begin": (1, AFTER_PRUNE),
        "end": (4, AFTER_PRUNE),
        "stop": (9, AFTER_PRUNE),
        "interval": (2, AFTER_PRUNE),
        "final": (0.8, STUDENTS),
        "initial": (0.1, AFTER_PRUNE),
        "pattern": ("4x1", STUDENTS),
        "scope": ("global", STUDENTS),
        "skip": (["query"], STUDENTS),
        "rewind": ("none", AFTER_PRUNE),
    },
    "distill": {
        "hard": (0.4, STUDENTS),
        "kd": (0.4, STUDENTS),
        "temperature": (3.0, STUDENTS),
        "hidden": (0.1, STUDENTS),
        "hidden_norm": (True, STUDENTS),
        "positions": ("masked", STUDENTS),
    },
    "control": {"tasks": (["mine"], SAME), "lr": ([1e-3, 3e-3], AFTER_CONTROL)},
    "quantize": {
        "weights": ("tensor", INT8),
        "activations": ("dynamic", INT8),
        "embeddings": (False, INT8),
        "freeze": (0.5, QUANTIZE),
        "ptq": (False, SAME),  # there is one stage less, and the others stay
        "calibration": (8, PTQ),
        "observer": ("percentile", PTQ),
        "percentile": (99.0, SAME),  # of another observer
    },
    "task": {
        "check_epochs": (True, TASK),
        "data": ("other.csv", TASK),
        "validation": ("other.csv", EVALUATED),
        "text": ("second", TASK),
        "label": ("other", TASK),
        "epochs": (7, BOTH | INT8 | {f"{SEED}/teacher"}),  # dense_epochs follows it
        "lr": (2e-3, BOTH | INT8 | {f"{SEED}/teacher"}),
        "batch": (4, TASK),
        "max_length": (8, TASK),
        "stride": (4, REFUSED),  # of question answering
        "warmup": (0.1, TASK),
        "weight_decay": (0.02, TASK),
        "max_grad_norm": (2.0, TASK),
        "hard": (0.2, TUNED),
        "kd": (0.9, TUNED),
        "hidden": (0.1, TUNED),
        "temperature": (3.0, TUNED),
        "dropout": (0.0, TUNED),
        "freeze_embeddings": (True, TASK),
        "teacher": ("model", TASK),
        "dense_epochs": (8, TASK),
        "dense_lr": (3e-3, TASK),
        "qat_epochs": (9, QUANTIZE),
        "qat_lr": (3e-3, QUANTIZE),
        "qat_rows": (8, QUANTIZE),
        "train_rows": (40, TASK),
        "validation_rows": (20, EVALUATED),
        "save_minutes": (1.0, SAME),
        "skip_zeros": (False, SAME),
        "skip_bad_answers": (True, REFUSED),  # of question answering
    },
}  # fmt: skip
SECTIONS = {
    "teacher": recipe.Teacher, "prune": recipe.Prune, "distill": recipe.Distill, "control": recipe.Control,
    "quantize": recipe.Quantize, "task": recipe.Task,
}  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("prints") / "data"
    made = small_recipe(root, "control={lr: [1e-3]}", "quantize={}")
    write_task(root / "other.csv", rows=60, seed=3)
    for name in ("task.csv", "validation.csv", "other.csv"):
        header, *rows = (root / name).read_text().splitlines()
        wide = [f"{header},second,other"]
        wide += [f"{row},more {row.split(',')[0]},{('x', 'y', 'y')[n % 3]}" for n, row in enumerate(rows)]
        (root / name).write_text("\n".join(wide) + "\n")
    return made


def changed_recipe(settings, section, field, value):
    changed = settings.model_copy(deep=True)
    if field == "teacher" and section == "task":
        value = changed.model
    setattr(changed.tasks["mine"] if section == "task" else getattr(changed, section), field, value)
    return changed


def prints(settings):
    return {str(step): step.fingerprint for step in plan(settings, Inputs(settings), Path("nowhere"))}


def test_the_table_names_every_field():
    for name, section in SECTIONS.items():
        assert set(CHANGES[name]) == set(section.model_fields), name


@pytest.mark.parametrize(
    ("section", "field"), [(section, field) for section, fields in CHANGES.items() for field in fields]
)
def test_a_field_changes_the_stages_that_use_it(settings, section, field):
    value, expected = CHANGES[section][field]
    if expected is REFUSED:
        with pytest.raises(InputError, match=rf"tasks\.mine\.{field} is {value}, but only squad uses it; omit it"):
            prints(changed_recipe(settings, section, field, value))
        return
    before, after = prints(settings), prints(changed_recipe(settings, section, field, value))
    assert set(before) == ALL | EVALUATED
    remade = {f"evaluate {name}" for name in expected & TASK}  # of another model
    assert {name for name in after if after[name] != before[name]} == expected | remade


SELECTED = {"begin", "end", "stop", "interval", "initial", "rewind"}
TRAINED = {"lr", "batch", "warmup", "weight_decay", "max_grad_norm", "dropout"}


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"score": "fisher"}, {"calibration", "gradients", "block", "dampening"}),
        ({"score": "obs"}, {"calibration", "stop"}),
        ({"score": "obs", "one_shot": True}, {"calibration"} | SELECTED),
        ({"score": "fisher", "one_shot": True}, {"calibration", "block", "dampening"} | SELECTED),
        ({"score": "hessian", "steps": 0}, {"gradients", "block", "dampening"} | SELECTED | TRAINED),
    ],
)
def test_what_a_way_of_pruning_does_not_read_is_left_out(given, missing):
    section = recipe.Prune(**{"steps": 10} | given)
    distill = recipe.Distill(kd=0.0, hidden=0.0)
    made = PruneSettings(section, distill, recipe.Corpus(source="text"), 0, "fp32")
    recorded = stage.fingerprinted(made)
    assert section.fingerprinted().keys() - recorded["prune"].keys() == missing
    assert distill.fingerprinted().keys() - recorded["distill"].keys() == {"temperature", "positions", "hidden_norm"}


@pytest.mark.parametrize(
    "record",
    [{}, {"format": stage.FORMAT - 1, "settings": {}}, {"format": stage.FORMAT + 1, "settings": {"lr": 1.0}}],
)
def test_the_record_of_another_format_is_refused(settings, tmp_path, record):
    steps = plan(settings, Inputs(settings), tmp_path / "run")
    write_json(tmp_path / "run" / "teacher" / "stage.json", record)
    wanted = (
        rf"run: has records of format {record.get('format', 0)}, which another version of pruneofa wrote "
        rf"\(teacher\); this one writes {stage.FORMAT}; .*--redo"
    )
    with pytest.raises(InputError, match=wanted):
        refuse_changes(steps, tmp_path / "run", False)
    refuse_changes(steps, tmp_path / "run", True)


def test_redo_makes_again_what_another_version_made_whatever_its_records_hold(settings, tmp_path):
    folder = tmp_path / "run"
    made = settings.model_copy(update={"tasks": {}, "control": False, "quantize": None})
    for name, record in {"teacher": {}, "sparse": {"format": stage.FORMAT + 1, "settings": [], "output": 5}}.items():
        write_json(folder / name / "stage.json", record)
    (folder / "recipe.yaml").write_text(f"{recipe.dump(made)}later: 1\n")
    with pytest.raises(InputError, match=rf"format {stage.FORMAT + 1}, .* \(teacher, prune\); .* with --redo"):
        run(made, folder)
    run(made, folder, redo=True)
    assert {step.status for step in plan(made, Inputs(made), folder)} == {"done"}


@pytest.mark.parametrize(
    "record",
    [
        {"format": "1"}, {"fingerprint": None}, {"settings": 5}, {"inputs": [1]}, {"versions": [1]}, {"output": 5},
        {"made_from": []},
    ],
)  # fmt: skip
def test_a_record_that_was_edited_is_named(settings, tmp_path, record):
    record = {"format": stage.FORMAT} | record
    steps = plan(settings, Inputs(settings), tmp_path / "run")
    write_json(tmp_path / "run" / "teacher" / "stage.json", record)
    name = [key for key in record if key != "format"] or ["format"]
    with pytest.raises(InputError, match=rf"teacher/stage\.json: {name[0]} is .*, which no stage writes; restore the"):
        refuse_changes(steps, tmp_path / "run", False)


def test_a_single_stage_is_made_by_one_process_and_records_its_defaults(settings, tmp_path):
    inputs = Inputs(settings)
    teacher = plan(settings, inputs, tmp_path / ".out.pruneofa-work")[0]
    recorded = stage.fingerprinted(teacher.settings)["teacher"]
    assert recorded["weight_decay"] == 0.01 and "save_steps" not in recorded
    refused = pytest.raises(InputError, match=r"out: another pruneofa is at work here.*another OUT")
    with exclusive(tmp_path / "out"), refused:
        single._execute(settings, inputs, [replace(teacher, folder=tmp_path / "out")], tmp_path / "out", False)
    assert not (tmp_path / "out").exists()


def test_a_stage_owns_its_path_and_its_name():
    ids = {
        stage.StageId(None, None, "teacher"): ("teacher", "teacher"),
        stage.StageId(None, None, "prune"): ("sparse", "prune"),
        stage.StageId("sst2", 3, "dense"): ("tasks/sst2/seed-3/teacher", "tasks/sst2/seed-3/teacher"),
        stage.StageId("sst2", 3, "ptq"): ("tasks/sst2/seed-3/ptq", "tasks/sst2/seed-3/ptq"),
    }
    assert {id: (id.path, str(id)) for id in ids} == ids
