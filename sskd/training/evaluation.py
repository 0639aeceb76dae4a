"""Accuracy on unaugmented images, and the agreement of a student with its teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Images, LabelledImages, eval_batches
from sskd.device import inference_batch_size
from sskd.distributed import ranks
from sskd.errors import NotFiniteError
from sskd.image_progress import ImageProgress
from sskd.precision import exact
from sskd.streams import wait_for

# With fewer classes, five guesses are right more than a quarter of the time.
FEWEST_CLASSES_FOR_TOP5 = 20


@torch.inference_mode()
def predict(
    network: nn.Module,
    split: LabelledImages,
    images: Images,
    of: str = "the network",
    *,
    advance: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Return ``network``'s logits [N, C] for the images of ``split``, unrotated and uncropped.

    Computed in eval mode and in float32 with TF32 off, whatever precision the network trains in.
    Each of several ranks computes a part and returns all of them. After each batch ``advance`` is
    called with its number of images.

    Raises:
        NotFiniteError: they are not finite; ``of`` names the network or the images in its message.
    """
    network.eval()
    device = split.device
    is_divided = 1 < ranks.count() <= len(split)
    part = split.take(ranks.part_of(len(split)).to(device)) if is_divided else split
    batches = eval_batches(part, images.mean, images.std, inference_batch_size(device))
    computed = []
    with exact(device):
        for x, _ in batches:
            computed.append(network(x).logits)
            advance(len(x))
    logits = torch.cat(computed)
    if is_divided:
        logits = ranks.gather_uneven(logits)
    wait_for(device)
    _require_finite(logits, "logits", of)
    return logits


class Vectors(NamedTuple):
    """The outputs of a network that are vectors: ``logits`` [N, C] and ``pooled`` [N, d]."""

    logits: Tensor
    pooled: Tensor


@torch.inference_mode()
def predict_vectors(network: nn.Module, split: LabelledImages, images: Images, of: str) -> Vectors:
    """Return logits and pooled features on the CPU; precision and errors are as in ``predict``.

    Unlike in ``predict``, each of several ranks computes all images.

    ``of`` is also the title of the progress.
    """
    network.eval()
    device = split.device
    batches = eval_batches(split, images.mean, images.std, inference_batch_size(device))
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    with exact(device), ImageProgress(of, len(split)) as progress:
        for x, _ in batches:
            features = network(x)
            found[0].append(features.logits.cpu())
            found[1].append(features.pooled.cpu())
            progress.advance(len(x))
    vectors = Vectors(*map(torch.cat, found))
    for name, rows in vectors._asdict().items():
        _require_finite(rows, name, of)
    return vectors


def _require_finite(rows: Tensor, name: str, of: str) -> None:
    """Raise NotFiniteError if ``rows`` [N, K], the ``name`` of the network, are not finite."""
    non_finite = (~rows.isfinite()).any(1)
    if non_finite.any():
        first = int(non_finite.int().argmax())
        raise NotFiniteError(
            f"{of}: the {name} of image {first} of {len(rows)} (counting from 0) are not finite"
            f"{_and_others(int(non_finite.sum()) - 1)}"
        )


def _and_others(count: int) -> str:
    images = "image" if count == 1 else "images"
    return f", and those of {count} other {images}" if count else ""


def evaluate_epoch(network: nn.Module, images: Images) -> dict[str, float]:
    """Return ``test/top1`` and, if there are held-out images, ``holdout/top1``, in percent.

    With at least ``FEWEST_CLASSES_FOR_TOP5`` classes, ``test/top5`` and ``holdout/top5`` too.

    Raises:
        NotFiniteError: logits are not finite.
    """
    accuracies = {}
    for name, split in (("test", images.test), ("holdout", images.holdout)):
        if split is not None:
            logits = predict(network, split, images, f"{name} set")
            accuracies[f"{name}/top1"] = accuracy(logits, split.labels)
            if (top5 := top5_accuracy(logits, split.labels)) is not None:
                accuracies[f"{name}/top5"] = top5
    return accuracies


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in percent of ``logits`` [N, C] for ``labels`` [N]."""
    return 100 * (logits.argmax(1) == labels).sum().item() / len(labels)


def top_k(logits: Tensor, labels: Tensor, k: int) -> float:
    """Return how often, in percent, a label [N] is one of the ``k`` largest logits [N, C]."""
    found = logits.topk(k, dim=1).indices == labels[:, None]
    return 100 * found.any(1).sum().item() / len(labels)


def top5_accuracy(logits: Tensor, labels: Tensor) -> float | None:
    """Return the top-5 accuracy in percent of ``logits`` [N, C] for ``labels`` [N].

    It is None with fewer classes C than ``FEWEST_CLASSES_FOR_TOP5``.
    """
    return top_k(logits, labels, 5) if logits.shape[1] >= FEWEST_CLASSES_FOR_TOP5 else None


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """Return the percentage of rows [N, C] on which student and teacher predict the same class."""
    return accuracy(student_logits, teacher_logits.argmax(1))


def mean_kl(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """Return the mean over rows [N, C] of ``KL(softmax(teacher) || softmax(student))``, in nats."""
    student = F.log_softmax(student_logits.cpu().double(), dim=1)
    teacher = F.log_softmax(teacher_logits.cpu().double(), dim=1)
    mean = F.kl_div(student, teacher, reduction="batchmean", log_target=True).item()
    return max(mean, 0.0)  # rounding can give -1e-17 for equal predictions
