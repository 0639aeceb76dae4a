"""The features that every network returns, and code that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

# The fields of Features that are vectors. The others are maps, which take far more memory.
VECTOR_FIELDS = ("logits", "pooled")


class Features(NamedTuple):
    """The outputs of one forward pass that a distillation method can use.

    ``logits`` is ``[B, classes]``, ``pooled`` the feature in front of the classifier,
    ``[B, d]``. ``stem`` and each of ``stages`` are maps ``[B, c, h, w]``. ``preacts[i]``
    is the pre-activation of ``stages[i]`` and has its shape; the module of each family
    defines what it is.
    """

    logits: Tensor
    pooled: Tensor
    stem: Tensor
    stages: tuple[Tensor, ...]
    preacts: tuple[Tensor, ...]


def partial_features(vectors: Mapping[str, Tensor]) -> Features:
    """Return features that hold only ``vectors``, one or both of the ``VECTOR_FIELDS``.

    The other vector and the stem are empty, of shape ``[0]``, and there are no stages.
    """
    empty = next(iter(vectors.values())).new_empty(0)
    logits, pooled = (vectors.get(name, empty) for name in VECTOR_FIELDS)
    return Features(logits=logits, pooled=pooled, stem=empty, stages=(), preacts=())


def run_rectified_stage(blocks: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run blocks that end before their last ReLU; return the stage and its pre-activation.

    The ReLU is not in place, because the pre-activation is returned as well.
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
