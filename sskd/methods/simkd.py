"""SimKD: Chen, Mei, Zhang, Wang, Feng, Chen, "Knowledge Distillation with the Reused Teacher
Classifier", CVPR 2022.

The student's map is the one that its pooled feature is the mean of. The authors' code takes that of
the last stage, which MobileNetV2 and ShuffleV2 have in front of their last 1x1 convolution.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Batch
from sskd.methods.adapters import pool_to_smaller
from sskd.methods.base import LossOutput, Method, in_float32, top1
from sskd.methods.networks import Networks, classifier_of
from sskd.models import Features
from sskd.settings import Count


@in_float32
def simkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of two maps [B, d, h, w], a scalar.

    The larger one is pooled: the teacher's, since the projector pools the student's.
    """
    return F.mse_loss(*pool_to_smaller(student, teacher))


class Projector(nn.Module):
    """Maps the student's last map to the teacher's channels, at most at the teacher's size."""

    def __init__(self, student: Tensor, teacher: Tensor, reduction: int) -> None:
        super().__init__()
        channels, narrow = teacher.shape[1], max(1, teacher.shape[1] // reduction)
        self.most = teacher.shape[2:]  # of the height and the width
        self.layers = nn.Sequential(
            nn.Conv2d(student.shape[1], narrow, 1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, narrow, 3, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, last_map: Tensor) -> Tensor:
        """Map [B, c, h, w] to [B, d, h', w']."""
        (height, width), (most_height, most_width) = last_map.shape[2:], self.most
        size = min(height, most_height), min(width, most_width)
        projected: Tensor = self.layers(F.adaptive_avg_pool2d(last_map, size))
        return projected


class ReusedClassifier(nn.Module):
    """The deployed network: the student's body, the projector and the teacher's classifier."""

    def __init__(self, body: nn.Module, projector: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.body, self.projector, self.classifier = body, projector, classifier

    def forward(self, x: Tensor) -> Features:
        """Map images [B, 3, h, w] to the features of the student, with the projected last map."""
        features: Features = self.body(x)
        projected = self.projector(features.last_map)
        pooled = projected.mean(dim=(2, 3))
        logits = self.classifier(pooled)
        return features._replace(logits=logits, pooled=pooled, last_map=projected)


class SimKD(Method):
    """Match the teacher's last map alone, and predict with the teacher's classifier.

    The labels are not used. The student's own classifier is removed.
    """

    terms = ("simkd",)
    teacher_outputs = ("last_map",)

    def __init__(self, networks: Networks, *, reduction: Count, **shared: Any) -> None:
        super().__init__(networks, **shared)
        student, teacher = (features.last_map for features in networks.probe())
        _remove(classifier_of(self.student, networks.data), self.student)
        self.projector = Projector(student, teacher, reduction)
        self.adapters = (self.projector,)
        classifier = classifier_of(self.teacher, networks.data)
        # A tuple does not register it as a submodule, so checkpoints store its parts only once.
        self._deployed = (ReusedClassifier(self.student, self.projector, classifier),)

    @property
    def deployed(self) -> nn.Module:
        """The student's body, the projector and the teacher's classifier."""
        return self._deployed[0]

    def loss(self, batch: Batch) -> LossOutput:
        """Return ``simkd``."""
        target = self.teacher_features(batch).last_map
        features = self.deployed(batch.x)
        terms = {"simkd": simkd_loss(features.last_map, target)}
        return LossOutput(terms, {"top1": top1(features.logits, batch.y)})


def _remove(layer: nn.Module, network: nn.Module) -> None:
    (name,) = (name for name, module in network.named_modules() if module is layer)
    network.set_submodule(name, nn.Identity())
