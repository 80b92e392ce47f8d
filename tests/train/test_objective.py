"""Objectives: equal to the models' own losses, exact under accumulation, and a teacher that stays outside."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

from pruneofa.errors import InputError
from pruneofa.train.distill import kd_loss
from pruneofa.train.objective import PretrainingObjective, TransferObjective
from tests.tiny import VOCABULARY, tiny_bert, tiny_distilbert, tiny_mpnet, tiny_roberta

LOSSES = {"hard": 0.5, "kd": 0.5, "hidden": 0.0, "temperature": 2.0, "positions": "all"}


def _model(kind="bert", seed=0, model=None, **config):
    build = {"bert": tiny_bert, "distilbert": tiny_distilbert, "roberta": tiny_roberta, "mpnet": tiny_mpnet}[kind]
    if kind == "distilbert":
        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers"}
        config = {names.get(name, name): value for name, value in config.items()}
        config = {"dropout": 0.0, "attention_dropout": 0.0, "qa_dropout": 0.0} | config
    else:
        config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | config
    return build(*([model] if model else []), seed=seed, **config)


def _batch(kind="bert", items=8, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, len(VOCABULARY), (items, length), generator=generator)
    lengths = torch.randint(4, length + 1, (items,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = ids.masked_fill(mask == 0, 0)
    chosen = (torch.rand(items, length, generator=generator) < 0.3) & mask.bool()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~chosen, -100)}
    if kind == "bert":
        batch["token_type_ids"] = torch.zeros_like(ids)
        batch["next_sentence_label"] = torch.randint(2, (items,), generator=generator)
    return batch


def _loss(objective, batch, counts=None):
    return objective(batch, objective.counts(batch) if counts is None else counts)


def _gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_counts():
    batch = _batch()
    objective = PretrainingObjective(_model(), _model(), **LOSSES, nsp=True)
    masked, tokens = (batch["labels"] != -100).sum().item(), batch["attention_mask"].sum().item()
    assert objective.counts(batch).tolist() == [masked, tokens, 8, tokens]
    assert objective.counts(batch).dtype == torch.float64
    objective = PretrainingObjective(_model(), _model(), **LOSSES | {"positions": "masked"}, nsp=True)
    assert objective.counts(batch).tolist() == [masked, masked, 8, tokens]


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "mpnet"])
def test_hard_loss_is_the_models_own(kind):
    student, batch = _model(kind), _batch(kind)
    objective = PretrainingObjective(student, **{**LOSSES, "hard": 1.0, "kd": 0.0}, nsp=kind == "bert")
    expected = student(**batch).loss
    wanted = torch.autograd.grad(expected, [p for p in student.parameters() if p.requires_grad], allow_unused=True)
    losses = _loss(objective, batch)
    got = torch.autograd.grad(losses["loss"], [p for p in student.parameters() if p.requires_grad], allow_unused=True)
    torch.testing.assert_close(losses["loss"], expected)
    assert set(losses) == ({"loss", "mlm", "nsp"} if kind == "bert" else {"loss", "mlm"})
    for gradient, expected_gradient in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "mpnet"])
@pytest.mark.parametrize("positions", ["all", "masked"])
def test_distillation_of_logits(kind, positions):
    student, teacher, batch = _model(kind), _model(kind, seed=1), _batch(kind)
    objective = PretrainingObjective(student, teacher, **{**LOSSES, "positions": positions}, nsp=kind == "bert")
    inputs = {k: v for k, v in batch.items() if "label" not in k}
    student_output, teacher_output = student(**inputs), teacher(**inputs)
    rows = batch["attention_mask"].bool() if positions == "all" else batch["labels"] != -100
    expected = kd_loss(student_output[0], teacher_output[0], 2.0, rows=rows)
    losses = _loss(objective, batch)
    torch.testing.assert_close(losses["kd"], expected.detach())
    total = 0.5 * (losses["mlm"] + losses["kd"])
    if kind == "bert":
        nsp = kd_loss(student_output.seq_relationship_logits, teacher_output.seq_relationship_logits, 2.0)
        torch.testing.assert_close(losses["kd_nsp"], nsp.detach())
        total = total + 0.5 * (losses["nsp"] + losses["kd_nsp"])
    torch.testing.assert_close(losses["loss"].detach(), total)


def test_hidden_states_and_pooler():
    student, teacher, batch = _model(), _model(seed=1), _batch()
    objective = PretrainingObjective(student, teacher, **{**LOSSES, "hidden": 3.0}, nsp=True)
    inputs = {k: v for k, v in batch.items() if "label" not in k}
    student_output, teacher_output = (m.bert(**inputs, output_hidden_states=True) for m in (student, teacher))
    rows = batch["attention_mask"].bool()
    states = zip(student_output.hidden_states, teacher_output.hidden_states, strict=True)
    expected = torch.stack([F.mse_loss(s[rows], t[rows]) for s, t in states]).mean()
    pooled = F.mse_loss(student_output.pooler_output, teacher_output.pooler_output, reduction="none").mean(1)
    expected = expected + pooled.sum() / rows.sum() / 3  # a pooled vector counts like one of a position
    losses = _loss(objective, batch)
    torch.testing.assert_close(losses["hidden"], expected.detach())
    rest = 0.5 * (losses["mlm"] + losses["nsp"] + losses["kd"] + losses["kd_nsp"])
    torch.testing.assert_close(losses["loss"].detach(), rest + 3 * losses["hidden"])


@pytest.mark.parametrize(
    "losses", [{}, {"hidden": 1.0}, {"positions": "masked"}, {"hard": 0.0, "kd": 0.0, "hidden": 1.0}]
)
def test_four_micro_batches_equal_one_batch(losses):
    batch = _batch()
    batch["labels"][2:4] = -100  # a micro-batch with nothing masked
    objective = PretrainingObjective(_model(), _model(seed=1), **{**LOSSES, **losses}, nsp=True)
    whole = _loss(objective, batch)
    whole["loss"].backward()
    expected = _gradients(objective)
    objective.zero_grad()
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in range(0, 8, 2)]
    longest = [int(part["attention_mask"].sum(-1).max()) for part in parts]
    parts = [
        {k: v[:, :n] if v.ndim == 2 else v for k, v in part.items()} for part, n in zip(parts, longest, strict=True)
    ]
    assert len(set(longest)) > 1
    counts = torch.stack([objective.counts(part) for part in parts]).sum(0)
    results = [objective(part, counts) for part in parts]
    for name, value in whole.items():
        torch.testing.assert_close(sum(r[name].detach() for r in results), value.detach(), rtol=1e-5, atol=1e-7)
    for result in results:
        result["loss"].backward()
    for name, gradient in _gradients(objective).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_the_teacher_is_never_part_of_the_model():
    student, teacher = _model(), _model(seed=1).train()
    objective = PretrainingObjective(student, teacher, **LOSSES, nsp=True)
    assert {key.removeprefix("student.") for key in objective.state_dict()} == set(student.state_dict())
    assert len(list(objective.parameters())) == len(list(student.parameters()))
    objective.train()
    assert student.training and not teacher.training
    _loss(objective, _batch())["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    objective.double()
    assert objective.teacher.dtype == torch.float64
    assert objective.to("meta").teacher.device.type == "meta"


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_padding_does_not_matter(hidden):
    batch = _batch()
    objective = PretrainingObjective(_model(), _model(seed=1), **{**LOSSES, "hidden": hidden}, nsp=True).eval()
    expected = _loss(objective, batch)
    padded = batch["attention_mask"] == 0
    assert padded.any()
    batch["input_ids"] = batch["input_ids"].masked_fill(padded, 77)
    batch["labels"] = batch["labels"].masked_fill(padded, 5)  # labels there are ignored too
    for name, value in _loss(objective, batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_hidden_only_never_touches_the_vocabulary(monkeypatch):
    student, teacher, batch = _model(), _model(seed=1), _batch()
    objective = PretrainingObjective(student, teacher, **{**LOSSES, "hard": 0, "kd": 0, "hidden": 1}, nsp=True)

    def fail(*_args, **_kwargs):
        raise AssertionError("vocabulary work")

    monkeypatch.setattr("pruneofa.train.objective.fused_head_losses", fail)
    monkeypatch.setattr(type(student.cls.predictions.transform), "forward", fail)
    assert set(_loss(objective, batch)) == {"loss", "hidden"}


def test_hidden_states_and_teacher_are_only_asked_for_when_needed(monkeypatch):
    student, teacher, batch = _model(), _model(seed=1), _batch()
    asked = []
    for model in (student, teacher):
        model.bert.register_forward_pre_hook(
            lambda module, _args, kwargs: asked.append((module is teacher.bert, kwargs["output_hidden_states"])),
            with_kwargs=True,
        )
    _loss(PretrainingObjective(student, teacher, **LOSSES, nsp=True), batch)
    assert asked == [(False, False), (True, False)]
    asked.clear()
    _loss(PretrainingObjective(student, teacher, **{**LOSSES, "kd": 0.0}, nsp=True), batch)
    assert asked == [(False, False)]


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "mpnet"])
@pytest.mark.parametrize(
    ("losses", "nsp"),
    [({}, True), ({}, False), ({"hard": 0, "kd": 0, "hidden": 1}, True), ({"hard": 0, "kd": 0, "hidden": 1}, False)],
)
def test_every_parameter_that_learns_gets_a_gradient(kind, losses, nsp):
    nsp = nsp and kind == "bert"
    student = _model(kind)
    objective = PretrainingObjective(student, _model(kind, seed=1), **{**LOSSES, **losses}, nsp=nsp)
    _loss(objective, _batch(kind))["loss"].backward()
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert {name for name, p in student.named_parameters() if p.grad is None} == frozen
    assert student.get_input_embeddings().weight.requires_grad
    if losses:
        assert all(not name.startswith(student.base_model_prefix) for name in frozen)
    elif kind == "bert" and not nsp:
        heads = {"cls.seq_relationship.weight", "cls.seq_relationship.bias"}
        assert frozen == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} | heads
    else:
        assert not frozen


def test_gradient_checkpointing_changes_nothing():
    batch, gradients = _batch(), []
    for checkpointing in (False, True):
        student = _model()
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        objective = PretrainingObjective(student, _model(seed=1), **{**LOSSES, "hidden": 1.0}, nsp=True).train()
        _loss(objective, batch)["loss"].backward()
        gradients.append(_gradients(student))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_bf16_autocast():
    batch = _batch()
    objective = PretrainingObjective(_model(), _model(seed=1), **{**LOSSES, "hidden": 1.0}, nsp=True)
    expected = _loss(objective, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = _loss(objective, batch)
    losses["loss"].backward()
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.01)
    assert all(g.isfinite().all() for g in _gradients(objective).values())


@pytest.mark.parametrize(
    ("teacher", "losses", "message"),
    [
        (None, {}, "there is no teacher"),
        ({"vocab_size": 99}, {}, f"vocab_size is {len(VOCABULARY)} but the teacher's is 99"),
        ({"num_hidden_layers": 1}, {"hidden": 1.0}, "num_hidden_layers is 2 but the teacher's is 1"),
        ({"hidden_size": 16}, {"hidden": 1.0}, "hidden_size is 32 but the teacher's is 16"),
    ],
)
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_a_pair_that_does_not_fit(kind, teacher, losses, message):
    teacher = None if teacher is None else _model(kind, **teacher)
    with pytest.raises(InputError, match=message):
        PretrainingObjective(_model(kind), teacher, **{**LOSSES, **losses}, nsp=False)


def test_logits_can_be_distilled_across_depth_and_width():
    teacher = _model(hidden_size=16, num_hidden_layers=1)
    assert _loss(PretrainingObjective(_model(), teacher, **LOSSES, nsp=True), _batch())["kd"] > 0


def test_missing_heads():
    with pytest.raises(InputError, match=r"no next-sentence head but corpus\.nsp is true"):
        PretrainingObjective(_model("distilbert"), **{**LOSSES, "kd": 0}, nsp=True)
    with pytest.raises(InputError, match="BertModel has no masked-language head"):
        PretrainingObjective(_model(model=transformers.BertModel), **{**LOSSES, "kd": 0}, nsp=False)


def _classifier(seed=0, labels=3):
    return _model(seed=seed, model=transformers.BertForSequenceClassification, num_labels=labels)


def _reader(seed=0):
    return _model("distilbert", seed, transformers.DistilBertForQuestionAnswering)


def test_transfer_classification():
    batch = _batch()
    batch = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    batch["labels"] = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    student, teacher = _classifier(), _classifier(seed=1)
    objective = TransferObjective(student, teacher, kind="classification", hard=0.3, kd=0.7, temperature=2.0)
    assert objective.counts(batch).tolist() == [8, int(batch["attention_mask"].sum())]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    losses = _loss(objective, batch)
    expected = kd_loss(student(**inputs).logits, teacher(**inputs).logits, 2.0)
    torch.testing.assert_close(losses["kd"], expected.detach())
    torch.testing.assert_close(losses["hard"], student(**batch).loss.detach())
    torch.testing.assert_close(losses["loss"], 0.3 * losses["hard"] + 0.7 * expected)
    halves = [{k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4)]
    parts = [objective(half, objective.counts(batch))["loss"] for half in halves]
    torch.testing.assert_close(sum(parts), losses["loss"])
    assert all(name.startswith("student.") for name in objective.state_dict())


def test_transfer_hidden_states_of_real_tokens():
    batch = {k: v for k, v in _batch().items() if k in ("input_ids", "attention_mask", "token_type_ids")}
    batch["labels"] = torch.zeros(8, dtype=torch.long)
    options = {"kind": "classification", "hard": 0.0, "kd": 0.0, "hidden": 2.0, "temperature": 2.0}
    objective = TransferObjective(_classifier(), _classifier(seed=1), **options)
    states = [
        model(**batch, output_hidden_states=True).hidden_states for model in (objective.student, objective.teacher)
    ]
    real = batch["attention_mask"].bool()
    expected = torch.stack([((a - b)[real] ** 2).mean() for a, b in zip(*states, strict=True)]).mean()
    losses = _loss(objective, batch)
    assert set(losses) == {"loss", "hidden"}
    torch.testing.assert_close(losses["hidden"], expected.detach())
    torch.testing.assert_close(losses["loss"], 2 * expected)
    same = TransferObjective(_classifier(), _classifier(), **options)
    assert _loss(same, batch)["loss"].item() == 0.0


def test_transfer_reading_distils_only_real_tokens():
    batch = {k: v for k, v in _batch("distilbert").items() if k != "labels"}
    lengths = batch["attention_mask"].sum(-1)
    batch |= {"start_positions": torch.zeros_like(lengths), "end_positions": lengths - 1}
    student, teacher = _reader(), _reader(seed=1)
    objective = TransferObjective(student, teacher, kind="qa", hard=0.5, kd=0.5, temperature=2.0)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    student_output, teacher_output = student(**inputs), teacher(**inputs)
    classes = batch["attention_mask"].bool()
    terms = [
        kd_loss(student_output[n], teacher_output[n], 2.0, classes=classes) for n in ("start_logits", "end_logits")
    ]
    losses = _loss(objective, batch)
    torch.testing.assert_close(losses["kd"], (sum(terms) / 2).detach())
    # Alone, without padding: in a padded batch transformers counts padding as possible answers.
    alone = [student(**{k: v[i : i + 1, :n] if v.ndim == 2 else v[i : i + 1] for k, v in batch.items()}).loss
             for i, n in enumerate(lengths.tolist())]  # fmt: skip
    torch.testing.assert_close(losses["hard"], torch.stack(alone).mean().detach())
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_transfer_without_a_teacher_and_with_a_wrong_one():
    batch = {**_batch(), "labels": torch.zeros(8, dtype=torch.long)}
    alone = TransferObjective(_classifier(), kind="classification", hard=1.0, kd=0.0, temperature=2.0)
    assert set(_loss(alone, batch)) == {"loss", "hard"}
    with pytest.raises(InputError, match="kd or hidden is above 0 but there is no teacher"):
        TransferObjective(_classifier(), kind="classification", hard=0.0, kd=1.0, temperature=2.0)
    with pytest.raises(InputError, match="the teacher has 2 classes but the task has 3"):
        TransferObjective(
            _classifier(), _classifier(labels=2), kind="classification", hard=0.0, kd=1.0, temperature=2.0
        )


def test_a_copy_keeps_its_own_teacher():
    objective = PretrainingObjective(_model(), _model(seed=1), **LOSSES, nsp=True)
    twin = copy.deepcopy(objective)
    assert twin.teacher is not objective.teacher
    torch.testing.assert_close(_loss(twin, _batch())["loss"], _loss(objective, _batch())["loss"])
