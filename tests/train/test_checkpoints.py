import multiprocessing
import signal
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from pruneofa.train import PruningCallback, checkpoints, trainer
from pruneofa.train.checkpoints import BackgroundWriter, Snapshot, last_checkpoint
from pruneofa.train.masks import prunable
from tests.tiny import tiny_bert
from tests.train.fits import SCHEDULE, fit, objective, small_text
from tests.train.killed_training import killed_training


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return small_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """The weights and tokens of a training that nothing disturbs."""
    torch.manual_seed(0)
    trained = objective(dropout=0.1)
    clock = fit(trained, text, tmp_path_factory.mktemp("straight"), callbacks=[PruningCallback(**SCHEDULE)])
    return trained.student, clock["tokens"]


def test_pruned_weights_can_be_trained_when_the_training_that_pruned_them_has_ended(straight):
    for name, weight in prunable(straight[0]).items():
        assert (weight == 0).any(), name
        (gradient,) = torch.autograd.grad((weight - 1).square().sum(), weight)
        assert (gradient != 0).all(), name


@pytest.mark.parametrize("where", ["in a file", "before the marker"])
def test_killed_while_a_checkpoint_is_written_it_resumes_from_the_one_before(straight, tmp_path, where):
    killed = multiprocessing.get_context("fork").Process(target=killed_training, args=(where, tmp_path))
    killed.start()
    killed.join(250)
    assert killed.exitcode == -signal.SIGKILL
    assert (tmp_path / "work" / "checkpoint-6").is_dir()
    assert last_checkpoint(tmp_path / "work").name == "checkpoint-3"
    events, resumed = [], objective(dropout=0.1)
    pruning = PruningCallback(**SCHEDULE)
    clock = fit(resumed, small_text(tmp_path), tmp_path / "work", callbacks=[pruning], save_steps=3, events=events)
    assert events[0]["step"] == 3
    assert clock["tokens"] == straight[1]
    for (name, wanted), got in zip(straight[0].named_parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(wanted, got), name


def test_training_goes_on_while_a_checkpoint_is_written(text, tmp_path, monkeypatch):
    flush, reached = checkpoints.sync_tree, threading.Event()

    def wait_for_training(checkpoint):
        if checkpoint.name == "checkpoint-3":
            assert threading.current_thread() is not threading.main_thread()
            assert reached.wait(60)  # times out if training waits for this
        flush(checkpoint)

    class Reached(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                reached.set()

    monkeypatch.setattr(checkpoints, "sync_tree", wait_for_training)
    fit(objective(), text, tmp_path, steps=6, save_steps=3, callbacks=[Reached()])
    assert last_checkpoint(tmp_path).name == "checkpoint-6"


def test_only_one_snapshot_is_in_memory(text, tmp_path, monkeypatch):
    taken, flush, take = [], checkpoints.sync_tree, Snapshot.of

    def slow(checkpoint):
        time.sleep(1)  # longer than the steps between two checkpoints
        flush(checkpoint)

    def counted(*state):
        time.sleep(0.1)  # the writer's thread releases a snapshot just after it says that it is written
        assert [snapshot for snapshot in taken if snapshot() is not None] == []
        snapshot = take(*state)
        taken.append(weakref.ref(snapshot))
        return snapshot

    monkeypatch.setattr(checkpoints, "sync_tree", slow)
    monkeypatch.setattr(Snapshot, "of", counted)
    fit(objective(), text, tmp_path, steps=3, save_steps=1)
    assert len(taken) == 3


def test_checkpoints_go_by_time_and_one_is_written_at_the_end(text, tmp_path, monkeypatch):
    saved = []

    class Saved(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved.append(state.global_step)

    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(trainer, "time", clock)

    class Minutes(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock.now += 60

    fit(objective(), text, tmp_path, steps=12, save_minutes=5, callbacks=[Saved(), Minutes()])
    assert saved == [5, 10, 12]


def test_a_snapshot_keeps_its_values_and_loads_as_the_trainer_loads(tmp_path):
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moment = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    taken = Snapshot.of(model, optimizer, scheduler)
    optimizer.step()
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / checkpoints.CLOCK_FILE).write_text("{}")
    taken.write(tmp_path)
    weights = checkpoints.read_state(tmp_path / checkpoints.MODEL)
    assert set(before) - set(weights) == set(model.all_tied_weights_keys)
    assert all(torch.equal(before[name], value) for name, value in weights.items())
    stored = torch.load(tmp_path / checkpoints.OPTIMIZER, weights_only=True)
    assert torch.equal(stored["state"][0]["exp_avg"], moment)
    assert checkpoints.complete(tmp_path.parent) == [] and (tmp_path / checkpoints.COMPLETE).exists()


def test_an_error_of_the_writer_is_raised_by_the_next_call():
    def fail():
        raise OSError("disk")

    writer = BackgroundWriter()
    writer.start(fail)
    with pytest.raises(OSError, match="disk"):
        while True:
            writer.check()
            time.sleep(0.01)
    writer.start(fail)
    with pytest.raises(OSError, match="disk"):
        writer.start(lambda: None)
    writer.start(fail)
    writer.close()  # after an error elsewhere
