"""The signatures that other code relies on, by name, kind and default of every parameter."""

import inspect

import pytest

from pruneofa import Engine
from pruneofa.errors import InputError
from pruneofa.train import LockCallback, PruningCallback, distill, lock, masks, prune, schedule

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
    (LockCallback, [], {}),
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
    def keywords(called):
        found = inspect.signature(called).parameters.values()
        return {p.name: p.default for p in found if p.kind is KEYWORD}

    own = {"blocks": None, "fit": None}
    decay = {"decay": 0.999}  # which the callback reads from the optimizer
    assert keywords(PruningCallback) | decay == keywords(prune.GradualPruner) | own


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"final": 90}, r"final is 90 but must be at least 0 and below 1 \(a fraction"),
        ({"end": 0}, r"begin is 0 but must be below end \(0\)"),
        ({"pattern": "2:4"}, "final is 0.9 but pattern 2:4 gives 0.5"),
        ({"score": "size"}, "score is 'size'; wanted magnitude"),
        ({"skip": "pooler"}, r"skip is 'pooler', wanted a list of regular expressions, such as \['pooler'\]"),
        ({"score": "obs"}, "score obs: needs a function that computes the blocks"),
        ({"score": "hessian"}, "score hessian: needs a function that prunes the model layer by layer; pass fit="),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_loaded(wrong, named):
    arguments = {"final": 0.9, "begin": 0, "end": 4, "stop": 5, "interval": 2}
    PruningCallback(**arguments)
    with pytest.raises(InputError, match=named):
        PruningCallback(**arguments | wrong)
