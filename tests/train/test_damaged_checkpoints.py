"""Checkpoints that are not whole: half written, cut, emptied, changed, or written by a clock that jumps."""

import errno
import os
import shutil
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from pruneofa.train import PruningCallback, checkpoints
from pruneofa.train.checkpoints import last_checkpoint
from tests.train.fits import SCHEDULE, fit, objective, small_text

SHORT = SCHEDULE | {"end": 4, "stop": 4}  # of trainings of six steps


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return small_text(tmp_path_factory.mktemp("text"))


def test_a_half_written_checkpoint_is_not_used(text, tmp_path):
    fit(objective(), text, tmp_path, save_steps=4, callbacks=[PruningCallback(**SCHEDULE)])
    assert last_checkpoint(tmp_path).name == "checkpoint-12"
    (tmp_path / "checkpoint-12" / "complete").unlink()
    assert last_checkpoint(tmp_path).name == "checkpoint-8"
    assert (tmp_path / "checkpoint-12").exists()  # looking changes nothing: another process may be writing it
    events = []
    fit(objective(), text, tmp_path, save_steps=4, callbacks=[PruningCallback(**SCHEDULE)], events=events)
    assert events[0]["step"] == 8


def test_a_disk_that_fills_up_while_saving_leaves_the_previous_checkpoint(text, tmp_path, monkeypatch):
    from pruneofa.train import trainer

    write = trainer.write_json
    saves = []

    def full_the_second_time(path, value):
        saves.append(path)
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, value)

    monkeypatch.setattr(trainer, "write_json", full_the_second_time)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        fit(objective(), text, tmp_path, save_steps=3, callbacks=[PruningCallback(**SCHEDULE)])
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    fit(objective(), text, tmp_path, save_steps=3, callbacks=[PruningCallback(**SCHEDULE)])


def warned(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("pruneofa: ")]


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def spoil_start(file):
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def empty(file):
    file.write_bytes(b"")


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def pruned(text, tmp_path_factory):
    """The checkpoints of steps 3 and 6, to be copied."""
    folder = tmp_path_factory.mktemp("pruned")
    fit(objective(), text, folder, steps=6, save_steps=3, callbacks=[PruningCallback(**SHORT)])
    return folder


@pytest.mark.parametrize(
    ("name", "damage"),
    [  # every file, and every kind of damage
        ("optimizer.pt", cut),
        ("optimizer.pt", spoil_start),
        ("scheduler.pt", empty),
        ("rng_state.pth", cut),
        ("model.safetensors", flip_a_bit),
        ("pruner.safetensors", flip_a_bit),
        ("clock.json", empty),
        ("trainer_state.json", spoil_start),
        ("config.json", cut),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(text, pruned, tmp_path, capsys, name, damage):
    options = {"steps": 6, "save_steps": 3}
    shutil.copytree(pruned, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoint-6" / name)
    capsys.readouterr()
    events = []
    fit(objective(), text, tmp_path, callbacks=[PruningCallback(**SHORT)], events=events, **options)
    said = warned(capsys)
    assert len(said) == 1 and f"checkpoint-6: damaged ({name}: " in said[0] and "trying checkpoint-3" in said[0]
    assert events[0]["step"] == 3


def test_a_marker_that_is_cut_is_no_proof(text, tmp_path, capsys):
    fit(objective(), text, tmp_path, steps=6, save_steps=3)
    empty(tmp_path / "checkpoint-6" / "complete")
    events = []
    fit(objective(), text, tmp_path, steps=6, save_steps=3, events=events)
    assert "checkpoint-6: damaged (complete: missing or not readable)" in warned(capsys)[0]
    assert events[0]["step"] == 3


class Hours(TrainerCallback):
    """Checkpoints seem to be from the future: the clock was set back after them."""

    def on_save(self, args, state, control, **kwargs):
        for folder in Path(args.output_dir).glob("checkpoint-*"):
            later = time.time() + 3600 * (1000 - int(folder.name.rpartition("-")[2]))
            os.utime(folder, (later, later))


def test_a_clock_that_goes_backwards_does_not_cost_the_newest_checkpoint(text, tmp_path):
    fit(objective(), text, tmp_path, steps=15, save_steps=3, callbacks=[Hours()])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-15"]
    assert last_checkpoint(tmp_path).name == "checkpoint-15"
    assert (tmp_path / "checkpoint-15" / "model.safetensors").exists()


@pytest.mark.parametrize("fault", [cut, lambda file: file.unlink()])
def test_a_checkpoint_that_cannot_be_read_back_is_not_complete(text, tmp_path, fault, monkeypatch):
    flush = checkpoints.sync_tree

    def spoil(checkpoint):
        flush(checkpoint)
        if checkpoint.name == "checkpoint-9":
            fault(checkpoint / "optimizer.pt")

    monkeypatch.setattr(checkpoints, "sync_tree", spoil)
    with pytest.raises(OSError, match=r"cannot be read back: optimizer\.pt: .*checkpoint-9"):
        fit(objective(), text, tmp_path, steps=12, save_steps=3)
    assert last_checkpoint(tmp_path).name == "checkpoint-6"  # and the one before it was kept until then
    assert (tmp_path / "checkpoint-3" / "complete").exists()


def test_with_no_checkpoint_left_training_starts_from_the_beginning(text, tmp_path, capsys):
    options = {"steps": 6, "save_steps": 3}
    fit(objective(), text, tmp_path, **options)
    cut(tmp_path / "checkpoint-6" / "optimizer.pt")
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    capsys.readouterr()
    events = []
    fit(objective(), text, tmp_path, events=events, **options)
    said = warned(capsys)
    assert len(said) == 2 and "checkpoint-3: damaged (optimizer.pt: missing)" in said[1]
    assert said[1].endswith("training starts from the beginning")
    assert events[0]["step"] == 0
