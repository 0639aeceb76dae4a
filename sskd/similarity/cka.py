"""Centred kernel alignment (CKA) of features, with the linear kernel.

CKA: Kornblith, Norouzi, Lee & Hinton, *Similarity of Neural Network Representations Revisited*,
ICML 2019. Its estimate from minibatches: Nguyen, Raghu & Kornblith, *Do Wide and Deep Networks
Learn the Same Things?*, ICLR 2021, with the unbiased estimator of HSIC of Song, Smola, Gretton,
Bedo & Borgwardt, *Feature Selection via Dependence Maximization*, JMLR 2012.

All functions take features of the same images, ``[N, d]`` and ``[N, e]``, and compute in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_IMAGES = 4  # of a batch: the unbiased estimator divides by n - 3
BATCH_SIZE = 256  # of the estimate from minibatches, as in Nguyen et al.


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the CKA of all images at once, from 0 to 1; NaN if all features of one are equal.

    It is ``||Y'X||^2 / (||X'X|| ||Y'Y||)`` of the centred features, with Frobenius norms. It is
    biased upwards if there are not many more images than features.
    """
    if _is_constant(x) or _is_constant(y):
        return math.nan
    x, y = (features.double() - features.double().mean(0) for features in (x, y))
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return ((y.T @ x).square().sum() / scale).item()


def unbiased_hsic(gram: Tensor, other: Tensor) -> Tensor:
    """Return the unbiased estimate of HSIC from two Gram matrices ``[n, n]``, ``n`` at least 4.

    It is the mean over all quadruples of different images, so it can be negative.
    """
    n = len(gram)
    k, m = (each - each.diag().diag() for each in (gram, other))
    sums = k.sum() * m.sum() / ((n - 1) * (n - 2))
    rows = k.sum(0) @ m.sum(0) / (n - 2)
    return ((k * m).sum() + sums - 2 * rows) / (n * (n - 3))


def minibatch_cka(x: Tensor, y: Tensor, *, batch_size: int = BATCH_SIZE, seed: int = 0) -> float:
    """Return the estimate of CKA from minibatches; NaN if there is none.

    It is the quotient of means over batches of ``unbiased_hsic``, so that its expectation hardly
    depends on the size of the batches. The images are drawn in random order; a last batch that is
    not full is left out, unless it is the only one. The estimate can be slightly outside 0 to 1.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    batches = [part for part in order.split(batch_size) if len(part) == min(batch_size, len(x))]
    if len(batches[0]) < LEAST_IMAGES or _is_constant(x) or _is_constant(y):
        return math.nan
    total = torch.zeros(3, dtype=torch.float64)
    for part in batches:
        k, m = (rows @ rows.T for rows in (x[part].double(), y[part].double()))
        total += torch.stack([unbiased_hsic(k, m), unbiased_hsic(k, k), unbiased_hsic(m, m)])
    both, own_x, own_y = (total / len(batches)).tolist()
    return both / math.sqrt(own_x * own_y) if own_x > 0 and own_y > 0 else math.nan


def _is_constant(features: Tensor) -> bool:
    """Return whether all images have the same features; rounding hides it in sums over them."""
    return bool((features == features[0]).all())
