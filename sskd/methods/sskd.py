"""SSKD: Xu, Liu, Li, Loy, "Knowledge Distillation Meets Self-Supervision", ECCV 2020.

Each image comes in four views, one normal and three rotated. A projection head on the
teacher learns, in a first phase, to tell which normal view each transformed view belongs
to (section 3.2); the student then learns the teacher's logits of both kinds of view and its
similarities between them, leaving out where the teacher is most wrong (section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.methods.adapters import ProjectionHead, probe_features
from sskd.methods.base import LossOutput, Method, Phase, in_float32, top1
from sskd.methods.kd import kd_loss, softened_kl
from sskd.schedule import PhaseSettings
from sskd.settings import Positive, Share

VIEWS = 4


@in_float32
def similarity(transformed: Tensor, normal: Tensor) -> Tensor:
    """Return the cosine of every transformed view to every normal view (equation 5).

    Args:
        transformed: [N, d], projections of the transformed views.
        normal: [B, d], projections of the normal views.

    Returns:
        [N, B], float32, in [-1, 1].
    """
    return F.normalize(transformed, dim=1) @ F.normalize(normal, dim=1).T


def keep_rows(scores: Tensor, target: Tensor, ratio: float) -> Tensor:
    """Return which rows the selective transfer keeps, without a copy to the host.

    Rows whose target has the largest score are right and all kept; of the wrong ones the
    ``floor(ratio * wrong)`` whose target ranks best are. A rank counts the strictly larger
    scores of the row; of equal ranks the earlier row goes first.

    Args:
        scores: [N, C], the teacher's.
        target: [N], int64, the true column of each row.
        ratio: share of the wrong rows to keep, 0 to 1.

    Returns:
        [N], bool.
    """
    rank = (scores > scores.gather(1, target[:, None])).sum(1)
    wrong = (rank > 0).sum()
    # float64 floors as Python does; Metal has none.
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    kept = len(rank) - wrong + (wrong.to(exact) * ratio).floor().long()
    place = torch.empty_like(rank)
    place[rank.argsort(stable=True)] = torch.arange(len(rank), device=rank.device)
    return place < kept


def masked_mean(rows: Tensor, keep: Tensor) -> Tensor:
    """Return the mean of ``rows`` [N] where ``keep`` [N] is true, or 0 where it nowhere is."""
    return torch.where(keep, rows, 0).sum() / keep.sum().clamp(min=1)


def split_views(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split [4B, ...], image by image, into the normal [B, ...] and transformed [3B, ...] views."""
    views = rows.unflatten(0, (-1, VIEWS))
    return views[:, 0], views[:, 1:].flatten(0, 1)


def positives(normal: Tensor) -> Tensor:
    """Return each of 3B transformed views' own column of B; ``normal`` is [B, ...]."""
    return torch.arange(len(normal), device=normal.device).repeat_interleave(VIEWS - 1)


class SSKD(Method):
    """Learn the teacher's logits and self-supervised similarities, selectively."""

    views = VIEWS
    terms = ("ce", "kd", "tf", "ss")
    teacher_outputs = ("logits", "pooled")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Images,
        *,
        temperature: Positive,
        ss_temperature: Positive,
        tf_ratio: Share,
        ss_ratio: Share,
        ss_head: PhaseSettings,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.temperature = temperature
        self.ss_temperature = ss_temperature
        self.tf_ratio = tf_ratio
        self.ss_ratio = ss_ratio
        self.phase = ss_head
        # The teacher's head comes first: its initial weights must not depend on the student.
        self.teacher_head = ProjectionHead(probe_features(teacher, data).pooled.shape[1])
        self.student_head = ProjectionHead(probe_features(student, data).pooled.shape[1])
        self.adapters = (self.student_head,)

    def phases(self) -> Iterable[Phase]:
        """Yield the teacher's head phase, one for all students, then the distillation."""
        yield Phase(
            "ss_head",
            self.teacher_head,
            self.head_loss,
            {"contrast": 1.0},
            views=self.views,
            schedule=self.phase,
            teacher_only=True,
        )
        yield from super().phases()

    def head_loss(self, batch: Batch) -> LossOutput:
        """Return ``contrast``: cross-entropy of the similarities against the own image."""
        scores = self._similarities(self.teacher_head, self.teacher_features(batch).pooled)
        own = positives(batch.y)
        return LossOutput(
            {"contrast": F.cross_entropy(scores, own)}, {"contrastive_top1": top1(scores, own)}
        )

    def loss(self, batch: Batch) -> LossOutput:
        """Return ``ce`` and ``kd`` of the normal views, ``tf`` and ``ss`` of the kept ones."""
        teacher = self.teacher_features(batch)
        with torch.no_grad():
            teacher_scores = self._similarities(self.teacher_head, teacher.pooled)
        student = self.student(batch.x)
        scores = self._similarities(self.student_head, student.pooled)
        own = positives(batch.y)

        normal, transformed = split_views(student.logits.float())
        teacher_normal, teacher_transformed = split_views(teacher.logits.float())
        truth = batch.y.repeat_interleave(VIEWS - 1)
        keep_tf = keep_rows(teacher_transformed, truth, self.tf_ratio)
        keep_ss = keep_rows(teacher_scores, own, self.ss_ratio)
        tf = softened_kl(transformed, teacher_transformed, self.temperature)
        ss = softened_kl(scores, teacher_scores, self.ss_temperature)
        terms = {
            "ce": F.cross_entropy(normal, batch.y),
            "kd": kd_loss(normal, teacher_normal, self.temperature),
            "tf": masked_mean(tf, keep_tf),
            "ss": masked_mean(ss, keep_ss),
        }
        metrics = {
            "top1": top1(normal, batch.y),
            "contrastive_top1": top1(scores, own),
            "kept_tf": 100 * keep_tf.float().mean(),
            "kept_ss": 100 * keep_ss.float().mean(),
        }
        return LossOutput(terms, metrics)

    def _similarities(self, head: nn.Module, pooled: Tensor) -> Tensor:
        normal, transformed = split_views(head(pooled))
        return similarity(transformed, normal)
