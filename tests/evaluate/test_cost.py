"""The cost of a network: FLOPs by hand, and a clock that is set by hand."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from sskd.evaluate import cost
from sskd.evaluate.cost import count_flops, measure_cost, measure_latency
from sskd.models import build_model

CPU = torch.device("cpu")


def test_flops_are_those_of_convolutions_and_products() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    products = 3 * 8 * 9 * 32**2 + 4 * 16 * 9 * 16**2 + 16 * 10
    assert count_flops(network, torch.zeros(1, 3, 32, 32)) == 2 * products
    assert count_flops(network, torch.zeros(3, 3, 32, 32)) == 3 * 2 * products


def test_the_cost_of_a_network() -> None:
    network = build_model("resnet8", 10).train()
    found = measure_cost(network, 32, CPU, repeats=0)
    assert found.parameters == sum(p.numel() for p in network.parameters())
    # The stem, three stages of one block with 16, 32 and 64 channels, and the classifier.
    stem, first = 27 * 16 * 32**2, 2 * 9 * 16 * 16 * 32**2
    second = (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32) * 16**2
    third = (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64) * 8**2
    assert found.multiply_adds == stem + first + second + third + 640
    assert found.flops == 2 * found.multiply_adds
    assert found.latency == ()
    assert found.machine.torch == torch.__version__


class Clock(nn.Module):
    """A network whose forward passes take the ``times``, in seconds, by a clock of its own."""

    def __init__(self, *times: float) -> None:
        super().__init__()
        self.times, self.now, self.passes = times, 0.0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.now += self.times[self.passes % len(self.times)]
        self.passes += 1
        return x


def test_latency_is_a_median_with_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Clock(9, 9, 9, 0.001, 0.004, 0.002, 0.003, 0.1)  # three to warm up
    monkeypatch.setattr(time, "perf_counter", lambda: network.now)
    found = measure_latency(network, torch.zeros(64, 3, 8, 8), repeats=5)
    assert (found.batch_size, found.repeats) == (64, 5)
    assert (found.quartile1_ms, found.median_ms, found.quartile3_ms) == pytest.approx((2, 3, 4))
    assert found.images_per_second == pytest.approx(64 / 0.003)


def test_slow_passes_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Clock(1.0)
    monkeypatch.setattr(time, "perf_counter", lambda: network.now)
    monkeypatch.setattr(cost, "MOST_SECONDS", 5.0)
    assert measure_latency(network, torch.zeros(1, 3, 8, 8), repeats=50).repeats == 5
    monkeypatch.setattr(cost, "MOST_SECONDS", 0.5)
    assert measure_latency(network, torch.zeros(1, 3, 8, 8), repeats=50).repeats == 3
    assert measure_latency(network, torch.zeros(1, 3, 8, 8), repeats=1).repeats == 1
