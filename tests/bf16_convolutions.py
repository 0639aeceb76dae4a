"""Convolutions in bf16 at the speed of float32, on a CPU that has no instructions for bf16.

PyTorch's own kernels are ten times slower there. Both add float32 products of bf16 numbers, and
round the sum to bf16; the order of the sum differs. Gradients are rounded to bf16 too, but those of
a layer that computes twice are added before. A test of PyTorch's bits uses the fixture
``pytorchs_convolutions`` (conftest.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sskd.precision import resolve_precision

_CPU = torch.device("cpu")
PYTORCHS = nn.Conv2d._conv_forward


def install() -> None:
    """Let the layers of this process compute so from now on, if the CPU lacks bf16."""
    if resolve_precision("auto", _CPU) == "fp32":
        nn.Conv2d._conv_forward = _convolve_rounded  # type: ignore[assignment, method-assign]


def _convolve_rounded(
    layer: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    if not _is_in_bf16(input):
        return PYTORCHS(layer, input, weight, bias)
    with torch.autocast("cpu", enabled=False):
        rounded_bias = None if bias is None else _rounded(bias)
        return PYTORCHS(layer, _rounded(input), _rounded(weight), rounded_bias).bfloat16()


def _is_in_bf16(input: Tensor) -> bool:
    return (
        isinstance(input, Tensor)  # a proxy while torch.fx traces
        and input.device == _CPU
        and torch.is_autocast_enabled("cpu")
    )


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()
