"""How similar a student is to its teacher on the test images of a dataset."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sskd.data import DatasetSettings, Images
from sskd.device import to_device
from sskd.errors import UserError
from sskd.measuring.datasets import normalised_for
from sskd.measuring.store import Key, pixels_key
from sskd.methods.networks import classifier_of
from sskd.models import weights_digest
from sskd.similarity.cka import BATCH_SIZE, linear_cka, minibatch_cka
from sskd.similarity.classifiers import correlation_difference
from sskd.trained import TrainedNetwork
from sskd.training.evaluation import Vectors, agreement, mean_kl, predict_vectors


@dataclass(frozen=True)
class Pair:
    """A student and its teacher."""

    student: TrainedNetwork
    teacher: TrainedNetwork

    def require_same_classes(self) -> None:
        """Raise UserError if the networks have different numbers of classes."""
        if self.student.classes != self.teacher.classes:
            raise UserError(
                f"{self.student.path} has {self.student.classes} classes, its teacher "
                f"{self.teacher.path} {self.teacher.classes}; name the teacher with --teacher FILE"
            )


def load_pairs(files: Sequence[tuple[Path, Path]], folders: Sequence[Path]) -> list[Pair]:
    """Return a pair for each student's and teacher's file; pairs of one teacher share it."""
    teachers = {path: TrainedNetwork(path, folders=folders) for _, path in files}
    return [
        Pair(TrainedNetwork(student, folders=folders), teachers[path]) for student, path in files
    ]


def measurement_key(pair: Pair, settings: DatasetSettings, images: Images) -> Key:
    """Return what decides the similarity of a pair: weights, normalisation and test images."""
    data = {**pixels_key(settings, images), "images": len(images.test)}
    return {
        "kind": "similarity",
        "student": weights_digest(pair.student.network),
        "teacher": weights_digest(pair.teacher.network),
        "normalisation": pair.student.normalisation,
        "data": data,
        "cka_batch": BATCH_SIZE,
    }


class TeacherOutputs:
    """The outputs of teachers for the test images, each computed once."""

    def __init__(self) -> None:
        self._found: dict[tuple[Path, Any], Vectors] = {}

    def of(self, pair: Pair, images: Images) -> Vectors:
        """Return the outputs of the pair's teacher for ``images``, which are normalised."""
        key = (pair.teacher.path, (images.mean, images.std))
        if key not in self._found:
            self._found[key] = _vectors(pair.teacher, images, f"teacher {pair.teacher.name}")
        return self._found[key]


def measure_similarity(
    pair: Pair, images: Images, title: str, teachers: TeacherOutputs
) -> dict[str, float]:
    """Return ``kl`` in nats, ``agreement`` in percent, ``cka`` and ``cka_minibatch``.

    A CKA for which there are too few images is left out. Both networks get the test images with
    the normalisation of the student's training.

    Args:
        images: on the device to compute on.
        title: names the student on the progress bar.
    """
    normalised = normalised_for(pair.student, images)
    student = _vectors(pair.student, normalised, title)
    teacher = teachers.of(pair, normalised)
    found = {
        "kl": mean_kl(student.logits, teacher.logits),
        "agreement": agreement(student.logits, teacher.logits),
        "cka": linear_cka(student.pooled, teacher.pooled),
        "cka_minibatch": minibatch_cka(student.pooled, teacher.pooled),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def weight_difference(pair: Pair, images: Images) -> Tensor | None:
    """Return ``correlation_difference`` of the classifiers ``[C, C]``; None without one of them."""
    try:
        weights = [
            classifier_of(each.network, images).weight.detach().cpu()
            for each in (pair.student, pair.teacher)
        ]
    except UserError:  # no single linear layer maps the pooled feature to the logits
        return None
    return correlation_difference(*weights)


def _vectors(trained: TrainedNetwork, images: Images, title: str) -> Vectors:
    to_device(trained.network, images.test.device)
    return predict_vectors(trained.network, images.test, images, title)
