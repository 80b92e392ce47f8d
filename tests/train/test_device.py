"""What is chosen for a machine."""

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from pruneofa.train.attention import GPU_NAME, NAME, mask_without_reading
from pruneofa.train.device import MOST_ROWS, ROWS, evaluation_rows, fast_precision, prepare_models, trainer_options
from pruneofa.train.lock import PatternLock
from pruneofa.train.objective import TransferObjective
from tests.tiny import half_pruned, tiny_bert


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_only_where_the_processor_computes_in_it(monkeypatch, supported):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: supported)
    assert fast_precision() == ("bf16" if supported else "fp32")
    # With a GPU, it alone counts, and not what it emulates.
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: not supported)
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation or supported
    )
    assert fast_precision() == ("bf16" if supported else "fp32")


GIB = 1 << 30


@pytest.mark.parametrize(("free", "rows"), [(GIB, 32), (16 * GIB, 512), (130 * GIB, MOST_ROWS), (1 << 20, 1)])
def test_evaluation_batches_fit_into_half_of_the_free_memory_of_a_gpu(monkeypatch, free, rows):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free - (1 << 19), 140 * GIB))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 3 << 19)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 2 << 19)
    assert evaluation_rows(torch.device("cuda")) == rows
    assert evaluation_rows(torch.device("cpu")) == ROWS


@pytest.mark.parametrize(
    ("cuda", "precision", "attention", "teacher"),
    [
        (False, "fp32", "sdpa", torch.float32),
        (False, "bf16", NAME, torch.bfloat16),
        (True, "fp32", GPU_NAME, torch.float32),
        (True, "bf16", GPU_NAME, torch.bfloat16),
    ],
)
def test_attention_and_precision_by_device(monkeypatch, cuda, precision, attention, teacher):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    student, dense = tiny_bert(), tiny_bert()
    prepare_models(student, dense, precision)
    assert student.config._attn_implementation == dense.config._attn_implementation == attention
    assert {w.dtype for n, w in dense.base_model.named_parameters() if "dense" in n} == {teacher}
    assert {w.dtype for w in student.parameters()} == {torch.float32}
    options = trainer_options(precision)
    assert (options["use_cpu"], options["bf16"], options["optim"]) == (
        not cuda,
        precision == "bf16",
        "adamw_torch_fused",
    )


def test_attention_of_a_gpu_gives_what_pytorch_gives_and_reads_no_mask(monkeypatch):
    plain, prepared = tiny_bert(), tiny_bert()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    prepare_models(prepared, None, "fp32")
    ids = torch.randint(5, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [7]])).long()
    for given in (mask, torch.ones_like(mask), None):
        a, b = (model.bert(ids, attention_mask=given).last_hidden_state for model in (plain, prepared))
        torch.testing.assert_close(a, b)
    full = torch.ones(3, 9, dtype=torch.bool)
    sizes = {
        "batch_size": 3,
        "q_length": 9,
        "kv_length": 9,
        "allow_is_bidirectional_skip": True,
        "allow_is_causal_skip": False,
    }
    sizes["mask_function"] = lambda batch, head, query, key: torch.ones((), dtype=torch.bool)
    assert mask_without_reading(attention_mask=full, **sizes) is not None
    assert mask_without_reading(attention_mask=None, **sizes) is None


class Reads(TorchDispatchMode):
    """Counts the values that are read back from tensors; on a GPU each of them makes the CPU wait."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_transfer_step_reads_nothing_back(monkeypatch):
    student, teacher = (tiny_bert(transformers.BertForSequenceClassification, seed=seed) for seed in (0, 1))
    objective = TransferObjective(
        half_pruned(student), teacher, kind="classification", hard=0.5, kd=0.5, hidden=1.0, temperature=2.0
    ).train()
    lock = PatternLock.capture(student)
    ids = torch.randint(5, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [7]])).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 0])}
    counts = objective.counts(batch)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)

    def step():
        with Reads() as reads:
            objective(batch, counts)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            lock.apply()
        return reads.count

    assert step() > 0  # transformers' own attention reads both masks
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    prepare_models(student, teacher, "fp32")
    assert step() == 0
