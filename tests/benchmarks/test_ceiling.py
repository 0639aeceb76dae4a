"""The work of a step is counted right; how fast the hardware is is not tested."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import ceiling
from benchmarks.ceiling import (
    Hardware,
    Work,
    count_work,
    flop_share,
    measure_hardware,
    roofline_share,
)

HARDWARE = Hardware(fp32=1e6, bf16=4e6, bandwidth=1e3)
FAST_MEMORY = replace(HARDWARE, bandwidth=1e30)
# Forward 2 * 2 images * 4 * 4 pixels * 6 out * 4 in * 3 * 3.
CONVOLUTION = 2 * 2 * 4 * 4 * 6 * 4 * 3 * 3


def test_a_product_has_two_flops_for_every_pair_of_elements() -> None:
    left, right = torch.ones(3, 5), torch.ones(5, 7)
    work = count_work(lambda: left @ right, HARDWARE)
    assert work.flops == 2 * 3 * 5 * 7
    assert work.bytes == 4 * (3 * 5 + 5 * 7 + 3 * 7)
    assert work.flop_seconds == work.flops / 1e6
    assert work.attainable_seconds == work.bytes / 1e3


@pytest.mark.parametrize(("needs_gradient", "backward"), [(True, 2), (False, 1)])
def test_a_convolution_is_counted_forward_and_for_each_gradient(
    needs_gradient: bool, backward: int
) -> None:
    x = torch.ones(2, 4, 4, 4, requires_grad=needs_gradient)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    work = count_work(lambda: layer(x).sum().backward(), FAST_MEMORY)
    assert work.flops == (1 + backward) * CONVOLUTION


def test_a_grouped_convolution_has_a_groups_share_of_the_flops() -> None:
    x = torch.ones(2, 4, 4, 4, requires_grad=True)
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    work = count_work(lambda: layer(x).sum().backward(), FAST_MEMORY)
    assert work.flops == 3 * CONVOLUTION // 2


def test_a_transposed_convolution_pairs_its_input_with_its_weight() -> None:
    x = torch.ones(2, 4, 4, 4, requires_grad=True)
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2)
    work = count_work(lambda: layer(x).sum().backward(), FAST_MEMORY)
    assert work.flops == 3 * CONVOLUTION


def test_inference_mode_hides_nothing() -> None:
    x, layer = torch.ones(2, 4, 4, 4), nn.Conv2d(4, 6, 3, padding=1)
    with torch.inference_mode():
        work = count_work(lambda: layer(x), FAST_MEMORY)
    assert work.flops == CONVOLUTION


def test_products_are_charged_at_the_rate_of_their_dtype() -> None:
    x, weight = torch.ones(3, 5), torch.ones(5, 7)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            torch.mm(x, weight)
        torch.mm(x, weight)

    work = count_work(step, FAST_MEMORY)
    flops = 2 * 3 * 5 * 7
    assert work.flops == 2 * flops
    assert work.flop_seconds == pytest.approx(flops / 1e6 + flops / 4e6)
    assert work.attainable_seconds == pytest.approx(work.flop_seconds)


def test_a_dtype_without_a_rate_is_an_error() -> None:
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"no rate of products of torch\.bfloat16"):
        count_work(lambda: x @ x, replace(HARDWARE, bf16=None))


ELEMENTS = 1000
A, B = torch.ones(ELEMENTS), torch.ones(ELEMENTS)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (lambda: A + B, 12 * ELEMENTS),
        (lambda: A + A, 8 * ELEMENTS),  # read once
        (lambda: A.add_(B), 12 * ELEMENTS),
        (lambda: A.copy_(B), 8 * ELEMENTS),  # what it overwrites is not read
        (lambda: torch._foreach_add_([A], [B]), 12 * ELEMENTS),  # returns nothing
        (lambda: torch.empty_like(A), 0),
        (lambda: torch.zeros_like(A), 4 * ELEMENTS),
        (lambda: A.view(10, 100).t()[1:].detach(), 0),
        (lambda: torch.ops.aten._unsafe_view(A, [10, 100]), 0),
        (lambda: A[:1].expand(ELEMENTS) + B, 8 * ELEMENTS + 4),
        (lambda: A.unfold(0, 10, 1).clone(), 4 * ELEMENTS + 4 * 10 * (ELEMENTS - 9)),
        (lambda: A[:0] + 1, 0),
    ],
)  # fmt: skip
def test_every_byte_moves_once(step: Callable[[], object], expected: int) -> None:
    assert count_work(step, HARDWARE).bytes == expected


def test_indexing_goes_to_the_rows_it_names() -> None:
    table, rows = torch.zeros(1000, 10), torch.tensor([1, 5])
    work = count_work(lambda: table.index_select(0, rows), HARDWARE)
    assert work.bytes == 2 * 8 + 2 * 2 * 10 * 4
    values = torch.ones(2, 10)
    work = count_work(lambda: table.index_copy_(0, rows, values), HARDWARE)
    assert work.bytes < table.nbytes / 10


def test_ops_are_limited_one_by_one() -> None:
    hardware = Hardware(fp32=1e3, bf16=None, bandwidth=1e3)
    square, vector = torch.ones(100, 100), torch.ones(1000)
    work = count_work(lambda: (square @ square, vector + 1), hardware)
    assert work.flop_seconds == 2e6 / 1e3
    assert work.attainable_seconds == 2e6 / 1e3 + 8000 / 1e3


def test_shares_are_bounds_over_seconds() -> None:
    work = Work(flops=10, bytes=20, flop_seconds=1.0, attainable_seconds=2.0)
    assert flop_share(work, 4.0) == 0.25
    assert roofline_share(work, 4.0) == 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_hardware_is_measured(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "SPAN", 0.0)
    hardware = measure_hardware(torch.device("cpu"), precision, sizes=(16, 32), copied=4096)
    assert (hardware.bf16 is not None) == (precision == "bf16")
    figures = [figure for figure in astuple(hardware) if figure is not None]
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)


def test_a_whole_step_is_counted() -> None:
    layer, x = nn.Linear(5, 7), torch.ones(3, 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(layer(x), torch.zeros(3, 7)).backward()
        optimizer.step()

    assert count_work(step, HARDWARE).flops == 2 * (2 * 3 * 5 * 7)
