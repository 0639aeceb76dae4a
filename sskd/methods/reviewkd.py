"""ReviewKD: Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021.

Each map of the teacher guides the student's map at the same level and at all deeper levels: from
the deepest level to the first, the student's maps are fused, and each fused map learns the
teacher's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.methods.adapters import BatchNorm
from sskd.methods.base import in_float32
from sskd.methods.kd import Distillation, Outputs
from sskd.methods.networks import Networks
from sskd.settings import ShareOfAny, Width

POOLED_SIZES = (4, 2, 1)


@in_float32
def hcl_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Return the hierarchical context loss of two maps [B, c, h, h], a scalar, float32.

    It is the weighted mean of the mean squared differences of the maps and of the maps pooled to
    4x4, 2x2 and 1x1, if they are larger than that. Each weight is half the one before.
    """
    losses, weights = [F.mse_loss(student_map, teacher_map)], [1.0]
    for size in POOLED_SIZES:
        if size < student_map.shape[2]:
            difference = F.adaptive_avg_pool2d(student_map - teacher_map, size)
            losses.append(difference.square().mean())
            weights.append(weights[-1] / 2)
    weighted = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
    return torch.stack(weighted).sum() / sum(weights)


def resize(maps: Tensor, size: torch.Size) -> Tensor:
    """Return ``maps`` [B, c, h, w] with the height and width ``size``, by the nearest pixels."""
    return maps if maps.shape[2:] == size else F.interpolate(maps, size, mode="nearest")


class Fusion(nn.Module):
    """The attention based fusion (ABF) of one level.

    It fuses the student's map with the fused map of the next deeper level, if there is one, and
    maps the result to the teacher's channels. All fused maps have ``width`` channels.
    """

    def __init__(self, student: int, teacher: int, *, width: int, is_deepest: bool) -> None:
        super().__init__()
        reduction = nn.Conv2d(student, width, 1, bias=False)
        expansion = nn.Conv2d(width, teacher, 3, padding=1, bias=False)
        for convolution in (reduction, expansion):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.reduce = nn.Sequential(reduction, BatchNorm(width))
        self.expand = nn.Sequential(expansion, BatchNorm(teacher))
        self.attention: nn.Module | None = None
        if not is_deepest:
            self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())

    def forward(
        self, student_map: Tensor, deeper: Tensor | None, size: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """Return the fused map [B, width, *size], and its expansion to the teacher's channels.

        ``student_map`` is [B, c, h, w], ``deeper`` [B, width, ...], None at the deepest level.
        """
        fused = self.reduce(student_map)
        if self.attention is not None:
            assert deeper is not None
            deeper = resize(deeper, fused.shape[2:])
            own_share, deeper_share = self.attention(torch.cat([fused, deeper], 1)).split(1, dim=1)
            fused = own_share * fused + deeper_share * deeper
        fused = resize(fused, size)
        return fused, self.expand(fused)


def levels(maps: Iterable[Tensor], pooled: Tensor) -> list[Tensor]:
    """Return the ``maps`` of the stages and the ``pooled`` feature [B, d] as a map, deepest first.

    Each map is [B, c, h, w].
    """
    return [*maps, pooled[:, :, None, None]][::-1]


class ReviewKD(Distillation):
    """Fuse the student's maps from the deepest level on, and compare each with the teacher's."""

    terms = ("ce", "reviewkd")
    teacher_outputs = ("pooled", "preacts")

    def __init__(
        self, networks: Networks, *, largest_width: Width, warmup: ShareOfAny, **shared: Any
    ) -> None:
        super().__init__(networks, **shared)
        self.warmup = {"reviewkd": warmup}
        channels = [(own[0], target[0]) for own, target in networks.stage_shapes()]
        student, teacher = (features.pooled.shape[1] for features in networks.probe())
        width = min(largest_width, student)
        deepest = Fusion(student, teacher, width=width, is_deepest=True)
        others = (Fusion(*pair, width=width, is_deepest=False) for pair in reversed(channels))
        self.fusions = nn.ModuleList([deepest, *others])
        self.adapters = (self.fusions,)

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return ``reviewkd``, the sum over the levels."""
        student, teacher = outputs.student, outputs.teacher
        own = levels(student.stages, student.pooled)
        targets = levels(teacher.preacts, teacher.pooled)
        fused, losses = None, []
        for fusion, own_map, target in zip(self.fusions, own, targets, strict=True):
            fused, mapped = fusion(own_map, fused, target.shape[2:])
            losses.append(hcl_loss(mapped, target))
        return {"reviewkd": torch.stack(losses).sum()}
