"""Losses: the published fixtures, no NaN from dropped classes, and the fused head against the naive one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pruneofa.train.distill import fused_head_losses, hidden_loss, kd_loss


@pytest.mark.parametrize(("temperature", "expected"), [(2.0, 1.2806266713), (1.0, 1.1504207652)])
def test_kd_fixtures(temperature, expected):
    student, teacher = torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([[3.0, 2.0, 1.0]]).double()
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(expected, abs=1e-9)
    assert kd_loss(student.float(), teacher.float(), temperature).item() == pytest.approx(expected, rel=1e-6)


def test_kd_of_equal_logits_is_zero():
    logits = torch.randn(3, 5)
    assert kd_loss(logits, logits, 1.0).item() == pytest.approx(0, abs=1e-7)


def test_kd_is_a_mean_over_all_leading_dimensions():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    expected = F.kl_div(
        F.log_softmax(student.view(6, 5) / 2, -1),
        F.softmax(teacher.view(6, 5) / 2, -1),
        reduction="batchmean",
    )
    torch.testing.assert_close(kd_loss(student, teacher, 2.0), 4 * expected)


def test_kd_rows_select_positions():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    rows = torch.tensor([[True, False, True], [False, True, False]])
    student[~rows] = float("nan")
    expected = kd_loss(student[rows], teacher[rows], 2.0)
    torch.testing.assert_close(kd_loss(student, teacher, 2.0, rows=rows), expected)


def test_kd_without_rows_is_zero_with_a_gradient():
    student = torch.randn(2, 5, requires_grad=True)
    loss = kd_loss(student, torch.randn(2, 5), 2.0, rows=torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().sum().item() == 0


@pytest.mark.parametrize("filler", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_kd_dropped_classes_count_for_nothing(filler):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6), torch.randn(2, 6)
    classes = torch.tensor([[True] * 4 + [False] * 2, [True, False, True, True, True, True]])
    expected = sum(kd_loss(student[i][classes[i]], teacher[i][classes[i]], 2.0) for i in range(2)) / 2
    student, teacher = student.masked_fill(~classes, filler), teacher.masked_fill(~classes, filler)
    student.requires_grad_()
    loss = kd_loss(student, teacher, 2.0, classes=classes)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert student.grad.isfinite().all()
    assert (student.grad[~classes] == 0).all()
    assert (student.grad[classes] != 0).all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_kd_of_a_position_without_any_class_is_zero(temperature):
    classes = torch.tensor([[True, True, False], [False] * 3])
    student = torch.randn(2, 3, requires_grad=True)
    loss = kd_loss(student, torch.randn(2, 3), temperature, classes=classes)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and (student.grad[1] == 0).all()


def test_kd_rows_and_classes_together():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    rows = torch.tensor([[True, False, False], [True, True, False]])
    classes = torch.tensor([True, True, False, True])
    expected = kd_loss(student[rows][:, classes], teacher[rows][:, classes], 2.0)
    torch.testing.assert_close(kd_loss(student, teacher, 2.0, rows=rows, classes=classes), expected)


def test_kd_without_any_class_is_zero():
    student = torch.randn(1, 3, requires_grad=True)
    loss = kd_loss(student, torch.randn(1, 3), 2.0, classes=torch.zeros(1, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.isfinite().all()


def test_kd_in_bf16_is_computed_in_float32():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 50).bfloat16(), torch.randn(4, 50).bfloat16()
    loss = kd_loss(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kd_loss(student.float(), teacher.float(), 2.0))


def test_kd_bad_input():
    with pytest.raises(ValueError, match=r"student logits have shape \(2, 3\) but the teacher's have \(2, 4\)"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 4), 1.0)
    with pytest.raises(ValueError, match="temperature is 0 but must be above 0"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0)
    with pytest.raises(ValueError, match=r"rows has shape \(3,\)"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), 1.0, rows=torch.ones(3, dtype=torch.bool))


def test_hidden_loss_is_the_mean_squared_error_of_the_selected_positions():
    torch.manual_seed(0)
    student = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(3)]
    teacher = [torch.randn(2, 3, 4) for _ in range(3)]
    rows = torch.tensor([[True, True, False], [True, False, False]])
    expected = torch.stack([F.mse_loss(s[rows], t[rows]) for s, t in zip(student, teacher, strict=True)]).mean()
    for state in teacher:
        state[~rows] = float("nan")
    loss = hidden_loss(student, teacher, rows) / rows.sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(s.grad[~rows].abs().sum() == 0 and s.grad.isfinite().all() for s in student)


def test_relative_hidden_loss_is_divided_by_the_size_of_the_teachers_state():
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(2, 3, 4, generator=generator).requires_grad_() for _ in range(2)]
    teacher = [torch.randn(2, 3, 4, generator=generator) for _ in range(2)]
    rows = torch.tensor([[True, True, False], [True, False, False]])
    pairs = [(s.detach()[rows].numpy(), t[rows].numpy()) for s, t in zip(student, teacher, strict=True)]
    expected = np.mean([(((s - t) ** 2).sum(1) / (t**2).sum(1)).mean() for s, t in pairs])
    for state in teacher:
        state[~rows] = float("nan")
    loss = hidden_loss(student, teacher, rows, relative=True) / rows.sum()
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)
    loss.backward()
    assert all(s.grad[~rows].abs().sum() == 0 and s.grad.isfinite().all() for s in student)
    # Layers count alike whatever their size, and micro-batches add up.
    larger = [[scale * state for scale, state in zip((1, 100), states, strict=True)] for states in (student, teacher)]
    torch.testing.assert_close(hidden_loss(*larger, rows, relative=True) / rows.sum(), loss)
    halves = [hidden_loss(*([x[i] for x in xs] for xs in (student, teacher)), rows[i], relative=True) for i in (0, 1)]
    torch.testing.assert_close(sum(halves) / rows.sum(), loss)


def test_hidden_loss_wants_equal_depth_and_width():
    with pytest.raises(ValueError, match="depth and width must be equal"):
        hidden_loss([torch.zeros(1, 2)], [torch.zeros(1, 2), torch.zeros(1, 2)])
    with pytest.raises(ValueError, match="depth and width must be equal"):
        hidden_loss([torch.zeros(1, 2)], [torch.zeros(1, 3)])


def _problem(rows=37, labelled=11, width=8, teacher_width=6, vocabulary=53, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def random(*shape, learns=False):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(learns)

    student = (
        random(rows, width, learns=True),
        random(vocabulary, width, learns=True),
        random(vocabulary, learns=True),
    )
    teacher = (random(rows, teacher_width), random(vocabulary, teacher_width), random(vocabulary))
    return student, teacher, torch.randint(vocabulary, (labelled,), generator=generator)


def _naive(student, teacher, labels, temperature, hard_scale, kd_scale):
    logits = F.linear(*student).float() if student[0].dtype != torch.float64 else F.linear(*student)
    hard = logits.new_zeros(())
    if labels is not None:
        hard = F.cross_entropy(logits[: len(labels)], labels, reduction="sum")
    kd = logits.new_zeros(())
    if teacher is not None:
        teacher_logits = F.linear(*teacher).to(logits.dtype)
        kd = kd_loss(logits, teacher_logits, temperature) * len(logits)
    return hard_scale * hard + kd_scale * kd, hard, kd


@pytest.mark.parametrize("chunk_rows", [1, 10, 16, 512])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.5])
@pytest.mark.parametrize("which", ["hard", "kd", "both", "all labelled"])
def test_fused_head_equals_the_naive_one(chunk_rows, temperature, which):
    student, teacher, labels = _problem(labelled=37 if which == "all labelled" else 11)
    teacher = None if which == "hard" else teacher
    labels = None if which == "kd" else labels
    if which == "hard":  # rows without a label have nothing to learn from
        student = (student[0].detach()[: len(labels)].requires_grad_(), *student[1:])
    expected = _naive(student, teacher, labels, temperature, 0.3, 0.07)
    wanted = torch.autograd.grad(3 * expected[0], student)
    result = fused_head_losses(
        *student,
        labels=labels,
        hard_scale=torch.tensor(0.3),
        teacher=teacher,
        temperature=temperature,
        kd_scale=torch.tensor(0.07),
        chunk_rows=chunk_rows,
    )
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got, want.detach() if got is not result.loss else want, rtol=1e-5, atol=1e-6)
    for got, want in zip(torch.autograd.grad(3 * result.loss, student), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["hard", "kd", "both"])
def test_fused_head_gradcheck(which):
    size = {"rows": 5, "labelled": 5 if which == "hard" else 3, "width": 3, "teacher_width": 2, "vocabulary": 4}
    student, teacher, labels = _problem(**size, dtype=torch.float64)

    def loss(hidden, weight, bias):
        return fused_head_losses(
            hidden,
            weight,
            bias,
            labels=None if which == "kd" else labels,
            hard_scale=0.3,
            teacher=None if which == "hard" else teacher,
            temperature=2.0,
            kd_scale=0.7,
            chunk_rows=2,
        ).loss

    assert torch.autograd.gradcheck(loss, student)


def test_fused_head_under_bf16_autocast_is_close():
    student, teacher, labels = _problem(rows=64, labelled=20, width=32, teacher_width=32, vocabulary=200)
    expected = _naive(student, teacher, labels, 2.0, 0.05, 0.02)
    wanted = torch.autograd.grad(expected[0], student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = fused_head_losses(
            *student, labels=labels, hard_scale=0.05, teacher=teacher, temperature=2.0, kd_scale=0.02
        )
    torch.testing.assert_close(result.loss, expected[0], rtol=2e-2, atol=0)
    for got, want in zip(torch.autograd.grad(result.loss, student), wanted, strict=True):
        assert got.dtype == want.dtype
        assert F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.999


def test_fused_head_twice_and_without_gradient():
    student, teacher, labels = _problem()
    result = fused_head_losses(*student, labels=labels, teacher=teacher, temperature=2.0)
    first = torch.autograd.grad(result.loss, student, retain_graph=True)
    second = torch.autograd.grad(result.loss, student)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        quiet = fused_head_losses(*student, labels=labels, teacher=teacher, temperature=2.0)
    assert torch.equal(quiet.loss, result.loss)
    assert not quiet.loss.requires_grad


def test_fused_head_tied_weight_and_no_bias():
    embedding = torch.randn(20, 8, requires_grad=True)
    ids, labels = torch.arange(6), torch.arange(6) + 3
    expected = F.cross_entropy(F.linear(F.embedding(ids, embedding), embedding), labels, reduction="sum")
    wanted = torch.autograd.grad(expected, embedding)[0]
    result = fused_head_losses(F.embedding(ids, embedding), embedding, None, labels=labels)
    torch.testing.assert_close(torch.autograd.grad(result.loss, embedding)[0], wanted, rtol=1e-4, atol=1e-6)


def test_fused_head_of_no_rows_is_zero():
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    result = fused_head_losses(hidden, weight, None, labels=torch.zeros(0, dtype=torch.long))
    result.loss.backward()
    assert result.loss.item() == 0
    assert weight.grad.abs().sum() == 0


def test_fused_head_bad_input():
    hidden, weight = torch.zeros(3, 4), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="4 labels for 3 rows"):
        fused_head_losses(hidden, weight, None, labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="teacher's vocabulary has 6 entries, the student's 5"):
        fused_head_losses(hidden, weight, None, teacher=(hidden, torch.zeros(6, 4), None))
    with pytest.raises(ValueError, match="0 labels for 3 rows; without a teacher every row needs a label"):
        fused_head_losses(hidden, weight, None)
