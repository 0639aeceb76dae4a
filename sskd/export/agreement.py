"""Whether an exported file computes what its network computes, on the test images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sskd.data import LabelledImages
from sskd.device import inference_batch_size
from sskd.errors import UserError
from sskd.export.formats import Run
from sskd.image_progress import ImageProgress
from sskd.training.evaluation import accuracy

# The largest difference that rounding may make, relative to the largest logit. Networks of the
# suite show some 1e-6; a wrong normalisation or layer makes 1e-2 and more.
TOLERANCE = 1e-4
_SIZES = (1, 7)  # of batches that are compared beside those of the whole test set


@dataclass(frozen=True)
class Agreement:
    """What a file computes on the test images beside its network.

    Attributes:
        images: their number.
        difference: the largest one between two logits.
        largest: the network's largest logit, absolute.
        changed: the images for which another class is predicted.
        top1: of the file in percent; ``network_top1`` of the network.
    """

    images: int
    difference: float
    largest: float
    changed: int
    top1: float
    network_top1: float

    def __str__(self) -> str:
        return (
            f"top-1 {self.top1:.2f} (network {self.network_top1:.2f}), largest difference "
            f"{self.difference:.1e} of logits up to {self.largest:.1f}, {self.changed} of "
            f"{self.images} predictions differ"
        )


def compare(run: Run, expected: Tensor, split: LabelledImages, *, title: str) -> Agreement:
    """Compare the logits of ``run`` with the ``expected`` ones [N, C] for the images of ``split``.

    ``title`` is that of the progress.
    """
    found = _predict(run, split, title)
    return Agreement(
        images=len(split),
        difference=(found - expected).abs().max().item(),
        largest=expected.abs().max().item(),
        changed=int((found.argmax(1) != expected.argmax(1)).sum()),
        top1=accuracy(found, split.labels),
        network_top1=accuracy(expected, split.labels),
    )


def require_agreement(agreement: Agreement, of: str) -> None:
    """Raise UserError if the logits differ by more than rounding; ``of`` names the file.

    Within the tolerance, predictions can differ only where two logits are as close to each other.
    """
    if not agreement.difference <= TOLERANCE * agreement.largest:  # NaN too
        raise UserError(
            f"{of} does not compute what the network computes ({agreement}); nothing was written: "
            "choose another format with --to"
        )


def require_any_batch(run: Run, expected: Tensor, split: LabelledImages, of: str) -> None:
    """Raise UserError if small batches of ``split`` fail or give other logits; as above."""
    for size in _SIZES:
        images = to_unit_range(split.take(torch.arange(min(size, len(split)))).images)
        try:
            with torch.no_grad():
                difference = (run(images) - expected[: len(images)]).abs().max().item()
        except Exception as error:  # of any runtime
            raise UserError(
                f"{of} does not run with a batch of {size} ({type(error).__name__}); nothing was "
                "written: the network's forward must not depend on the size of the batch"
            ) from error
        if not difference <= TOLERANCE * expected.abs().max().item():
            raise UserError(
                f"{of} computes something else in a batch of {size}; nothing was written: the "
                "network's forward must not depend on the other images of a batch"
            )


def to_unit_range(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1], the input of every exported file."""
    return images.float() / 255


@torch.no_grad()
def _predict(run: Run, split: LabelledImages, title: str) -> Tensor:
    """Return the logits of ``run``."""
    batches = split.pixel_batches(inference_batch_size(split.device))
    with ImageProgress(title, len(split)) as progress:
        logits = []
        for batch, _ in batches:
            logits.append(run(to_unit_range(batch)))
            progress.advance(len(batch))
    return torch.cat(logits)
