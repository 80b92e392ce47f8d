"""A tiny model and its training, which the tests of the pruner share."""

import torch
from transformers import BertModel

from pruneofa.train.scores import to_blocks
from tests.tiny import tiny_bert

SCHEDULE = {"final": 0.9, "begin": 2, "end": 10, "stop": 16, "interval": 3}
QUERY = "encoder.layer.0.attention.self.query.weight"


def bare(seed=0, **config):
    return tiny_bert(BertModel, seed=seed, **config)


def loss(model, step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, model.config.vocab_size, (4, 8), generator=generator)
    output = model(input_ids=ids)
    return output.last_hidden_state[..., :3].square().mean() + output.pooler_output.square().mean()


def train(model, pruner, steps, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    selected = []
    for t in steps:
        optimizer.zero_grad()
        loss(model, t).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if pruner.step(t):
            selected.append(t)
    return optimizer, selected


def jitter(weights, scale=0.05):
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(torch.randn(weight.shape) * scale)


def curvature(pruner, seed):
    """Random curvature of the weights that are left, for the pruner's score."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in pruner.weights.items():
        gradients = torch.randn(20, *weight.shape, generator=generator) * pruner.masks[name]
        if pruner.score == "obs":
            parts = torch.stack([to_blocks(gradient, 8, pruner.pattern) for gradient in gradients], 1)
            found[name] = parts.transpose(1, 2) @ parts
        else:
            found[name] = gradients.square().mean(0)
    return found


def layer_wise(teacher, pruner, t):
    """What score hessian needs before a selection."""
    ids = torch.randint(5, teacher.config.vocab_size, (8, 8), generator=torch.Generator().manual_seed(t))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    return {"teacher": teacher, "batches": batches, "final": pruner.target(t)}
