"""CKA and correlations of weights against direct computations, and their properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sskd.similarity.cka import linear_cka, minibatch_cka, unbiased_hsic
from sskd.similarity.classifiers import (
    correlation_difference,
    mean_difference,
    weight_correlations,
)


def features(images: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(images, size, generator=torch.Generator().manual_seed(seed))


def orthogonal(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(features(size, size, seed).double()).Q


def related(images: int = 60) -> tuple[Tensor, Tensor]:
    """Return features of 5 and 7 dimensions that have three of them in common."""
    x = features(images, 5)
    y = torch.cat([x[:, :3] * 2 + 1, features(images, 4, 1)], dim=1)
    return x, y


def test_cka_is_that_of_centred_gram_matrices() -> None:
    x, y = (each.double().numpy() for each in related())
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = (centre @ each @ each.T @ centre for each in (x, y))
    expected = (k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum())
    assert linear_cka(*related()) == pytest.approx(expected, abs=1e-12)
    assert 0.2 < expected < 0.9


@pytest.mark.parametrize("n", [4, 5, 7])
def test_hsic_is_the_mean_over_different_images(n: int) -> None:
    """The estimator is a U-statistic: Song et al., JMLR 2012, equation 4, over all quadruples."""
    x, y = features(n, 3).double(), features(n, 2, 1).double()
    k, m = (each @ each.T for each in (x, y))
    terms = [
        k[i, j] * m[i, j] + k[i, j] * m[q, r] - 2 * k[i, j] * m[i, q]
        for i, j, q, r in itertools.permutations(range(n), 4)
    ]
    assert unbiased_hsic(k, m).item() == pytest.approx(float(np.mean(terms)), abs=1e-12)


def test_equal_features_have_a_cka_of_one() -> None:
    x, _ = related()
    changed = 3 * x.double() @ orthogonal(5) + 4
    for cka in (linear_cka, minibatch_cka):
        assert cka(x, x) == pytest.approx(1, abs=1e-6)
        assert cka(x, changed) == pytest.approx(1, abs=1e-6)


def test_cka_ignores_rotation_scale_and_shift() -> None:
    x, y = related()
    changed = (0.1 * x.double() @ orthogonal(5) - 2, 7 * y.double() @ orthogonal(7, 1) + 1)
    assert linear_cka(*changed) == pytest.approx(linear_cka(x, y), abs=1e-9)
    assert minibatch_cka(*changed, batch_size=20) == pytest.approx(
        minibatch_cka(x, y, batch_size=20), abs=1e-9
    )
    stretched = x * torch.tensor([9.0, 1, 1, 1, 1])
    assert abs(linear_cka(stretched, y) - linear_cka(x, y)) > 0.05, "not any linear map"


def test_minibatches_are_unbiased_and_the_whole_is_not() -> None:
    """Of unrelated features; with many of them, the usual estimate is far above 0."""
    pairs = [(features(64, 40, 2 * k), features(64, 40, 2 * k + 1)) for k in range(40)]
    unbiased = [minibatch_cka(x, y, batch_size=16) for x, y in pairs]
    error = np.std(unbiased) / math.sqrt(len(unbiased))
    assert abs(np.mean(unbiased)) < 3 * error
    assert np.mean([linear_cka(x, y) for x, y in pairs]) > 0.3


def test_the_size_of_the_batches_hardly_matters() -> None:
    x, y = related(1024)
    estimates = [minibatch_cka(x, y, batch_size=size) for size in (16, 64, 1024)]
    assert estimates == pytest.approx([estimates[-1]] * 3, abs=0.02)
    assert estimates[-1] == pytest.approx(linear_cka(x, y), abs=0.02)


def test_a_last_batch_that_is_not_full_is_left_out() -> None:
    x, y = related(25)
    kept = torch.randperm(25, generator=torch.Generator().manual_seed(0))[:20]
    expected = minibatch_cka(x[kept], y[kept], batch_size=20)
    assert minibatch_cka(x, y, batch_size=20) == pytest.approx(expected, abs=1e-12)
    assert minibatch_cka(x, y) == pytest.approx(minibatch_cka(x, y, batch_size=25), abs=1e-12)


def test_what_has_no_cka_is_not_a_number() -> None:
    x, y = related()
    for value in (1, 0.3, 1000.1):
        constant = torch.full((60, 5), value)
        for cka in (linear_cka, minibatch_cka):
            assert math.isnan(cka(constant, y))
            assert math.isnan(cka(constant, constant))
    assert math.isnan(minibatch_cka(x[:3], y[:3]))


def test_correlations_of_weights_are_cosines() -> None:
    weight = features(6, 4)
    found = weight_correlations(weight)
    for i, j in itertools.product(range(6), repeat=2):
        a, b = weight[i].double(), weight[j].double()
        assert found[i, j].item() == pytest.approx((a @ b / (a.norm() * b.norm())).item())
    changed = weight * torch.arange(1, 7)[:, None] @ orthogonal(4).float()
    assert correlation_difference(weight, changed).max().item() < 1e-6


def test_the_difference_is_a_mean_over_pairs_of_classes() -> None:
    student, teacher = features(5, 4), features(5, 9, 1)
    difference = correlation_difference(student, teacher)
    assert difference.shape == (5, 5)
    pairs = [difference[i, j].item() for i, j in itertools.permutations(range(5), 2)]
    assert mean_difference(difference) == pytest.approx(float(np.mean(pairs)))
    assert difference.diag().abs().max().item() < 1e-12
