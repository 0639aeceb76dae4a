"""The network alone: cross-entropy with the labels."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F

from sskd.data import Batch
from sskd.methods.base import LossOutput, Method, Phase, top1


class Vanilla(Method):
    """Train the student without a teacher: a teacher-to-be, or a table's first row."""

    needs_teacher = False
    terms = ("ce",)
    evaluated_phase = "train"

    def phases(self) -> Iterable[Phase]:
        """Yield the one stage, named for what it is."""
        yield Phase("train", self.student, self.loss, self.weights)

    def loss(self, batch: Batch) -> LossOutput:
        """Return ``ce``."""
        logits = self.student(batch.x).logits.float()
        return LossOutput({"ce": F.cross_entropy(logits, batch.y)}, {"top1": top1(logits, batch.y)})
