"""The teacher's logits computed before training: those of running it in every step."""

import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from pruneofa import recipe
from pruneofa.data.tasks import load_task
from pruneofa.errors import InputError
from pruneofa.run import fine_tuning, single
from pruneofa.train import teacher_logits
from pruneofa.train.models import set_dropout
from pruneofa.train.objective import TransferObjective
from pruneofa.train.teacher_logits import FILE, with_teacher_logits
from tests.data.task_files import write
from tests.small import write_task
from tests.tiny import HIDDEN, half_pruned, tiny_bert, tiny_tokenizer, write_model

LOSSES = {"hard": 0.5, "kd": 1.0, "temperature": 2.0}


def sentences(root):
    write_task(root / "t.csv", 90)
    write_task(root / "v.csv", 20, 1)
    files = {"data": str(root / "t.csv"), "validation": str(root / "v.csv"), "text": "sentence", "label": "verdict"}
    spec = recipe.Task(**files, epochs=2, batch=16, max_length=32, lr=1e-3, dropout=0.0)
    return "mine", spec.resolved("mine"), AutoModelForSequenceClassification


def questions(root):
    rows = [
        {"id": str(n), "question": "what", "context": "a film " + "and a book " * (n % 7) + f"of {n}",
         "answers": {"text": ["film"], "answer_start": [2]}}
        for n in range(40)
    ]  # fmt: skip
    write(root / "train.jsonl", rows)
    write(root / "validation.jsonl", rows[:4])
    spec = recipe.Task(data=str(root), epochs=2, batch=8, max_length=24, stride=4, lr=1e-3, dropout=0.0)
    return "squad", spec.resolved("squad"), AutoModelForQuestionAnswering


@pytest.fixture(params=[sentences, questions])
def case(request, tmp_path):
    """(task, its name and settings, a folder with the models `student` and `teacher`)."""
    name, spec, auto = request.param(tmp_path)
    task = load_task(name, spec, tiny_tokenizer())
    for seed, folder in enumerate(("student", "teacher")):
        write_model(tmp_path / "bare", tiny_bert(seed=seed))
        torch.manual_seed(seed)
        model = auto.from_pretrained(tmp_path / "bare", **task.model_kwargs())
        write_model(tmp_path / folder, half_pruned(model, seed=seed))
    return task, name, spec, tmp_path


def transfer(case, out):
    _, name, spec, root = case
    options = {"data_root": None, "seed": 0, "precision": "fp32"}
    spec = spec.model_copy(update={"teacher": str(root / "teacher")})
    single.transfer(str(root / "student"), out, name, spec, **options)
    return load_file(out / "model.safetensors")


def models(case):
    task, _, _, root = case
    auto = AutoModelForQuestionAnswering if task.kind == "qa" else AutoModelForSequenceClassification
    loaded = [auto.from_pretrained(root / name) for name in ("student", "teacher")]
    set_dropout(loaded[0], 0.0)
    return loaded


