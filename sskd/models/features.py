"""What every network returns, and what several families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

# The fields of Features that are vectors; all others are maps, which take far more memory.
VECTOR_FIELDS = ("logits", "pooled")


class Features(NamedTuple):
    """Everything that one forward pass of a network offers to a distillation method.

    ``logits`` is ``[B, classes]``, ``pooled`` the feature in front of the classifier,
    ``[B, d]``. ``stem`` and each of ``stages`` are maps ``[B, c, h, w]``; ``preacts[i]``
    has the shape of ``stages[i]`` and is its pre-activation, whose meaning each family
    states in its own module.
    """

    logits: Tensor
    pooled: Tensor
    stem: Tensor
    stages: tuple[Tensor, ...]
    preacts: tuple[Tensor, ...]


def partial_features(fields: Mapping[str, Tensor]) -> Features:
    """Return features of which nobody reads more than ``fields``; the others are None."""
    return Features(*(fields.get(name) for name in Features._fields))  # type: ignore[arg-type]


def run_rectified_stage(blocks: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run blocks that stop before their last ReLU; return the stage and its pre-activation.

    The ReLU is never in place, because the pre-activation is handed out as well.
    """
    preact = x
    for block in blocks:
        preact = block(x)
        x = F.relu(preact)
    return x, preact


def initialise_convolutions(model: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / (k * k * out_channels)), biases zero.

    This is the normal initialisation of He et al. (ICCV 2015) with the fan-out.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
