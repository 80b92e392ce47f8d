"""A GPU that fails in training: one line, and the same command resumes."""

import pytest
import torch

from pruneofa.cli.main import main
from pruneofa.train.objective import TransferObjective
from tests.small import write_task
from tests.tiny import write_model


@pytest.fixture
def command(tmp_path):
    write_model(tmp_path / "model")
    write_task(tmp_path / "task.csv", rows=64)
    options = ["--data", str(tmp_path / "task.csv"), "--text", "sentence", "--label", "verdict"]
    sizes = ["--epochs", "2", "--batch", "8", "--max-length", "16", "--precision", "fp32"]
    return ["transfer", str(tmp_path / "model"), str(tmp_path / "out"), *options, *sizes]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be\nlate"),
            "pruneofa: error: the GPU failed: CUDA error: unspecified launch failure; check it with nvidia-smi, "
            "the same command resumes from the last checkpoint",
        ),
        (
            torch.distributed.DistBackendError("NCCL watchdog timed out\nmore"),
            "pruneofa: error: the connection of the GPUs failed: NCCL watchdog timed out; check it with nvidia-smi, "
            "the same command resumes from the last checkpoint",
        ),
    ],
)
def test_training_ends_with_a_line_and_resumes(command, tmp_path, monkeypatch, capsys, error, line):
    forward, calls = TransferObjective.forward, []

    def fails(self, *given):
        calls.append(1)
        if len(calls) == 10:
            raise error
        return forward(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(TransferObjective, "forward", fails)
        assert main(command) == 3
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == line and "Traceback" not in said
    assert not (tmp_path / "out/model.safetensors").exists()
    assert main(command) == 0
    assert (tmp_path / "out/model.safetensors").exists()


def test_memory_that_no_smaller_batch_helps_is_a_line(command, monkeypatch, capsys):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("pruneofa.run.fine_tuning.prepare_student", fails)
    assert main(command) == 3
    wanted = "pruneofa: error: the GPU is out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert capsys.readouterr().err.splitlines()[-1].startswith(wanted)


def test_memory_that_a_library_of_the_gpu_lacks_is_a_line_too(command, monkeypatch, capsys):
    def fails(*_):
        raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be")

    monkeypatch.setattr("pruneofa.run.fine_tuning.prepare_student", fails)
    assert main(command) == 3
    assert "the GPU is out of memory: CUDA error: out of memory; free it" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("reason", ["device-side assert triggered", "invalid argument"])
def test_a_fault_of_the_program_keeps_its_traceback(command, monkeypatch, capsys, reason):
    def fails(*_):
        raise torch.AcceleratorError(f"CUDA error: {reason}")

    monkeypatch.setattr("pruneofa.run.fine_tuning.prepare_student", fails)
    assert main(command) == 3
    said = capsys.readouterr().err
    assert "Traceback" in said and "nvidia-smi" not in said
