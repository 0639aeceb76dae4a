"""Calibration against scikit-learn and torchmetrics, and the fit of the temperature."""

from __future__ import annotations

import math

import pytest
import torch
from samples import overconfident
from sklearn.metrics import log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from sskd.evaluate.calibration import (
    expected_calibration_error,
    fit_temperature,
    measure_calibration,
    nll,
    reliability,
)


@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])
def test_nll_and_ece_equal_other_implementations(scale: float) -> None:
    logits, labels = overconfident(scale=scale)
    probabilities, classes = logits.softmax(1), range(logits.shape[1])
    measured = measure_calibration(logits, labels)
    assert measured.nll_nats == pytest.approx(log_loss(labels, probabilities, labels=classes))
    expected = multiclass_calibration_error(
        probabilities, labels, len(classes), n_bins=15, norm="l1"
    )
    assert measured.ece_percent == pytest.approx(100 * expected.item())
    assert sum(each.images for each in measured.bins) == len(labels)


def test_an_ece_by_hand() -> None:
    """Four images with confidence 0.75 of which two are right, and one right with 0.9."""
    confidences = torch.tensor([0.75, 0.75, 0.75, 0.75, 0.9], dtype=torch.float64)
    logits = torch.stack([confidences.log(), (1 - confidences).log()], 1)
    labels = torch.tensor([0, 0, 1, 1, 0])
    bins = reliability(logits, labels)
    assert [each.images for each in bins if each.images] == [4, 1]
    assert expected_calibration_error(bins) == pytest.approx(100 * (4 * 0.25 + 0.1) / 5)


@pytest.mark.parametrize(("confidence", "place"), [(0.8, 11), (0.8 + 1e-9, 12), (1.0, 14)])
def test_a_bin_has_its_upper_edge(confidence: float, place: int) -> None:
    rest = max(1 - confidence, 1e-300)
    logits = torch.tensor([[confidence, rest]], dtype=torch.float64).log()
    counts = [each.images for each in reliability(logits, torch.tensor([0]))]
    assert counts.index(1) == place


def test_the_temperature_minimises_the_nll() -> None:
    logits, labels = overconfident(scale=4.0)
    temperature = fit_temperature(logits, labels)
    assert temperature is not None
    assert temperature == pytest.approx(4.0, rel=0.2)  # the scale of the logits
    best = nll(logits / temperature, labels)
    for factor in (0.999, 1.001):
        assert best < nll(logits / (factor * temperature), labels)
    after = measure_calibration(logits, labels, temperature)
    before = measure_calibration(logits, labels)
    assert after.nll_nats == pytest.approx(best)
    assert after.ece_percent < before.ece_percent


def test_a_scale_of_the_logits_scales_the_temperature() -> None:
    logits, labels = overconfident()
    once, twice = fit_temperature(logits, labels), fit_temperature(2 * logits, labels)
    assert once is not None
    assert twice == pytest.approx(2 * once)
    # Adding a number to all logits of an image changes no probability.
    assert fit_temperature(logits + torch.randn(len(logits), 1), labels) == pytest.approx(once)


def test_a_fit_without_a_minimum_gives_no_temperature() -> None:
    logits, labels = torch.eye(3), torch.arange(3)
    assert fit_temperature(logits, labels) is None  # all are right
    assert fit_temperature(-logits, labels) is None  # worse than constant logits
    assert fit_temperature(torch.zeros(3, 3), labels) is None


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, 0.0, -1e4]])
    measured = measure_calibration(logits, torch.tensor([1, 0]))
    assert measured.nll_nats == pytest.approx(1e4)
    assert measured.ece_percent == pytest.approx(50)
    assert not math.isnan(measured.nll_nats)
