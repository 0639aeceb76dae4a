"""The FLOPs of a step are counted correctly. The speed of the hardware is not tested."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import ceiling
from benchmarks.ceiling import DTYPES, count_flops, flop_share, matrix_rate

# Forward: 2 * 2 images * 4 * 4 pixels * 6 output * 4 input channels * 3 * 3.
CONVOLUTION = 2 * 2 * 4 * 4 * 6 * 4 * 3 * 3


def test_a_product_has_two_flops_for_each_pair() -> None:
    left, right = torch.ones(3, 5), torch.ones(5, 7)
    assert count_flops(lambda: left @ right) == 2 * 3 * 5 * 7


@pytest.mark.parametrize(("needs_gradient", "backward"), [(True, 2), (False, 1)])
def test_a_convolution_counts_for_each_gradient(needs_gradient: bool, backward: int) -> None:
    x = torch.ones(2, 4, 4, 4, requires_grad=needs_gradient)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    assert count_flops(lambda: layer(x).sum().backward()) == (1 + backward) * CONVOLUTION


def test_a_transposed_convolution_is_counted() -> None:
    x = torch.ones(2, 4, 4, 4, requires_grad=True)
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2)
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * CONVOLUTION


def test_inference_mode_hides_no_operation() -> None:
    x, layer = torch.ones(2, 4, 4, 4), nn.Conv2d(4, 6, 3, padding=1)
    with torch.inference_mode():
        assert count_flops(lambda: layer(x)) == CONVOLUTION


def test_a_whole_step_is_counted() -> None:
    layer, x = nn.Linear(5, 7), torch.ones(3, 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(layer(x), torch.zeros(3, 7)).backward()
        optimizer.step()

    assert count_flops(step) == 2 * (2 * 3 * 5 * 7)


@pytest.mark.parametrize("precision", DTYPES)
def test_the_matrix_rate_is_measured(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "SECONDS", 0.0)
    rate = matrix_rate(torch.device("cpu"), DTYPES[precision], sizes=(16, 32))
    assert math.isfinite(rate)
    assert rate > 0


def test_the_share_compares_flops_with_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 100.0, torch.bfloat16: 400.0}

    def rate(device: torch.device, dtype: torch.dtype) -> float:
        return rates[dtype] * (2 if torch.backends.cuda.matmul.allow_tf32 else 1)

    monkeypatch.setattr(ceiling, "matrix_rate", rate)
    left, right = torch.ones(3, 5), torch.ones(5, 10)

    def share(precision: str) -> float:
        return flop_share(lambda: left @ right, 6.0, torch.device("cpu"), precision)

    assert share("fp32") == 0.5
    assert share("tf32") == 0.25
    assert share("bf16") == 0.125
