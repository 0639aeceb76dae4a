"""How well the confidence of a classifier fits its accuracy, and temperature scaling.

Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017. All of it in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15
# A temperature outside of these bounds is not a minimum that calibration could use.
LOWEST, HIGHEST = 1e-3, 1e3


@dataclass(frozen=True)
class Bin:
    """The images whose confidence is above ``low_percent`` and at most ``high_percent``.

    Their mean ``confidence_percent`` and their ``accuracy_percent`` are None if there are none.
    """

    low_percent: float
    high_percent: float
    images: int
    confidence_percent: float | None
    accuracy_percent: float | None


@dataclass(frozen=True)
class Calibration:
    """The negative log-likelihood (mean), the expected calibration error, and its bins."""

    nll_nats: float
    ece_percent: float
    bins: tuple[Bin, ...]


def measure_calibration(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Calibration:
    """Return the calibration of ``logits`` [N, C] over ``temperature`` for ``labels`` [N]."""
    scaled = logits.double() / temperature
    bins = reliability(scaled, labels)
    return Calibration(nll(scaled, labels), expected_calibration_error(bins), bins)


def nll(logits: Tensor, labels: Tensor) -> float:
    """Return the mean negative log-likelihood in nats of ``labels`` [N] under logits [N, C]."""
    return F.cross_entropy(logits.double(), labels).item()


def reliability(logits: Tensor, labels: Tensor, bins: int = BINS) -> tuple[Bin, ...]:
    """Group the images of ``logits`` [N, C] by confidence, in bins of equal width.

    The confidence is the largest probability. Bin m of M holds the images with a confidence in
    ((m - 1) / M, m / M].
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    # Rounding can give a softmax slightly above 1.
    place = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)
    images = torch.bincount(place, minlength=bins)
    sums = (
        torch.bincount(place, weights, minlength=bins).tolist()
        for weights in (confidence, (predicted == labels).double())
    )
    return tuple(
        Bin(
            low_percent=100 * number / bins,
            high_percent=100 * (number + 1) / bins,
            images=count,
            confidence_percent=100 * confident / count if count else None,
            accuracy_percent=100 * correct / count if count else None,
        )
        for number, (count, confident, correct) in enumerate(
            zip(images.tolist(), *sums, strict=True)
        )
    )


def expected_calibration_error(bins: tuple[Bin, ...]) -> float:
    """Return the mean over images of |accuracy - confidence| of their bin, in percent."""
    gaps = (
        each.images * abs(each.accuracy_percent - each.confidence_percent)
        for each in bins
        if each.accuracy_percent is not None and each.confidence_percent is not None
    )
    return math.fsum(gaps) / sum(each.images for each in bins)


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """Return the temperature that minimises the NLL of ``logits`` [N, C] divided by it.

    The NLL is convex in the inverse temperature b, so its derivative, the mean of
    ``sum_c softmax(b z)_c z_c - z_label``, has one root. It is bisected on a logarithmic scale.

    Returns:
        The temperature; None if the minimum is not between ``LOWEST`` and ``HIGHEST``. That is so
        if all images are classified correctly (the NLL then falls towards temperature 0), or if
        the logits are worse than constant ones.
    """
    logits = logits.double()
    of_label = logits.gather(1, labels[:, None])[:, 0]

    def slope(inverse: float) -> float:
        expected = ((inverse * logits).softmax(1) * logits).sum(1)
        return (expected - of_label).mean().item()

    low, high = -math.log(HIGHEST), -math.log(LOWEST)
    if not slope(math.exp(low)) < 0 < slope(math.exp(high)):
        return None
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)
