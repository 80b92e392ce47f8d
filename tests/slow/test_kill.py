"""A run that is killed, or interrupted, ends with the same bits as one that is not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pruneofa import recipe
from pruneofa.train.checkpoints import last_checkpoint
from tests.small import small_recipe

pytestmark = pytest.mark.slow

PRUNE_STEPS, TRANSFER_EPOCHS = 60, 20
SETTINGS = [
    f"prune={{steps: {PRUNE_STEPS}, batch: 8, lr: 1e-3, end: 30, stop: 48, interval: 3, save_steps: 7}}",
    f"tasks.mine.epochs={TRANSFER_EPOCHS}",
    "tasks.mine.dense_epochs=2",
    "tasks.mine.qat_epochs=15",
    "tasks.mine.save_minutes=0.001",
    "quantize={}",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    root = tmp_path_factory.mktemp("kill")
    (root / "recipe.yaml").write_text(recipe.dump(small_recipe(root, *SETTINGS)))
    return root / "recipe.yaml"


def start(file: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pruneofa", "run", str(file), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def events(out: Path, kind: str, stage: str) -> list[dict]:
    if not (out / "log.jsonl").exists():
        return []
    lines = (out / "log.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in found if event["event"] == kind and event["stage"] == stage]


def wait_for(process: subprocess.Popen[str], work: Path, out: Path, stage: str, step: int) -> None:
    """Until the stage has logged `step` and has a complete checkpoint."""
    for _ in range(60_000):
        assert process.poll() is None, process.communicate()[1]
        logged = events(out, "log", stage)
        if logged and logged[-1]["step"] >= step and any(work.glob("checkpoint-*/complete")):
            return
        time.sleep(0.01)
    raise TimeoutError(stage)


@pytest.fixture(scope="module")
def straight(file, tmp_path_factory):
    """The weights of a run that nothing disturbs, by folder."""
    out = tmp_path_factory.mktemp("straight") / "run"
    finish(start(file, out))
    return weights(out)


def weights(out: Path) -> dict[str, bytes]:
    return {str(path.parent.relative_to(out)): path.read_bytes() for path in out.rglob("model.safetensors")}


TRANSFER, QUANTIZE = "tasks/mine/seed-0/transfer", "tasks/mine/seed-0/quantize"
STAGES = {"prune": "sparse", TRANSFER: TRANSFER, QUANTIZE: QUANTIZE}


@pytest.mark.parametrize("steps", [(16, 25, 20), (45, 60, 80)], ids=["while pruning", "near the end"])
def test_killed_in_every_stage_it_ends_with_the_same_bits(file, straight, tmp_path, steps):
    out = tmp_path / "run"
    for (stage, folder), step in zip(STAGES.items(), steps, strict=True):
        process = start(file, out)
        wait_for(process, out / ".work" / stage, out, stage, step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (out / folder).exists()
        assert last_checkpoint(out / ".work" / stage) is not None
    finish(start(file, out))
    ended = weights(out)
    assert set(ended) == {"teacher", "sparse", "tasks/mine/seed-0/teacher", TRANSFER, "tasks/mine/seed-0/ptq", QUANTIZE}
    assert [folder for folder in ended if ended[folder] != straight[folder]] == []
    for stage in STAGES:
        assert [event["step"] > 0 for event in events(out, "start", stage)] == [False, True]
    assert not (out / ".work").exists()


def test_ctrl_c_leaves_a_checkpoint_and_resumes(file, straight, tmp_path):
    out = tmp_path / "run"
    process = start(file, out)
    wait_for(process, out / ".work" / "prune", out, "prune", 16)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == ("pruneofa: interrupted; the same command resumes from the last checkpoint")
    assert "Traceback" not in errors
    step = int(last_checkpoint(out / ".work" / "prune").name.partition("-")[2])
    assert step >= events(out, "log", "prune")[-1]["step"] >= 16
    finish(start(file, out))
    assert events(out, "start", "prune")[-1]["step"] == step
    assert weights(out) == straight
