"""SSKD: Xu, Liu, Li, Loy, "Knowledge Distillation Meets Self-Supervision", ECCV 2020.

Each image comes in four views, one normal and three transformed (rotated). In a first phase a
projection head on the teacher learns to match each transformed view to the normal view of the same
image (section 3.2), or another self-supervised task (``sskd.methods.tasks``). Then the student
learns the teacher's predictions for both kinds of view and the teacher's scores in the task,
without those on which the teacher is most wrong (section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Batch
from sskd.methods.base import LossOutput, Method, Phase, top1
from sskd.methods.kd import softened_kl
from sskd.methods.logits import TRANSFORMS, LogitTransform
from sskd.methods.networks import Networks
from sskd.methods.tasks import ROTATIONS, TASKS, VIEWS, TaskName, TransformationName, split_views
from sskd.schedule import PhaseSettings
from sskd.settings import Positive, Share


def keep_rows(scores: Tensor, target: Tensor, ratio: float) -> Tensor:
    """Return which rows the selective transfer keeps; the result stays on the device.

    The rank of a row's target is the number of strictly larger scores in the row. All rows of rank
    0, which are right, are kept. Of the wrong rows, ``floor(ratio * wrong)`` are kept, by
    increasing rank; among equal ranks, the earlier rows.

    Args:
        scores: [N, C], the teacher's.
        target: [N], int64, the true column of each row.
        ratio: the share of the wrong rows to keep, 0 to 1.

    Returns:
        [N], bool.
    """
    rank = (scores > scores.gather(1, target[:, None])).sum(1)
    wrong = (rank > 0).sum()
    # In float64, as Python computes the floor. Metal has no float64.
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    kept = len(rank) - wrong + (wrong.to(exact) * ratio).floor().long()
    place = torch.empty_like(rank)
    place[rank.argsort(stable=True)] = torch.arange(len(rank), device=rank.device)
    return place < kept


def masked_mean(rows: Tensor, keep: Tensor) -> Tensor:
    """Return the mean of the ``rows`` [N] that ``keep`` [N] selects, or 0 if it selects none."""
    return torch.where(keep, rows, 0).sum() / keep.sum().clamp(min=1)


class SSKD(Method):
    """Learn the teacher's predictions and its scores in a self-supervised task, selectively.

    Of the paper's losses, ``tf`` is L_T, whose temperature tau is ``temperature``, and ``ss`` is
    L_ss, whose tau is ``ss_temperature``.
    """

    views = ROTATIONS  # of the default task; each task has its own
    terms = ("ce", "kd", "tf", "ss")
    teacher_outputs = ("logits", "pooled")

    def __init__(
        self,
        networks: Networks,
        *,
        temperature: Positive,
        ss_temperature: Positive,
        tf_ratio: Share,
        ss_ratio: Share,
        ss_head: PhaseSettings,
        logits: LogitTransform = "raw",
        task: TaskName = "contrastive",
        transformations: TransformationName = "rotation",
        **shared: Any,
    ) -> None:
        super().__init__(networks, **shared)
        self.temperature = temperature
        self.ss_temperature = ss_temperature
        self.tf_ratio = tf_ratio
        self.ss_ratio = ss_ratio
        self.phase_settings = ss_head
        self.transform = TRANSFORMS[logits]
        self.task = TASKS[task](networks.data, transformations)
        self.views = self.task.views
        self.accuracy = f"{task}_top1"
        student, teacher = (features.pooled.shape[1] for features in networks.probe())
        # The teacher's head comes first: its initial weights must not depend on the student.
        self.teacher_head = self.task.head(teacher)
        self.student_head = self.task.head(student)
        self.adapters = (self.student_head,)

    def phases(self) -> Iterable[Phase]:
        """Yield the phase of the teacher's head, which all students share, then the main phase."""
        yield Phase(
            "ss_head",
            trains=self.teacher_head,
            loss=self.head_loss,
            weights={self.task.loss: 1.0},
            views=self.views,
            schedule=self.phase_settings,
            teacher_only=True,
        )
        yield from super().phases()

    def head_loss(self, batch: Batch) -> LossOutput:
        """Return the loss of the task: the cross-entropy of the teacher's scores."""
        scores = self._scores(self.teacher_head, self.teacher_features(batch).pooled)
        target = self.task.target(self._whole_batch(batch))
        loss = F.cross_entropy(scores, target)
        return LossOutput({self.task.loss: loss}, {self.accuracy: top1(scores, target)})

    def loss(self, batch: Batch) -> LossOutput:
        """Return ``ce`` and ``kd`` of the normal views, ``tf`` and ``ss`` of the kept rows."""
        teacher = self.teacher_features(batch)
        with torch.no_grad():
            teacher_scores = self._scores(self.teacher_head, teacher.pooled)
        student = self.student(batch.x)
        scores = self._scores(self.student_head, student.pooled)
        batch = self._whole_batch(batch)
        target = self.task.target(batch)

        student_logits, teacher_logits = self.whole(student.logits.float(), teacher.logits.float())
        normal, _ = split_views(student_logits)
        _, teacher_transformed = split_views(teacher_logits)
        labels = batch.y.repeat_interleave(VIEWS - 1)
        keep_tf = keep_rows(teacher_transformed, labels, self.tf_ratio)
        keep_ss = keep_rows(teacher_scores, target, self.ss_ratio)
        compared = self.transform(student_logits), self.transform(teacher_logits)
        kd, tf = split_views(softened_kl(*compared, self.temperature))
        ss = softened_kl(scores, teacher_scores, self.ss_temperature)
        terms = {
            "ce": F.cross_entropy(normal, batch.y),
            "kd": kd.mean(),
            "tf": masked_mean(tf, keep_tf),
            "ss": masked_mean(ss, keep_ss),
        }
        metrics = {
            "top1": top1(normal, batch.y),
            self.accuracy: top1(scores, target),
            "kept_tf": 100 * keep_tf.float().mean(),
            "kept_ss": 100 * keep_ss.float().mean(),
        }
        return LossOutput(terms, metrics)

    def _scores(self, head: nn.Module, pooled: Tensor) -> Tensor:
        return self.task.scores(*self.whole(head(pooled)))

    def _whole_batch(self, batch: Batch) -> Batch:
        """Return ``batch`` with the labels, indices and crops that belong to ``whole`` rows."""
        return Batch(batch.x, *self.whole(batch.y, batch.indices, batch.crops))
