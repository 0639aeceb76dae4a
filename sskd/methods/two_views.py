"""Code shared by the methods that compare a weak and a strong view of each image."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sskd.data import Batch, StrongAugmentation, Views
from sskd.methods.base import LossOutput, Method, top1
from sskd.methods.logits import TRANSFORMS, LogitTransform
from sskd.methods.networks import Networks


class View(NamedTuple):
    """The logits of both networks for one view of each image of a batch, float32 [B, C].

    ``student`` and ``teacher`` are those of the networks; ``compared_student`` and
    ``compared_teacher`` are what they become before a divergence (``method.logits``).
    """

    student: Tensor
    teacher: Tensor
    compared_student: Tensor
    compared_teacher: Tensor


class TwoViews(Method):
    """Learn the labels of a weak and a strong view, beside terms that compare the networks.

    As in the authors' code of MLLD and CRLD, the student computes each view on its own: each has
    statistics of its own in BatchNorm, and the strong views count as much as the weak ones in the
    running statistics. A subclass computes the other terms (``view_terms``).
    """

    views = Views(strong=StrongAugmentation())
    teacher_outputs = ("logits",)

    def __init__(
        self, networks: Networks, *, logits: LogitTransform = "raw", **shared: Any
    ) -> None:
        super().__init__(networks, **shared)
        self.transform = TRANSFORMS[logits]

    def loss(self, batch: Batch) -> LossOutput:
        """Return ``ce``, the sum over both views, and the terms of ``view_terms``."""
        teachers = split_views(self.teacher_features(batch).logits.float())
        students = [self.student(x).logits.float() for x in split_views(batch.x)]
        weak, strong = (
            View(student, teacher, self.transform(student), self.transform(teacher))
            for student, teacher in zip(students, teachers, strict=True)
        )
        ce = F.cross_entropy(weak.student, batch.y) + F.cross_entropy(strong.student, batch.y)
        terms = {"ce": ce, **self.view_terms(weak, strong)}
        return LossOutput(terms, {"top1": top1(weak.student, batch.y)})

    @abstractmethod
    def view_terms(self, weak: View, strong: View) -> dict[str, Tensor]:
        """Return the terms that need the teacher."""


def split_views(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split [2B, ...], image by image, into the weak and the strong views, each [B, ...].

    Images stay channels last in memory, the layout that the networks take.
    """
    layout = torch.channels_last if rows.ndim == 4 else torch.contiguous_format
    weak, strong = (rows[place::2].contiguous(memory_format=layout) for place in (0, 1))
    return weak, strong
