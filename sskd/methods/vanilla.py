"""Vanilla: the student alone, trained by cross-entropy with the labels."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F

from sskd.data import Batch
from sskd.methods.base import LossOutput, Method, Phase, top1


class Vanilla(Method):
    """Train one network without a teacher: a future teacher, or the baseline of a table."""

    needs_teacher = False
    terms = ("ce",)
    evaluated_phase = "train"

    def phases(self) -> Iterable[Phase]:
        """Yield the only phase."""
        yield Phase(self.evaluated_phase, trains=self.student, loss=self.loss, weights=self.weights)

    def loss(self, batch: Batch) -> LossOutput:
        """Return ``ce``."""
        logits = self.student(batch.x).logits.float()
        return LossOutput({"ce": F.cross_entropy(logits, batch.y)}, {"top1": top1(logits, batch.y)})
