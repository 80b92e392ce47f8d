"""What a stage's fingerprint and record hold: every setting that decides its result, and no other."""

from dataclasses import replace
from pathlib import Path

import pytest

from pruneofa import recipe
from pruneofa.errors import InputError
from pruneofa.formats.files import write_json
from pruneofa.run import plan as pipeline
from pruneofa.run import single as alone
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
QUANTIZE = {f"{SEED}/quantize"}
PTQ = {f"{SEED}/ptq"}
# The tiny teacher starts at the model, so the dense task model does not depend on the stages on text.
AFTER_TEACHER = TEXT | TUNED

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
    },
    "prune": {
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
        "data": ("other.csv", TASK),
        "validation": ("other.csv", TASK),
        "text": ("second", TASK),
        "label": ("other", TASK),
        "epochs": (7, BOTH | INT8 | {f"{SEED}/teacher"}),  # dense_epochs follows it
        "lr": (2e-3, BOTH | INT8 | {f"{SEED}/teacher"}),
        "batch": (4, TASK),
        "max_length": (8, TASK),
        "stride": (4, SAME),  # of question answering
        "warmup": (0.1, TASK),
        "weight_decay": (0.02, TASK),
        "max_grad_norm": (2.0, TASK),
        "hard": (0.2, TUNED),
        "kd": (0.9, TUNED),
        "hidden": (0.1, TUNED),
        "temperature": (3.0, TUNED),
        "dropout": (0.0, TUNED),
        "teacher": ("model", TASK),
        "dense_epochs": (8, TASK),
        "dense_lr": (3e-3, TASK),
        "qat_epochs": (9, QUANTIZE),
        "qat_lr": (3e-3, QUANTIZE),
        "qat_rows": (8, QUANTIZE),
        "train_rows": (40, TASK),
        "validation_rows": (20, TASK),
        "skip_bad_answers": (True, SAME),  # of question answering
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
    return {stage.name: stage.fingerprint for stage in pipeline.Run(settings, Path("nowhere")).stages()}


def test_the_table_names_every_field():
    for name, section in SECTIONS.items():
        assert set(CHANGES[name]) == set(section.model_fields), name


@pytest.mark.parametrize(
    ("section", "field"), [(section, field) for section, fields in CHANGES.items() for field in fields]
)
def test_a_field_changes_the_stages_that_use_it(settings, section, field):
    value, expected = CHANGES[section][field]
    before, after = prints(settings), prints(changed_recipe(settings, section, field, value))
    assert set(before) == ALL
    assert {name for name in after if after[name] != before[name]} == expected


def test_the_record_of_an_earlier_format_is_refused(settings, tmp_path):
    this = pipeline.Run(settings, tmp_path / "run")
    stages = this.stages()
    for record in ({"settings": {"lr": 1.0}, "versions": {"pruneofa": "0.1.0"}}, {"fingerprint": "x"}):
        write_json(tmp_path / "run" / "teacher" / "stage.json", record)
        with pytest.raises(InputError, match=r"made by pruneofa 0\.1.*do not record all settings \(teacher\).*--redo"):
            pipeline.refuse_changes(stages, this.work, False, this.folder)
        pipeline.refuse_changes(stages, this.work, True, this.folder)


def test_a_single_stage_is_made_by_one_process_and_records_its_defaults(settings, tmp_path):
    stage = next(stage for stage in pipeline.Run(settings, tmp_path / ".out.work").stages() if stage.name == "teacher")
    assert stage.settings["weight_decay"] == 0.01 and "save_steps" not in stage.settings
    stage = replace(stage, folder=tmp_path / "out")
    refused = pytest.raises(InputError, match=r"out: another pruneofa is at work here.*another OUT")
    with pipeline.only_one(tmp_path / ".out.work"), refused:
        alone._alone([stage], pipeline.Run(settings, tmp_path / ".out.work"), False)
    assert not (tmp_path / "out").exists()
