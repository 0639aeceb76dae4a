"""The self-supervised tasks of SSKD (``method.task``): Xu et al., ECCV 2020, sections 3.2 and 6.3.

A task decides the views of an image, the head on the pooled feature, the scores that the head gives
a view, and which of them is right. In the contrastive task, SSKD's own, a view is matched to the
images of the batch. In the other three the head is a classifier: of rotations (Gidaris et al., ICLR
2018), of orders of patches (jigsaw; Noroozi and Favaro, ECCV 2016), or of the training images
themselves (exemplar; Dosovitskiy et al., NeurIPS 2014).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import CROPS, JIGSAWS, TRANSFORMATIONS, Batch, Images, Transformations, Views
from sskd.errors import UserError
from sskd.methods.adapters import ProjectionHead
from sskd.methods.base import in_float32

TaskName = Literal["contrastive", "rotation", "jigsaw", "exemplar"]
TransformationName = Literal["rotation", "pool", "colour_dropping", "crop_resize", "colour_jitter"]
VIEWS = 4
ROTATIONS = Views(VIEWS)
# The views of the contrastive task. ``rotation`` are those of the authors' code.
CONTRASTIVE_VIEWS: dict[str, Views] = {
    "rotation": ROTATIONS,
    "pool": Views(transformed=Transformations(tuple(TRANSFORMATIONS))),
    **{
        name: Views(transformed=Transformations((name,)))
        for name in ("colour_dropping", "crop_resize", "colour_jitter")
    },
}
EXEMPLAR_VIEWS = Views(
    transformed=Transformations(("crop_resize", "colour_jitter"), all_of_pool=True)
)


@in_float32
def similarity(transformed: Tensor, normal: Tensor) -> Tensor:
    """Return A, the cosine of each transformed view with each normal view (equation 5).

    Args:
        transformed: [N, d], projections of the transformed views.
        normal: [B, d], projections of the normal views.

    Returns:
        [N, B], float32, in [-1, 1].
    """
    return F.normalize(transformed, dim=1) @ F.normalize(normal, dim=1).T


def split_views(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split [4B, ...], image by image, into the normal [B, ...] and transformed [3B, ...] views."""
    views = rows.unflatten(0, (-1, VIEWS))
    return views[:, 0], views[:, 1:].flatten(0, 1)


def positives(normal: Tensor) -> Tensor:
    """Return the column of each transformed view's positive: the normal view of the same image.

    [3B], int64, for the rows of ``similarity``; ``normal`` is [B, ...].
    """
    return torch.arange(len(normal), device=normal.device).repeat_interleave(VIEWS - 1)


class Task(ABC):
    """A self-supervised task on the training images ``data``.

    Attributes:
        loss: the name of the head's loss in the first phase.
        views: four of each image, the first of them normal.

    Raises:
        UserError: the images are not suitable, or ``transformations`` has no effect.
    """

    loss: ClassVar[str]
    views: Views

    def __init__(self, data: Images, transformations: TransformationName) -> None:
        self.data = data

    @abstractmethod
    def head(self, width: int) -> nn.Module:
        """Return a new head on a pooled feature of this width."""

    @abstractmethod
    def scores(self, outputs: Tensor) -> Tensor:
        """Return the scores [N, C], float32, for the ``outputs`` [4B, d] of a head."""

    @abstractmethod
    def target(self, batch: Batch) -> Tensor:
        """Return the column of the right score in each row of ``scores``: [N], int64."""


class Contrastive(Task):
    """Find the normal view of the same image, for each transformed view."""

    loss = "contrast"

    def __init__(self, data: Images, transformations: TransformationName) -> None:
        super().__init__(data, transformations)
        self.views = CONTRASTIVE_VIEWS[transformations]

    def head(self, width: int) -> nn.Module:
        """Return a projection head."""
        return ProjectionHead(width)

    def scores(self, outputs: Tensor) -> Tensor:
        """Return ``similarity`` of the transformed to the normal views: [3B, B]."""
        normal, transformed = split_views(outputs)
        return similarity(transformed, normal)

    def target(self, batch: Batch) -> Tensor:
        """Return ``positives``."""
        return positives(batch.y)


class Classification(Task):
    """Classify each of the four views by a linear classifier with ``classes`` outputs."""

    classes: int

    def __init__(self, data: Images, transformations: TransformationName) -> None:
        super().__init__(data, transformations)
        if transformations != "rotation":
            raise UserError(
                f"method.transformations={transformations} has no effect, because method.task="
                f"{self.loss} has views of its own; remove it, or use method.task=contrastive"
            )

    def head(self, width: int) -> nn.Module:
        """Return a linear classifier."""
        return nn.Linear(width, self.classes)

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the logits [4B, classes]."""
        return outputs.float()

    def target(self, batch: Batch) -> Tensor:
        """Return how the pixels of a view are arranged: its rotation, or the order of patches."""
        return batch.crops // CROPS


class Rotation(Classification):
    """Predict the rotation of a view. The normal one has class 0."""

    loss = "rotation"
    views = ROTATIONS
    classes = VIEWS


class Jigsaw(Classification):
    """Predict the order of the 2 x 2 patches of a view. The normal one has class 0."""

    loss = "jigsaw"
    views = Views(jigsaws=VIEWS - 1)
    classes = len(JIGSAWS)

    def __init__(self, data: Images, transformations: TransformationName) -> None:
        super().__init__(data, transformations)
        if data.image_size % 2:
            raise UserError(
                f"method.task=jigsaw cuts an image into 2 x 2 equal patches, and a side has "
                f"{data.image_size} pixels; use an even dataset.size"
            )


class Exemplar(Classification):
    """Predict which training image a view is of. Each image is a class."""

    loss = "exemplar"
    views = EXEMPLAR_VIEWS

    def __init__(self, data: Images, transformations: TransformationName) -> None:
        super().__init__(data, transformations)
        self.classes = len(data.train)

    def target(self, batch: Batch) -> Tensor:
        """Return the position of each view's image in the training split."""
        return batch.indices.repeat_interleave(VIEWS)


TASKS: dict[TaskName, type[Task]] = {
    "contrastive": Contrastive,
    "rotation": Rotation,
    "jigsaw": Jigsaw,
    "exemplar": Exemplar,
}
