"""The curvature of a student's outputs: against finite differences, NumPy sums and Adam's own state."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pruneofa.errors import CheckFailed, InputError
from pruneofa.train import curvature, device, layerwise
from pruneofa.train.curvature import fisher_blocks, fisher_diagonal, moment_decay, sampled_loss, second_moments
from pruneofa.train.device import free_memory
from pruneofa.train.masks import prunable
from pruneofa.train.objective import PretrainingObjective
from pruneofa.train.scores import CHUNK, to_blocks
from tests.tiny import tiny_bert

DENSE = "bert.encoder.layer.0.output.dense.weight"
OPTIONS = {"total": 6, "seed": 3}


def objective(hard=0.0, hidden=1.0, **settings):
    student, teacher = tiny_bert(), tiny_bert()
    losses = {"hard": hard, "kd": 0.0, "hidden": hidden, "temperature": 2.0, "positions": "all", "nsp": False}
    return PretrainingObjective(student.eval(), teacher, **losses | settings)


def batches(count=6):
    made = []
    for number in range(count):
        ids = torch.randint(5, 150, (3, 8), generator=torch.Generator().manual_seed(number))
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        labels = torch.where(torch.arange(8) % 3 == 0, ids, -100)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


@pytest.mark.parametrize("layers", [2, 5])
def test_every_loss_has_its_own_weight_in_the_curvature(layers):
    """Against second differences of the loss itself, which is smallest where student and teacher are equal."""
    ids = batches(1)[0]["input_ids"]
    types = (torch.arange(8) > 3).long().expand_as(ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types, "labels": ids}
    names = (f"bert.encoder.layer.{layers - 1}.output.dense.weight", "bert.pooler.dense.weight")

    def ratios(**weights):
        student, teacher = (tiny_bert(num_hidden_layers=layers).double().eval() for _ in range(2))
        losses = {"hard": 0.0, "kd": 0.0, "hidden": 0.0, "temperature": 1.0, "positions": "all", "nsp": True} | weights
        made = PretrainingObjective(student, teacher, **losses).double()
        counts, generator = made.counts(batch), torch.Generator().manual_seed(0)
        tensors = [prunable(student)[name] for name in names]
        squares = [torch.zeros_like(tensor) for tensor in tensors]
        for _ in range(300):
            found = torch.autograd.grad(sampled_loss(made, batch, generator), tensors)
            squares = [square + gradient**2 / 300 for square, gradient in zip(squares, found, strict=True)]

        @torch.no_grad()
        def curvature(tensor, row, column):
            values, before = [], tensor[row, column].item()
            for step in (-1e-3, 0, 1e-3):
                tensor[row, column] = before + step
                values.append(made(batch, counts)["loss"].item())
            tensor[row, column] = before
            return (values[0] - 2 * values[1] + values[2]) / 1e-6

        places = [(row, row) for row in range(24)]
        return [
            sum(square[place].item() for place in places) / sum(curvature(tensor, *place) for place in places)
            for tensor, square in zip(tensors, squares, strict=True)
        ]

    for weights in ({"kd": 1.0}, {"hidden": 1.0}, {"kd": 0.5, "hidden": 2.0}):
        assert ratios(**weights) == pytest.approx([1, 1], abs=0.25), weights


@pytest.mark.parametrize("relative", [False, True])
def test_the_mean_square_of_the_sampled_gradients_is_the_curvature_of_the_hidden_states(relative):
    made = objective(hidden_norm=relative).double()
    batch, weight = batches(1)[0], prunable(made.student)[DENSE]
    generator = torch.Generator().manual_seed(0)
    squares = torch.zeros_like(weight)
    for _ in range(600):
        squares += torch.autograd.grad(sampled_loss(made, batch, generator), weight)[0] ** 2 / 600

    @torch.no_grad()
    def outputs():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        states = made.student.base_model(**inputs, output_hidden_states=True)
        kept = [state[batch["attention_mask"].bool()] for state in states.hidden_states[1:]] + [states.pooler_output]
        scales = [state.square().mean(-1, keepdim=True).sqrt() if relative else 1 for state in kept]
        return [state / (len(kept[0]) * state.shape[1]) ** 0.5 for state in kept], scales

    scales, exact, sampled = outputs()[1], [], []
    for row, column in [(0, 0), (3, 7), (10, 20), (31, 63)] + [(i, i + 9) for i in range(12, 30)]:
        with torch.no_grad():
            weight[row, column] += 1e-4
            more = outputs()[0]
            weight[row, column] -= 2e-4
            less = outputs()[0]
            weight[row, column] += 1e-4
        change = zip(more, less, scales, strict=True)
        squared = sum(float((((a - b) / 2e-4 / scale) ** 2).sum()) for a, b, scale in change)
        exact.append(2 * squared / 3)  # of the square, in the mean over the states of the embeddings and two layers
        sampled.append(float(squares[row, column]))
    np.testing.assert_allclose(sampled, exact, rtol=0.4)
    assert np.mean(np.array(sampled) / exact) == pytest.approx(1, abs=0.1)


def test_the_words_are_drawn_from_the_students_predictions():
    made = objective(hard=1.0, hidden=0.0)
    generator = torch.Generator().manual_seed(0)
    losses = torch.stack([sampled_loss(made, batches(1)[0], generator).detach() for _ in range(3)])
    assert len(set(losses.tolist())) == 3 and (losses > 0).all()


def test_blocks_are_the_mean_outer_products_of_the_gradients():
    made = objective()
    weights = prunable(made.student)
    gradients = list(curvature._gradients(made, weights, batches(), **OPTIONS, precision="fp32"))
    found = fisher_blocks(made, weights, batches(), **OPTIONS, block=6, pattern="4x1")
    diagonal = fisher_diagonal(made, weights, batches(), **OPTIONS)
    squares = {n: np.mean([g[n].double().numpy() ** 2 for g in gradients], axis=0) for n in weights}
    mean = sum(square.sum() for square in squares.values()) / sum(w.numel() for w in weights.values())
    for name in weights:
        parts = np.stack([to_blocks(g[name], 8, "4x1").double().numpy() for g in gradients])
        wanted = np.einsum("kbi,kbj->bij", parts, parts) / len(gradients) / mean
        np.testing.assert_allclose(found[name], wanted, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(diagonal[name], squares[name] / mean, rtol=1e-3, atol=1e-7)
    assert made.student.training is False


def test_a_layer_without_gradients_is_compared_by_magnitude_and_none_at_all_is_an_error():
    made = objective()
    made.student.bert.pooler.dense.weight.requires_grad_(False)
    found = fisher_diagonal(made, prunable(made.student), batches(), **OPTIONS)
    assert (found["bert.pooler.dense.weight"] == 1).all() and len(found[DENSE].unique()) > 100
    made.student.requires_grad_(False)
    with pytest.raises(CheckFailed, match="the gradients of all weights are 0"):
        fisher_diagonal(made, prunable(made.student), batches(), **OPTIONS)


@pytest.mark.parametrize("first", [True, False])
def test_one_of_the_processes_shows_the_progress(monkeypatch, first):
    shown = []

    @contextlib.contextmanager
    def recorded(description, total):
        yield lambda count=1, note="": shown.append(description)

    monkeypatch.setattr(device, "progress", recorded)
    monkeypatch.setattr(device, "processes", lambda: SimpleNamespace(is_main_process=first))
    made = objective()
    fisher_diagonal(made, prunable(made.student), batches(), **OPTIONS)
    assert shown == ["gradients for the scores"] * (6 if first else 0)


def test_squared_gradients_that_overflow_are_named():
    made = objective()
    weights = prunable(made.student)
    with torch.no_grad():
        made.student.base_model.encoder.layer[1].output.LayerNorm.weight.fill_(1e30)  # its square is infinite
    for function, more in ((fisher_diagonal, {}), (fisher_blocks, {"block": 8, "pattern": "unstructured"})):
        with pytest.raises(CheckFailed, match=r"the squared gradients of .*weight are not finite; set precision: fp32"):
            function(made, weights, batches(), **OPTIONS, **more)


def test_second_moments_are_adams_without_its_bias():
    model = tiny_bert()
    weights = prunable(model)
    weights[DENSE].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.9))
    name = next(iter(weights))
    with pytest.raises(InputError, match=f"AdamW keeps no second moment of {name}, wanted Adam or AdamW after a step"):
        second_moments(optimizer, weights)
    rng = np.random.default_rng(0)
    wanted = 0.0
    for _ in range(3):
        for weight in weights.values():
            if weight.requires_grad:
                weight.grad = torch.from_numpy(rng.normal(size=weight.shape)).float()
        wanted = 0.9 * wanted + 0.1 * weights[name].grad.double().numpy() ** 2
        optimizer.step()
    found = second_moments(optimizer, weights)
    np.testing.assert_allclose(found[name], wanted / (1 - 0.9**3), rtol=1e-5)
    assert found.keys() == weights.keys() - {DENSE}
    assert moment_decay(optimizer, weights) == 0.9
    mixed = torch.optim.Adam([{"params": [weights[name]], "betas": (0.9, 0.5)}, {"params": [weights[DENSE]]}])
    with pytest.raises(InputError, match="Adam's second beta is 0.5 for some weights and 0.999 for others"):
        moment_decay(mixed, weights)
    with pytest.raises(InputError, match="SGD keeps no second moment"):
        second_moments(torch.optim.SGD(model.parameters(), lr=1), weights)


def test_more_memory_than_there_is_is_refused_before_it_is_taken(monkeypatch):
    made = objective()
    weights = prunable(made.student)
    monkeypatch.setattr(device, "free_memory", lambda: (100_000_000, "this GPU"))
    count = sum(weight.numel() for weight in weights.values())
    needed = curvature.memory_needed(count, 50, "1x4")
    assert needed == 4 * count * (52 + curvature.HELD + 3) + 32 * CHUNK * 52**2
    wanted = rf"0\.0 million weights in blocks of 52 need {needed / 1e9:.1f} GB .* this GPU has 0\.1 GB free; lower"
    with pytest.raises(InputError, match=wanted):
        fisher_blocks(made, weights, [], **OPTIONS, block=50, pattern="1x4")
    with pytest.raises(InputError, match=r"hessian: 99,999 tokens of calibration need 0\.2 GB .*prune\.calibration"):
        layerwise.check_memory(weights, 99_999, 0)
    layerwise.check_memory(weights, 9_999, 0)
    with pytest.raises(InputError, match=r"need 0\.2 GB"):  # a dense model of 0.16 GB
        layerwise.check_memory(weights, 9_999, 40_000_000)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 2**63),
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n"}, 8192),
        ({"proc/meminfo": "MemAvailable: 8 kB\n", "memory.max": "max\n", "memory.current": "5"}, 8192),
        ({"proc/meminfo": "MemAvailable: 8 kB\n", "memory.max": "5000\n", "memory.current": "2000\n"}, 3000),
        (
            {"memory.max": "5000", "memory.current": "5000", "memory.stat": "anon 1\nactive_file 7\ninactive_file 3\n"},
            10,
        ),
        ({"memory/memory.limit_in_bytes": "7", "memory/memory.usage_in_bytes": "9"}, 0),
    ],
)
def test_free_memory_is_that_of_the_machine_or_of_the_group(tmp_path: Path, monkeypatch, files, free):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, content in files.items():
        file = tmp_path / ("" if name.startswith("proc") else "sys/fs/cgroup") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert free_memory(tmp_path) == (free, "this machine")