def test_loss_and_gradients_are_those_of_running_the_teacher(case, tmp_path):
    task = case[0]
    student, teacher = models(case)
    kept, _ = with_teacher_logits(task, teacher.eval(), tmp_path / "work", "fp32", "stage")
    batches = [data.collate([data.train[i] for i in range(9)]) for data in (task, kept)]
    results = []
    for batch, released in zip(batches, (False, True), strict=True):
        objective = TransferObjective(student, teacher, kind=task.kind, **LOSSES)
        if released:
            objective.distil_from_batches()
            assert objective.teacher is None
        student.zero_grad()
        losses = objective(batch, objective.counts(batch))
        losses["loss"].backward()
        results.append((losses, {name: weight.grad.clone() for name, weight in student.named_parameters()
                                 if weight.grad is not None}))  # fmt: skip
    (by_teacher, wanted), (by_logits, found) = results
    assert batches[0]["attention_mask"].min() == 0  # there is padding
    assert by_teacher["kd"] > 0.01
    torch.testing.assert_close(by_logits, by_teacher, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_transfer_runs_the_teacher_once_and_ends_with_the_same_weights(case, tmp_path, monkeypatch):
    seen = []
    logits_of = teacher_logits.logits_of
    monkeypatch.setattr(
        teacher_logits, "logits_of", lambda *given: seen.append(len(given[2])) or logits_of(*given)
    )  # fmt: skip
    found = transfer(case, tmp_path / "once")
    assert sum(seen) == len(case[0].train)
    monkeypatch.setattr(fine_tuning, "_run_teacher_once", lambda objective, settings, job, task, passes: (task, 0.0))
    wanted = transfer(case, tmp_path / "each-step")
    begun = load_file(case[3] / "student/model.safetensors")
    moved, apart = (sum(np.abs(wanted[name] - other[name]).sum() for name in wanted) for other in (begun, found))
    assert apart < 0.002 * moved  # Adam multiplies rounding where gradients are near 0


def test_what_a_kill_left_is_used_and_the_bits_are_the_same(case, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_logits, "ROWS", 1)  # several batches
    wanted = transfer(case, tmp_path / "whole")
    seen = []
    logits_of = teacher_logits.logits_of

    def killed(*given):
        if len(seen) == 2:
            raise MemoryError("killed")
        seen.append(len(given[2]))
        return logits_of(*given)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(teacher_logits, "logits_of", killed)
        transfer(case, tmp_path / "killed")
    (file,) = tmp_path.rglob(FILE.format(rank=0, world=1))
    os.truncate(file, file.stat().st_size - 3)  # as a full disk, which takes a part of a write
    again = seen.pop()
    monkeypatch.setattr(teacher_logits, "logits_of", lambda *given: seen.append(len(given[2])) or logits_of(*given))
    found = transfer(case, tmp_path / "killed")
    assert seen[1] == again and sum(seen) == len(case[0].train)
    for name, weight in wanted.items():
        np.testing.assert_array_equal(found[name], weight)


def test_what_was_not_written_so_is_computed_again(case, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_logits, "ROWS", 1)
    task, teacher = case[0], models(case)[1].eval()
    wanted, _ = with_teacher_logits(task, teacher, tmp_path / "work", "fp32", "stage")
    file = tmp_path / "work" / FILE.format(rank=0, world=1)
    written = file.read_bytes()
    middle = len(written) // 2
    changed = written[:middle] + bytes([written[middle] ^ 1]) + written[middle + 1 :]
    for left in (b"", b"other data", bytes(len(written)), written[:-1], changed, written + b"more"):
        file.write_bytes(left)
        found, _ = with_teacher_logits(task, teacher, tmp_path / "work", "fp32", "stage")
        np.testing.assert_array_equal(found.train.teacher_logits, wanted.train.teacher_logits)


def test_a_teacher_without_numbers_is_refused_before_training(case, tmp_path):
    task, teacher = case[0], models(case)[1].eval()
    with torch.no_grad():
        teacher.get_input_embeddings().weight[int(task.train.ids[1])] = float("nan")
    message = r"stage: \d+ of \d+ logits of the teacher are NaN or infinite, wanted numbers; train it again"
    with pytest.raises(InputError, match=message):
        with_teacher_logits(task, teacher, tmp_path / "work", "fp32", "stage")


def test_seconds_are_those_of_all_attempts(case, tmp_path, monkeypatch):
    task, teacher = case[0], models(case)[1].eval()
    monkeypatch.setattr(teacher_logits, "ROWS", 1)
    logits_of, seen = teacher_logits.logits_of, []

    def slow(*given):
        seen.append(1)
        if len(seen) == 3:
            raise MemoryError("killed")
        time.sleep(0.1)
        return logits_of(*given)

    monkeypatch.setattr(teacher_logits, "logits_of", slow)
    with pytest.raises(MemoryError):
        with_teacher_logits(task, teacher, tmp_path / "work", "fp32", "stage")
    _, first = with_teacher_logits(task, teacher, tmp_path / "work", "fp32", "stage")
    assert first > 0.1 * (len(seen) - 1)
    monkeypatch.setattr(teacher_logits, "logits_of", None)
    assert with_teacher_logits(task, teacher, tmp_path / "work", "fp32", "stage")[1] == first


def test_processes_compute_a_share_each(case, tmp_path, monkeypatch):
    task, teacher = case[0], models(case)[1].eval()
    monkeypatch.setattr(teacher_logits, "ROWS", 1)
    wanted, _ = with_teacher_logits(task, teacher, tmp_path / "one", "fp32", "stage")
    logits_of, seen, found = teacher_logits.logits_of, [], []

    def process(rank, others):
        state = SimpleNamespace(
            process_index=rank, num_processes=2, is_main_process=rank == 0, wait_for_everyone=others
        )
        monkeypatch.setattr(teacher_logits, "processes", lambda: state)
        monkeypatch.setattr(teacher_logits, "logits_of", lambda *given: seen.append(rank) or logits_of(*given))
        kept, _ = with_teacher_logits(task, teacher, tmp_path / "two", "fp32", "stage")
        found.append(kept.train.teacher_logits)

    process(0, lambda: process(1, lambda: None))
    assert abs(seen.count(0) - seen.count(1)) <= 1
    for logits in found:
        np.testing.assert_array_equal(logits, wanted.train.teacher_logits)


@pytest.mark.parametrize("fields", [{"hidden": 1.0}, {"epochs": 1}])
def test_the_teacher_runs_in_every_step_where_that_is_needed_or_costs_nothing(case, tmp_path, monkeypatch, fields):
    task, name, spec, root = case
    monkeypatch.setattr(teacher_logits, "logits_of", None)
    transfer((task, name, spec.model_copy(update=fields), root), tmp_path / "out")
    student, teacher = models(case)
    objective = TransferObjective(student, teacher, kind=task.kind, **LOSSES, hidden=1.0)
    assert student.config.hidden_size == HIDDEN
    with pytest.raises(InputError, match="hidden is above 0, so the teacher is needed in every step"):
        objective.distil_from_batches()


@pytest.mark.parametrize(("epochs", "share", "once"), [(1, 100, False), (2, 0.75, True), (2, 0.5, False)])
def test_passes_of_quantization_aware_training_are_over_the_rows_that_it_uses(
    case, tmp_path, monkeypatch, epochs, share, once
):
    task, name, spec, root = case
    seen = []
    logits_of = teacher_logits.logits_of
    monkeypatch.setattr(teacher_logits, "logits_of", lambda *given: seen.append(1) or logits_of(*given))
    rows = int(share * task.train.rows.num_rows)
    spec = spec.model_copy(
        update={"teacher": str(root / "teacher"), "qat_epochs": epochs, "qat_lr": 1e-3, "qat_rows": rows}
    )
    options = {"data_root": None, "seed": 0, "precision": "fp32"}
    single.quantize(str(root / "student"), tmp_path / "out", name, spec, recipe.Quantize(ptq=False), **options)
    assert bool(seen) == once
