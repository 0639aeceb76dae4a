"""CRD: Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020.

Two memory banks, one for each network, hold a running mean of the embeddings of every training
image.
Each network learns to distinguish the other network's embedding of the same image (the positive)
from those of images of other classes (N negatives), out of M training images: section 3 of the
paper, by the noise-contrastive estimate of Gutmann & Hyvärinen, AISTATS 2010.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sskd.distributed import ranks
from sskd.errors import UserError
from sskd.methods.base import in_float32
from sskd.methods.kd import KD, Outputs
from sskd.methods.networks import Networks
from sskd.settings import EARLY, LARGEST, Count, Share, Width

EPS = 1e-7
# From 0.02 on, the sum of exp(1 / temperature) over a batch's scores is far below float32's limit.
Temperature = Annotated[float, Field(ge=0.02, le=LARGEST, allow_inf_nan=False), EARLY]


def draw_negatives(labels: Tensor, classes: Tensor, count: int) -> Tensor:
    """Draw ``count`` images of other classes for each sample, uniformly and without replacement.

    The draws of the samples are independent. They come from the default generator of the labels'
    device.

    Args:
        labels: [M], the class of every training image.
        classes: [B], the class of each sample.
        count: N, at most the number of images of other classes.

    Returns:
        [B, N], positions in ``labels``, in no particular order.
    """
    # The images with the N smallest random keys. A key has 2^24 values; the choice is not uniform
    # only among images that tie for the last place, as happens in 3 of 1000 rows.
    keys = torch.empty(len(classes), len(labels), device=labels.device).random_()
    keys.masked_fill_(labels == classes[:, None], torch.inf)
    return keys.topk(count, largest=False, sorted=False).indices


@in_float32
def score(embedding: Tensor, bank: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Return ``exp(<embedding, bank row> / temperature)`` for the rows ``index`` of the bank.

    ``embedding`` is [B, d], ``bank`` [M, d], ``index`` [B, k]; returns [B, k], float32. It is
    gathered from the product with the whole bank: the gathered rows, [B, k, d], would need hundreds
    of times the memory.
    """
    return (embedding @ bank.T).gather(1, index).div(temperature).exp()


@in_float32
def nce_loss(scores: Tensor, num_data: int) -> Tensor:
    """Return ``-log h`` of the positives and ``-log(1 - h)`` of the negatives (equations 18, 19).

    ``h(T, S) = score / (score + N/M)`` estimates the probability that T and S are embeddings of
    the same image.

    Args:
        scores: [B, 1 + N], ``exp(<T, S> / temperature) / Z``, the positive's first.
        num_data: M, the number of training images.

    Returns:
        The sum over the positive and the negatives, averaged over the batch; a scalar, float32.
    """
    n_over_m = (scores.shape[1] - 1) / num_data
    positive, negatives = scores[:, 0], scores[:, 1:]
    log_h_positive = (positive / (positive + n_over_m + EPS)).log()
    log_1mh_negative = (n_over_m / (negatives + n_over_m + EPS)).log().sum(1)
    return -(log_h_positive + log_1mh_negative).mean()


class ContrastMemory(nn.Module):
    """One network's embedding layer, and a bank of running means, one for each training image.

    Buffers: ``bank`` [M, d], unit vectors after their first update; ``normaliser``, the constant Z
    by which the scores of this network's embeddings are divided. The first batch sets Z. A value
    of 0 means that Z is not set yet.
    """

    bank: Tensor
    normaliser: Tensor

    def __init__(self, width: int, dimension: int, num_data: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dimension)
        bound = (dimension / 3) ** -0.5
        self.register_buffer("bank", torch.empty(num_data, dimension).uniform_(-bound, bound))
        self.register_buffer("normaliser", torch.zeros(()))

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the embedding of [B, width]: unit vectors [B, d], float32."""
        return F.normalize(self.linear(pooled).float(), dim=1)

    def contrast(
        self, embedding: Tensor, other: ContrastMemory, index: Tensor, temperature: float
    ) -> Tensor:
        """Return the loss of this network's embeddings against the other network's bank, a scalar.

        ``embedding`` is [B, d]. ``index`` [B, 1 + N] holds the rows of the positive and of the N
        negatives in the bank of ``other``.
        """
        scores = score(embedding, other.bank, index, temperature)
        with torch.no_grad():  # torch.where, because an ``if`` would wait for the device
            estimate = len(self.bank) * scores.mean()
            ranks.average_([estimate])
            self.normaliser.copy_(torch.where(self.normaliser > 0, self.normaliser, estimate))
        return nce_loss(scores / self.normaliser, len(self.bank))

    @torch.no_grad()
    def update(self, embedding: Tensor, index: Tensor, momentum: float) -> None:
        """Move the rows ``index`` [B] of the bank towards ``embedding`` [B, d], and normalise them.

        If the batch has an image twice, its last embedding counts. Call this method after the
        backward pass, which needs the old rows.
        """
        # Both copies of an image write the same row, so that the order of the writes is irrelevant.
        positions = torch.arange(len(index), device=index.device)
        last = torch.where(index[:, None] == index, positions, -1).amax(1)
        rows = momentum * self.bank[index] + (1 - momentum) * embedding[last]
        self.bank.index_copy_(0, index, F.normalize(rows, dim=1))


class CRD(KD):
    """Contrast both networks' embeddings: of the same image, and of images of other classes."""

    terms = (*KD.terms, "crd")
    teacher_outputs = (*KD.teacher_outputs, "pooled")
    labels: Tensor

    def __init__(
        self,
        networks: Networks,
        *,
        dimension: Width,
        negatives: Count,
        contrast_temperature: Temperature,
        momentum: Share,
        **shared: Any,
    ) -> None:
        super().__init__(networks, **shared)
        self.contrast_temperature = contrast_temperature
        self.momentum = momentum
        self.register_buffer("labels", networks.data.train.labels, persistent=False)
        others = len(self.labels) - int(self.labels.bincount().max())
        if others == 0:
            raise UserError(
                "needs images of a second class, to draw its negatives from; use a dataset with at "
                "least two classes"
            )
        self.negatives = min(negatives, others)
        student, teacher = (features.pooled.shape[1] for features in networks.probe())
        self.student_memory = ContrastMemory(student, dimension, len(self.labels))
        self.teacher_memory = ContrastMemory(teacher, dimension, len(self.labels))
        self.adapters = (self.student_memory, self.teacher_memory)
        # Of the step that is being computed: embeddings [B, d] of both networks, images [B].
        self.latest: tuple[Tensor, Tensor, Tensor] | None = None

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return ``crd``, the sum of both directions."""
        batch, student, teacher = outputs.batch, self.student_memory, self.teacher_memory
        student_embedding = student(outputs.student.pooled)
        teacher_embedding = teacher(outputs.teacher.pooled)
        negatives = draw_negatives(self.labels, batch.y, self.negatives)
        index = torch.cat([batch.indices[:, None], negatives], dim=1)
        loss = student.contrast(student_embedding, teacher, index, self.contrast_temperature)
        loss = loss + teacher.contrast(teacher_embedding, student, index, self.contrast_temperature)
        self.latest = student_embedding.detach(), teacher_embedding.detach(), batch.indices
        return {"crd": loss}

    def after_step(self) -> None:
        """Update the batch's rows of the banks."""
        if self.latest is not None:
            # Of all ranks, so that their banks stay the same.
            student, teacher, indices = map(ranks.gather, self.latest)
            self.student_memory.update(student, indices, self.momentum)
            self.teacher_memory.update(teacher, indices, self.momentum)
            self.latest = None
