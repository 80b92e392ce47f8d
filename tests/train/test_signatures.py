"""The signatures that other code relies on, by name, kind and default of every parameter."""

import inspect

import pytest

import pruneofa.train
from pruneofa import Engine
from pruneofa.train import distill, lock, masks, prune, schedule

POSITIONAL, KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
NONE = inspect.Parameter.empty  # no default
SCHEDULE = {"final": NONE, "begin": NONE, "end": NONE, "stop": NONE, "interval": NONE, "initial": 0.0}
SIGNATURES = [
    (schedule.cubic_sparsity, ["step"], {"begin": NONE, "end": NONE, "final": NONE, "initial": 0.0}),
    (schedule.rewound_lr, ["step"], dict.fromkeys(["total", "warmup", "begin", "end", "interval"], NONE)),
    (masks.magnitude_mask, ["weight", "sparsity", ("pattern", "unstructured")], {}),
    (prune.GradualPruner, ["model"], {**SCHEDULE, "pattern": "unstructured", "scope": "uniform", "skip": ()}),
    (prune.GradualPruner.step, ["self", "t", ("curvature", None)], {}),
    (prune.GradualPruner.state_dict, ["self"], {}),
    (prune.GradualPruner.load_state_dict, ["self", "state"], {}),
    (prune.GradualPruner.sparsity, ["self"], {}),
    (lock.PatternLock.capture, ["model"], {}),
    (lock.PatternLock.apply, ["self"], {}),
    (lock.PatternLock.verify, ["self"], {}),
    (distill.kd_loss, ["student_logits", "teacher_logits", "temperature"], {"rows": None, "classes": None}),
    (pruneofa.train.LockCallback, [], {}),
    (Engine.from_pretrained, ["path_or_id"], {"precision": "int8", "threads": None, "isa": None, "lanes": None}),
    (Engine.encode, ["self", "input_ids", ("attention_mask", None), ("token_type_ids", None)], {}),
    (Engine.predict, ["self", "x"], {"batch_size": 32}),
]


@pytest.mark.parametrize(
    ("called", "positional", "keyword"), SIGNATURES, ids=lambda value: getattr(value, "__qualname__", "")
)
def test_signature(called, positional, keyword):
    wanted = [(*(name if isinstance(name, tuple) else (name, NONE)), POSITIONAL) for name in positional]
    wanted += [(name, default, KEYWORD) for name, default in keyword.items()]
    found = [(p.name, p.default, p.kind) for p in inspect.signature(called).parameters.values()]
    assert found[: len(wanted)] == wanted
    assert all(kind is KEYWORD and default is not NONE for _, default, kind in found[len(wanted) :])  # nobody must give


def test_pruning_callback_takes_the_pruners_arguments():
    callback = pruneofa.train.PruningCallback(final=0.9, begin=0, end=4, stop=5, interval=2, pattern="2:4")
    assert callback.schedule == {"final": 0.9, "begin": 0, "end": 4, "stop": 5, "interval": 2, "pattern": "2:4"}
