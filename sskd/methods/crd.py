"""CRD: Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020.

Two banks keep the latest embedding of every training image, the student's and the teacher's.
Each network's embedding of an image has to tell the other network's embedding of the same image
from those of images of other classes (section 3 of the paper; the estimate of Gutmann &
Hyvärinen, AISTATS 2010).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.errors import UserError
from sskd.methods.adapters import probe_features
from sskd.methods.base import in_float32
from sskd.methods.kd import KD
from sskd.models import Features
from sskd.settings import EARLY, LARGEST, Count, Share, Width

EPS = 1e-7
# exp(1 / temperature), summed over the scores of a batch, stays far inside float32's range.
Temperature = Annotated[float, Field(ge=0.02, le=LARGEST, allow_inf_nan=False), EARLY]


def draw_negatives(labels: Tensor, own: Tensor, count: int) -> Tensor:
    """Draw ``count`` images of other classes for each sample, uniformly, none of them twice.

    Each sample has a draw of its own, on the labels' device, from its default generator.

    Args:
        labels: [n], the class of every training image.
        own: [B], the samples' own classes.
        count: at most as many as there are images of other classes.

    Returns:
        [B, count], positions in ``labels``, in no order.
    """
    # The images with the smallest of random keys, of 2^24 values, are a uniform draw without
    # replacement; only a tie for the last place (in 3 of 1000 rows) is settled by topk's order.
    keys = torch.empty(len(own), len(labels), device=labels.device).random_()
    keys.masked_fill_(labels == own[:, None], torch.inf)
    return keys.topk(count, largest=False, sorted=False).indices


@in_float32
def score(embedding: Tensor, bank: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Return ``exp(<embedding, bank row> / temperature)`` for the rows that ``index`` names.

    ``embedding`` is [B, d], ``bank`` [n, d], ``index`` [B, k]; returns [B, k], float32. One
    product with the whole bank and a choice of its entries: the rows themselves, [B, k, d],
    would take hundreds of times the memory.
    """
    return (embedding @ bank.T).gather(1, index).div(temperature).exp()


@in_float32
def nce_loss(scores: Tensor, num_data: int) -> Tensor:
    """Return how badly the positives are told from the negatives (equations 18 and 19).

    Args:
        scores: [B, 1 + m], normalised scores, the positive's first.
        num_data: n, the training images, which the noise is uniform over.

    Returns:
        ``-log(P / (P + m/n))`` of the positive and ``-log((m/n) / (P + m/n))`` of each
        negative, summed, averaged over the batch: a scalar, float32.
    """
    noise = (scores.shape[1] - 1) / num_data
    positive, negatives = scores[:, 0], scores[:, 1:]
    told = (positive / (positive + noise + EPS)).log()
    rejected = (noise / (negatives + noise + EPS)).log().sum(1)
    return -(told + rejected).mean()


class ContrastMemory(nn.Module):
    """One network's embedding, and a bank of its latest embedding of every training image.

    Buffers: ``bank`` [n, d]; ``normaliser``, Z of the scores of this network's embeddings,
    a constant that the first batch sets (0 until then, which no score is).
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
        """Embed [B, width] as unit rows [B, d], float32."""
        return F.normalize(self.linear(pooled).float(), dim=1)

    def contrast(
        self, embedding: Tensor, other: ContrastMemory, index: Tensor, temperature: float
    ) -> Tensor:
        """Return the loss of this network's embeddings against the other's bank."""
        scores = score(embedding, other.bank, index, temperature)
        with torch.no_grad():  # without asking the device which batch this is
            estimate = len(self.bank) * scores.mean()
            self.normaliser = torch.where(self.normaliser > 0, self.normaliser, estimate)
        return nce_loss(scores / self.normaliser, len(self.bank))

    @torch.no_grad()
    def update(self, embedding: Tensor, index: Tensor, momentum: float) -> None:
        """Move the rows ``index`` [B] of the bank towards ``embedding`` [B, d], at length 1.

        The bank is replaced, not written to: the backward pass still needs the old one.
        """
        rows = momentum * self.bank[index] + (1 - momentum) * embedding
        self.bank = self.bank.index_copy(0, index, F.normalize(rows, dim=1))


class CRD(KD):
    """Bring both networks' embeddings of an image together, and apart from other classes'."""

    terms = (*KD.terms, "crd")
    teacher_outputs = (*KD.teacher_outputs, "pooled")
    labels: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Images,
        *,
        dimension: Width,
        negatives: Count,
        contrast_temperature: Temperature,
        momentum: Share,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.contrast_temperature = contrast_temperature
        self.momentum = momentum
        self.register_buffer("labels", data.train.labels, persistent=False)
        others = len(self.labels) - int(self.labels.bincount().max())
        if others == 0:
            raise UserError("needs images of a second class, to draw its negatives from")
        self.negatives = min(negatives, others)
        ours, theirs = (probe_features(each, data).pooled.shape[1] for each in (student, teacher))
        self.student_memory = ContrastMemory(ours, dimension, len(self.labels))
        self.teacher_memory = ContrastMemory(theirs, dimension, len(self.labels))
        self.adapters = (self.student_memory, self.teacher_memory)

    def feature_terms(
        self, student: Features, teacher: Features, batch: Batch
    ) -> dict[str, Tensor]:
        """Return ``crd``, the sum of both directions; then renew the batch's rows of the banks."""
        ours, theirs = self.student_memory, self.teacher_memory
        embedding, target = ours(student.pooled), theirs(teacher.pooled)
        negatives = draw_negatives(self.labels, batch.y, self.negatives)
        index = torch.cat([batch.indices[:, None], negatives], dim=1)
        loss = ours.contrast(embedding, theirs, index, self.contrast_temperature)
        loss = loss + theirs.contrast(target, ours, index, self.contrast_temperature)
        ours.update(embedding, batch.indices, self.momentum)
        theirs.update(target, batch.indices, self.momentum)
        return {"crd": loss}
