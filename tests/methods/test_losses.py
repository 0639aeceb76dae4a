"""The losses of KD and SSKD, compared with loops in float64 and the properties in the papers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sskd.methods.kd import kd_loss, softened_kl
from sskd.methods.mlld import batch_loss, class_loss
from sskd.methods.skd import direction_differences, mahalanobis_length
from sskd.methods.sskd import keep_rows, masked_mean
from sskd.methods.tasks import positives, similarity, split_views


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def kl_by_hand(student: Tensor, teacher: Tensor, temperature: float) -> list[float]:
    rows = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(t, temperature), softmax(s, temperature)
        rows.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return rows


@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (7, 5), (16, 100)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_equals_loops(batch: int, classes: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(batch)
    student = 3 * torch.randn(batch, classes, generator=generator)
    teacher = 3 * torch.randn(batch, classes, generator=generator)
    by_hand = kl_by_hand(student.double(), teacher.double(), temperature)
    torch.testing.assert_close(
        softened_kl(student, teacher, temperature), torch.tensor(by_hand), rtol=1e-4, atol=1e-5
    )
    expected = sum(by_hand) / batch
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-4)


def test_kd_ignores_a_constant_in_the_logits() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    assert kd_loss(logits, logits, 4.0).item() == pytest.approx(0, abs=1e-6)
    assert kd_loss(logits + 5, logits, 4.0).item() == pytest.approx(0, abs=1e-5)


def test_kd_trains_the_student_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(8, 10, generator=generator, requires_grad=True)
    student = torch.randn(8, 10, generator=generator, requires_grad=True)
    losses = []
    for _ in range(20):
        loss = kd_loss(student, teacher, 4.0)
        (gradient,) = torch.autograd.grad(loss, student)
        losses.append(loss.item())
        student = (student - 0.5 * gradient).detach().requires_grad_()
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    kd_loss(student, teacher, 4.0).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_losses_are_float32_for_any_input(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(4, 6, generator=generator).to(dtype)
    teacher = torch.randn(4, 6, generator=generator).to(dtype)
    losses: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda one, other: kd_loss(one, other, 4.0),
        lambda one, other: batch_loss(one, other, [4.0, 2.0]),
        lambda one, other: class_loss(one, other, [4.0, 2.0]),
        lambda one, _: mahalanobis_length(one, 0.1),
        direction_differences,
        similarity,
    ]
    for loss in losses:
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(student, teacher)
        assert inside.dtype == torch.float32
        torch.testing.assert_close(inside, loss(student.float(), teacher.float()))


@pytest.mark.parametrize(("images", "width"), [(1, 3), (4, 8), (9, 64)])
def test_similarity_is_the_cosine_of_every_pair(images: int, width: int) -> None:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(images, width, generator=generator)
    transformed = torch.randn(3 * images, width, generator=generator)
    found = similarity(transformed, normal)
    assert found.shape == (3 * images, images)
    for i, j in itertools.product(range(3 * images), range(images)):
        a, b = transformed[i].tolist(), normal[j].tolist()
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        assert found[i, j].item() == pytest.approx(dot / norms, abs=1e-5)


def test_similarity_ignores_scale_and_accepts_zeros() -> None:
    generator = torch.Generator().manual_seed(4)
    normal, transformed = torch.randn(2, 5, generator=generator), torch.randn(6, 5)
    scaled = similarity(7 * transformed, 0.1 * normal)
    torch.testing.assert_close(scaled, similarity(transformed, normal))
    assert similarity(torch.zeros(3, 5), torch.zeros(1, 5)).isfinite().all()


def rows_kept_by_hand(scores: Tensor, target: Tensor, ratio: float) -> list[bool]:
    ranks = [
        sum(value > row[column] for value in row)
        for row, column in zip(scores.tolist(), target.tolist(), strict=True)
    ]
    wrong = sorted((rank, place) for place, rank in enumerate(ranks) if rank > 0)
    kept = {place for _, place in wrong[: math.floor(ratio * len(wrong))]}
    return [rank == 0 or place in kept for place, rank in enumerate(ranks)]


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.29, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_keep_rows_equals_loops(ratio: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = 3 * (seed + 1) * 4, 2 + 5 * seed
    # Four different scores, so that some ranks tie and some rows are equal.
    scores = torch.randint(0, 4, (rows, columns), generator=generator).float()
    target = torch.randint(0, columns, (rows,), generator=generator)
    kept = keep_rows(scores, target, ratio)
    assert kept.dtype == torch.bool
    assert kept.tolist() == rows_kept_by_hand(scores, target, ratio)


def test_keep_rows_of_a_teacher_always_right_or_wrong() -> None:
    right = torch.eye(6)
    assert keep_rows(right, torch.arange(6), 0.0).all()
    wrong = keep_rows(-right, torch.arange(6), 0.5)
    assert wrong.tolist() == [True] * 3 + [False] * 3  # all ranks tie: the earlier rows are kept


def test_masked_mean_averages_the_kept_rows() -> None:
    rows = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    keep = torch.tensor([True, False, False, True])
    masked_mean(rows, keep).backward()
    assert masked_mean(rows, keep).item() == 4.5
    assert rows.grad is not None
    assert rows.grad.tolist() == [0.5, 0, 0, 0.5]
    assert masked_mean(rows, torch.zeros(4, dtype=torch.bool)).item() == 0


def test_views_are_split_image_by_image() -> None:
    rows = torch.tensor([[10.0 * image + view] for image in range(3) for view in range(4)])
    normal, transformed = split_views(rows)
    assert normal.flatten().tolist() == [0, 10, 20]
    assert transformed.flatten().tolist() == [1, 2, 3, 11, 12, 13, 21, 22, 23]
    assert positives(normal).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
