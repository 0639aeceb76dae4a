"""The features that every network returns, and code that several families share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    defines what it is. ``last_map`` is the map ``[B, d, h, w]`` whose mean over the positions is
    ``pooled``; in some families layers lie between the last stage and it.
    """

    logits: Tensor
    pooled: Tensor
    stem: Tensor
    stages: tuple[Tensor, ...]
    preacts: tuple[Tensor, ...]
    last_map: Tensor


def partial_features(vectors: Mapping[str, Tensor]) -> Features:
    """Return features that hold only ``vectors``, one or both of the ``VECTOR_FIELDS``.

    The other vector, the stem and the last map are empty, of shape ``[0]``. There are no stages.
    """
    empty = next(iter(vectors.values())).new_empty(0)
    logits, pooled = (vectors.get(name, empty) for name in VECTOR_FIELDS)
    return Features(logits=logits, pooled=pooled, stem=empty, stages=(), preacts=(), last_map=empty)


def pool_and_classify(
    last_map: Tensor,
    classifier: nn.Module,
    *,
    stem: Tensor,
    stages: tuple[Tensor, ...],
    preacts: tuple[Tensor, ...],
) -> Features:
    """Return the features of a network whose ``classifier`` takes the mean of ``last_map``."""
    pooled = last_map.mean(dim=(2, 3))
    return Features(
        logits=classifier(pooled),
        pooled=pooled,
        stem=stem,
        stages=stages,
        preacts=preacts,
        last_map=last_map,
    )


def run_rectified_stage(blocks: Iterable[nn.Module], x: Tensor) -> tuple[Tensor, Tensor]:
    """Run blocks that end before their last ReLU; return the stage and its pre-activation.

    The ReLU is not in place, because the pre-activation is returned as well.
    """
    preact = x
    for block in blocks:
        preact = block(x)
        x = F.relu(preact)
    return x, preact


def run_rectified_stages(
    stages: Iterable[Iterable[nn.Module]], stem: Tensor, classifier: nn.Module
) -> Features:
    """Return the features of a network with ``stages`` that ``run_rectified_stage`` can run.

    ``stem`` is the input of the first stage, and ``classifier`` takes the mean of the last one.
    """
    maps, preacts, x = [], [], stem
    for blocks in stages:
        x, preact = run_rectified_stage(blocks, x)
        maps.append(x)
        preacts.append(preact)
    return pool_and_classify(x, classifier, stem=stem, stages=tuple(maps), preacts=tuple(preacts))


class RectifiedStage(nn.Sequential):
    """A stage of blocks that end before their last ReLU; its output is after that ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``input`` [B, c, h, w] to the stage's map."""
        return run_rectified_stage(self, input)[0]


class StagePlan(NamedTuple):
    """The arguments by which a family of networks builds one stage."""

    blocks: int
    in_channels: int
    out_channels: int
    stride: int


def rectified_stage(plan: StagePlan, block: Callable[[int, int, int], nn.Module]) -> RectifiedStage:
    """Return a stage of blocks that ``block`` builds of input channels, output channels, stride.

    The first block has the stride of ``plan``.
    """
    width = plan.out_channels
    first = block(plan.in_channels, width, plan.stride)
    return RectifiedStage(first, *(block(width, width, 1) for _ in range(plan.blocks - 1)))


def stages_behind(plan: Sequence[StagePlan], stage: int) -> list[StagePlan]:
    """Return the stages behind the first ``stage`` ones of ``plan``.

    Behind the last stage there are none. Then the result is one more like it, which keeps the size
    of the map and the number of channels.
    """
    last = plan[-1]
    return list(plan[stage:]) or [last._replace(in_channels=last.out_channels, stride=1)]


def build_branch(
    plan: Sequence[StagePlan], stage: int, build: Callable[[StagePlan], nn.Module]
) -> nn.Module:
    """Return new ``stages_behind`` the stage, with convolutions as ``initialise_convolutions``."""
    branch = nn.Sequential(*map(build, stages_behind(plan, stage)))
    initialise_convolutions(branch)
    return branch


def initialise_convolutions(model: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / (k * k * out_channels)), biases zero.

    This is the normal initialisation of He et al. (ICCV 2015) with the fan-out.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
