"""The KL divergence at any temperature, compared with sums in extended precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import Compose, random_images
from torch import Tensor

from sskd.data import Loader
from sskd.methods.kd import kd_loss, softened_kl
from sskd.teachers.assembly import assemble
from sskd.training.evaluation import mean_kl

TEMPERATURES = [0.5, 1.0, 4.0, 20.0, 1e2, 1e4, 1e6]


def logits(scale: float, seed: int, rows: int = 32, classes: int = 100) -> Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def without_cancellation(
    student: Tensor, teacher: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the divergence of rows and its gradient, from terms that do not cancel, in 80 bits.

    With x = (teacher - student) / T and q the student's prediction,
    ``KL = sum(q e^x x) / sum(q e^x) - log(sum(q e^x))``. The mean of x under q is subtracted first.
    """
    s, t = (each.double().numpy().astype(np.longdouble) for each in (student, teacher))
    q = np.exp((s - s.max(1, keepdims=True)) / temperature)
    q /= q.sum(1, keepdims=True)
    x = (t - s) / temperature
    x -= (q * x).sum(1, keepdims=True)
    more = (q * np.expm1(x)).sum(1, keepdims=True)
    p = q * np.exp(x) / (1 + more)
    # sum(q x) is 0, so sum(q e^x x) equals sum(q (e^x - 1) x).
    rows = (q * np.expm1(x) * x).sum(1) / (1 + more[:, 0]) - np.log1p(more[:, 0])
    return torch.tensor((rows * temperature**2).astype(float)), torch.tensor(
        ((p - q) * -temperature).astype(float)
    )


def by_definition(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the same for predictions far apart, for which ``without_cancellation`` overflows."""

    def log_softmax(values: Tensor) -> np.ndarray:
        scaled = values.double().numpy().astype(np.longdouble) / temperature
        scaled -= scaled.max(1, keepdims=True)
        return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))

    log_q, log_p = log_softmax(student), log_softmax(teacher)
    rows = (np.exp(log_p) * (log_p - log_q)).sum(1) * temperature**2
    slope = (np.exp(log_q) - np.exp(log_p)) * temperature
    return torch.tensor(rows.astype(float)), torch.tensor(slope.astype(float))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("scale", "difference"), [(3, None), (10, None), (3, 1e-2), (5, 1e-4)])
def test_value_and_gradient_at_any_temperature(
    scale: float, difference: float | None, temperature: float
) -> None:
    teacher = logits(scale, 0)
    student = logits(scale, 1) if difference is None else teacher + logits(difference, 1)
    expected, slope = without_cancellation(student, teacher, temperature)
    student.requires_grad_()
    found = softened_kl(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert (found.dtype, gradient.dtype) == (torch.float32, torch.float32)
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(
        gradient.double(), slope, rtol=1e-3, atol=3e-5 * slope.abs().max().item()
    )


def saturated(seed: int) -> Tensor:
    """Return logits of 1e4 and -1e4, which differ much even at a temperature of 1000."""
    return 1e4 * logits(1, seed).sign()


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e4, 1e12])
@pytest.mark.parametrize("kind", ["far", "near", "saturated", "teacher saturated"])
def test_extreme_temperatures_stay_accurate(kind: str, temperature: float) -> None:
    """Temperatures from 1e-3 to the largest allowed one, and logits of a diverged network."""
    teacher = saturated(0) if "saturated" in kind else logits(10, 0)
    student = {
        "far": logits(10, 1),
        "near": teacher + logits(1e-3, 1),
        "saturated": saturated(1),
        "teacher saturated": logits(10, 1),
    }[kind].requires_grad_()
    found = softened_kl(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert gradient.isfinite().all()
    if kind == "near" and temperature == 1e12:
        return  # float64 does not resolve a difference of 1e-15 between two predictions
    exact = by_definition if temperature <= 1 else without_cancellation
    expected, slope = exact(student.detach(), teacher, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-9)
    size = slope.abs().max().item()
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-3, atol=1e-3 * size + 1e-37)


def test_there_is_no_second_derivative() -> None:
    """Beside other terms, PyTorch would silently treat the gradient as a constant."""
    student = logits(1, 5).requires_grad_()
    found = softened_kl(student, logits(1, 6), 4.0).sum() + student.square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(found, student, create_graph=True)
    torch.autograd.grad(found, student, retain_graph=True)
    torch.autograd.grad(found, student)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_equal_predictions_give_zero(temperature: float) -> None:
    student = logits(5, 2).requires_grad_()
    found = softened_kl(student, student.detach(), temperature)
    assert (found == 0).all()
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert (gradient == 0).all()


@pytest.mark.parametrize("temperature", [1e4, 1e6, 1e9])
def test_high_temperature_gives_half_the_variance(temperature: float) -> None:
    """Hinton, Vinyals, Dean (2015), section 2.1: distillation then matches centred logits."""
    student, teacher = logits(3, 3), logits(3, 4)
    difference = (teacher - student).double()
    variance = difference.var(1, correction=0)
    found = softened_kl(student, teacher, temperature)
    torch.testing.assert_close(found.double(), variance / 2, rtol=20 / temperature + 1e-6, atol=0)


def test_disjoint_predictions_stay_finite() -> None:
    student, teacher = torch.zeros(2, 3), torch.zeros(2, 3)
    student[:, 0], teacher[:, 1] = 3000, 3000
    student.requires_grad_()
    found = softened_kl(student, teacher, 1.0)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert found.tolist() == pytest.approx([3000, 3000])
    assert gradient.tolist() == [[1, -1, 0]] * 2


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_nan_and_inf_are_not_hidden(lost: float) -> None:
    student, teacher = logits(1, 5), logits(1, 6)
    student[3, 4] = lost
    assert not kd_loss(student, teacher, 4.0).isfinite()
    assert softened_kl(student, teacher, 4.0).isfinite().sum() == len(student) - 1
    assert not kd_loss(teacher, student, 4.0).isfinite()


@pytest.mark.parametrize("method", ["kd", "sskd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_methods_stay_accurate_at_high_temperature(
    composed: Compose, method: str, precision: str
) -> None:
    """The logits have 8 bits in autocast, and the loss is computed with more."""
    overrides = ["arch@teacher=resnet8", "arch@student=resnet8", f"method={method}"]
    overrides += ["method.temperature=1e5"] + ["method.ss_temperature=1e5"] * (method == "sskd")
    images = random_images(8, 4)
    built = assemble(composed(*overrides), images)
    batch = Loader(
        images.train, images.mean, images.std, batch_size=8, views=built.views
    ).next_batch()
    *_, phase = built.phases()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        terms = phase.loss(batch).terms
        student = built.student(batch.x).logits.float()[:: built.views.rotations]
        teacher = built.teacher_features(batch).logits.float()[:: built.views.rotations]
    expected = (teacher - student).double().var(1, correction=0).mean() / 2
    assert terms["kd"].item() == pytest.approx(expected.item(), rel=1e-3)
    assert terms["kd"].item() > 0
    assert terms.get("ss", terms["kd"]).item() > 0


def test_the_mean_kl_of_a_result_is_not_negative() -> None:
    close = logits(5, 7).double()
    assert mean_kl(close, close) == 0
    for size in (1e-8, 1e-12, 1e-15):  # the sum of the last is -4e-20
        assert mean_kl(close * (1 + size), close) >= 0
