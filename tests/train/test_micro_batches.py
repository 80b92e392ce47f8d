"""Losses and gradients of a step do not depend on padding, nor on how its items are divided."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from pruneofa.data import examples, features
from pruneofa.train.micro_batches import StepCollate, split
from pruneofa.train.objective import PretrainingObjective, TransferObjective
from tests.tiny import VOCABULARY, tiny_bert

MODELS = {
    "pretraining": transformers.BertForPreTraining,
    "classification": transformers.BertForSequenceClassification,
    "qa": transformers.BertForQuestionAnswering,
}
WEIGHTS = {"hard": 0.3, "kd": 0.5, "hidden": 0.2, "temperature": 2.0}


def made(kind):
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student, teacher = (tiny_bert(MODELS[kind], seed=seed, **options) for seed in (0, 1))
    if kind == "pretraining":
        return PretrainingObjective(student, teacher, positions="all", nsp=True, **WEIGHTS)
    return TransferObjective(student, teacher, kind=kind, **WEIGHTS)


def items(kind, lengths=(31, 7, 12, 12, 30, 5, 9)):
    draw = np.random.default_rng(0)
    found = []
    for index, length in enumerate(lengths):
        ids = draw.integers(5, len(VOCABULARY), length)
        item = {"input_ids": ids, "token_type_ids": (np.arange(length) > length // 2).astype(np.int64)}
        if kind == "pretraining":
            masked = np.where(np.arange(length) % 4 == 0, ids, examples.IGNORED)
            item |= {"labels": masked, "next_sentence_label": index % 2}
        elif kind == "qa":
            item |= {"start_positions": 1, "end_positions": length - 1}
        else:
            item |= {"labels": index % 2}
        found.append(item)
    return found


def collated(kind):
    if kind == "pretraining":
        return partial(examples.collate, pad_token_id=0)
    return partial(features.collate, pad_token_id=0)


def padded(kind, batch, width=48):
    """The batch as it would be if every item had the maximum length."""
    fill = {"input_ids": 0, "token_type_ids": 0, "attention_mask": 0}
    if kind == "pretraining":
        fill["labels"] = examples.IGNORED
    wide = {name: F.pad(batch[name], (0, width - batch[name].shape[1]), value=value) for name, value in fill.items()}
    return batch | wide


def losses_and_gradients(objective, batches, counts):
    objective.zero_grad()
    losses = [objective(batch, counts) for batch in batches]
    torch.stack([loss["loss"] for loss in losses]).sum().backward()
    totals = {name: torch.stack([loss[name].detach() for loss in losses]).sum() for name in losses[0]}
    gradients = {n: p.grad for n, p in objective.student.named_parameters() if p.grad is not None}
    return totals, gradients


def _parts(rows, size):
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]


@pytest.mark.parametrize("micro_batch", [7, 3, 1])
@pytest.mark.parametrize("kind", MODELS)
def test_losses_equal_those_of_one_padded_batch(kind, micro_batch):
    objective, rows, collate = made(kind), items(kind), collated(kind)
    step = StepCollate(collate, objective.counts, micro_batch)(rows)
    assert [len(batch["input_ids"]) for batch in step["batches"]] == {7: [7], 3: [3, 3, 1], 1: [1] * 7}[micro_batch]
    full = [len(set(map(len, (row["input_ids"] for row in part)))) == 1 for part in _parts(rows, micro_batch)]
    assert ["attention_mask" not in batch for batch in step["batches"]] == full
    assert step["counts"][-1] == sum(len(row["input_ids"]) for row in rows)
    whole = padded(kind, collate(rows))
    torch.testing.assert_close(step["counts"][:-1], objective.counts(whole))
    got, gradients = losses_and_gradients(objective, step["batches"], step["counts"][:-1])
    wanted, expected = losses_and_gradients(objective, [whole], objective.counts(whole))
    assert got.keys() == wanted.keys() >= {"loss", "hard" if kind != "pretraining" else "mlm", "kd", "hidden"}
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-7, msg=name)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_split_keeps_rows_in_order():
    batch = features.collate(items("classification"), 0)
    parts = split(batch, 3)
    assert [len(part["labels"]) for part in parts] == [3, 3, 1]
    for name, values in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), values)
    assert len(split(batch, 7)) == len(split(batch, 100)) == 1
