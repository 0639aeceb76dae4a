"""The evaluation of one trained network: everything that the report shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sskd.data import Images, LabelledImages
from sskd.device import choose_device, to_device, tune_device
from sskd.errors import UserError
from sskd.evaluate.calibration import Calibration, fit_temperature, measure_calibration
from sskd.evaluate.classification import (
    class_accuracies,
    confusion_matrix,
    frequent_confusions,
    wilson_interval,
)
from sskd.evaluate.corruptions import CorruptedImages, Robustness
from sskd.evaluate.cost import Cost, measure_cost
from sskd.image_progress import ImageProgress
from sskd.models import weights_digest
from sskd.seeding import seed_from_text
from sskd.trained import TrainedNetwork
from sskd.training.evaluation import accuracy, predict, top5_accuracy

MOST_CONFUSIONS = 20


@dataclass(frozen=True)
class Options:
    """How to evaluate.

    Attributes:
        device: as the setting ``device``.
        holdout: the share of each class's test images on which to fit the temperature if the run
            held out no images; None: fit none then.
        corruptions: the folder of the corrupted test images, if there is one.
        repeats: timed forward passes for each batch size; 0: no latency.
    """

    device: str = "auto"
    holdout: float | None = None
    corruptions: str | None = None
    repeats: int = 50


@dataclass(frozen=True)
class ClassAccuracy:
    """The accuracy on one class; None if it has no test images."""

    name: str
    images: int
    top1_percent: float | None


@dataclass(frozen=True)
class ClassConfusion:
    """Test images of the class ``label`` that were predicted as the class ``predicted``."""

    label: str
    predicted: str
    images: int
    percent_of_class: float


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Calibration before and after temperature scaling.

    ``images`` is the number of test images of the measurement. ``fitted_on`` describes the images
    of the fit, ``fitted_images`` is their number; both are None if nothing was fitted.
    ``temperature`` and ``after`` are None if there is no temperature; ``note`` then says why.
    """

    images: int
    before: Calibration
    temperature: float | None = None
    after: Calibration | None = None
    fitted_on: str | None = None
    fitted_images: int | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a network reaches on its test set, and what it costs.

    ``stated_top1_percent`` is what its file states. ``top1_interval_percent`` is the 95 % interval
    of the choice of the test images. ``top5_percent`` is None with few classes
    (``sskd.training.evaluation.top5_accuracy``).
    """

    file: str
    network: str
    dataset: str
    weights_sha256: str
    test_images: int
    top1_percent: float
    top1_interval_percent: tuple[float, float]
    top5_percent: float | None
    stated_top1_percent: float | None
    calibration: Scaling
    classes: tuple[ClassAccuracy, ...]
    confusions: tuple[ClassConfusion, ...]
    cost: Cost
    corruptions: Robustness | None

    def to_json(self) -> dict[str, Any]:
        """Return all figures as plain values; the units are in the names."""
        return asdict(self)


def evaluate(trained: TrainedNetwork, options: Options) -> Evaluation:
    """Measure everything about ``trained``.

    Raises:
        UserError: its dataset has other classes, the corrupted images are not those of its test
            set, or its logits are not finite.
    """
    trained.require_own_classes()
    refuse_second_holdout(trained, options)
    device = choose_device(options.device)
    tune_device(device)
    images, network = trained.images.to(device), trained.network
    to_device(network, device)
    corrupted = options.corruptions and CorruptedImages(options.corruptions, images.test)
    of = f"{trained.path}: {trained.name}, {images.name}"
    logits = _predict(trained, images.test, images, f"{of} test set")
    labels = images.test.labels
    top1 = accuracy(logits, labels)
    predicted = logits.argmax(1)
    matrix = confusion_matrix(predicted, labels, images.num_classes).cpu()
    return Evaluation(
        file=str(trained.path),
        network=trained.name,
        dataset=images.name,
        weights_sha256=weights_digest(network),
        test_images=len(labels),
        top1_percent=top1,
        top1_interval_percent=wilson_interval(top1, len(labels)),
        top5_percent=top5_accuracy(logits, labels),
        stated_top1_percent=trained.stated,
        calibration=_scale(trained, images, logits, options.holdout),
        classes=_classes(matrix, images.classes),
        confusions=_confusions(matrix, images.classes),
        cost=measure_cost(network, images.image_size, device, options.repeats),
        corruptions=_measure_corruptions(trained, images, corrupted) if corrupted else None,
    )


def refuse_second_holdout(trained: TrainedNetwork, options: Options) -> None:
    """Raise UserError if there are held-out images and test images are to be held out too."""
    if options.holdout is not None and trained.dataset.holdout > 0:
        raise UserError(
            f"{trained.path}: --holdout {options.holdout:g} is for networks without held-out "
            f"images, and this one has dataset.holdout={trained.dataset.holdout:g}; omit "
            "--holdout"
        )


def subject_of(trained: TrainedNetwork, options: Options) -> dict[str, Any]:
    """Return what an evaluation is of: the weights, the images, and the kind of its figures."""
    return {
        "weights_sha256": weights_digest(trained.network),
        "dataset": trained.dataset.name,
        "holdout": trained.dataset.holdout or options.holdout,
        "corruptions": options.corruptions is not None,
    }


def _predict(trained: TrainedNetwork, split: LabelledImages, images: Images, of: str) -> Tensor:
    with ImageProgress(of.removeprefix(f"{trained.path}: "), len(split)) as progress:
        return predict(trained.network, split, images, of, advance=progress.advance)


def _scale(trained: TrainedNetwork, images: Images, logits: Tensor, share: float | None) -> Scaling:
    """Return the calibration of the ``logits`` of the test images."""
    logits, labels = logits.cpu().double(), images.test.labels.cpu()
    if images.holdout is not None:
        of = f"{trained.path}: {trained.name}, {images.name} held-out images"
        held = _predict(trained, images.holdout, images, of).cpu(), images.holdout.labels.cpu()
        how = f"training images (dataset.holdout={trained.dataset.holdout:g})"
        by_run = trained.held_out_by_run
        how = f"held-out {how}" if by_run else f"{how}, which its training may have used"
        return _scaled((logits, labels), held, how)
    if share is not None:
        fits = split_by_class(labels, share)
        held = logits[fits], labels[fits]
        return _scaled((logits[~fits], labels[~fits]), held, "other test images")
    return Scaling(
        images=len(labels),
        before=measure_calibration(logits, labels),
        note="No temperature was fitted, because there are no held-out images. Train with "
        "dataset.holdout=0.1, or fit it on a part of the test images with --holdout 0.5.",
    )


def _scaled(test: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], fitted_on: str) -> Scaling:
    """Fit the temperature on the logits and labels ``held``, and measure on those of ``test``."""
    temperature = fit_temperature(*held)
    note = "No temperature between 0.001 and 1000 minimises the NLL of the images for the fit."
    return Scaling(
        images=len(test[1]),
        before=measure_calibration(*test),
        temperature=temperature,
        after=None if temperature is None else measure_calibration(*test, temperature),
        fitted_on=fitted_on,
        fitted_images=len(held[1]),
        note=note if temperature is None else None,
    )


def split_by_class(labels: Tensor, share: float) -> Tensor:
    """Return a mask [N] that selects ``share`` of the images of each class at random.

    The choice is always the same. At least one image of each class is left.

    Raises:
        UserError: no image is selected.
    """
    generator = torch.Generator().manual_seed(seed_from_text("evaluation holdout"))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        shuffled = members[torch.randperm(len(members), generator=generator)]
        chosen[shuffled[: min(round(share * len(members)), len(members) - 1)]] = True
    if not chosen.any():
        raise UserError(f"--holdout {share:g} selects no test image; give a larger share")
    return chosen


def _classes(matrix: Tensor, names: tuple[str, ...]) -> tuple[ClassAccuracy, ...]:
    found = zip(names, matrix.sum(1).tolist(), class_accuracies(matrix), strict=True)
    return tuple(ClassAccuracy(name, count, percent) for name, count, percent in found)


def _confusions(matrix: Tensor, names: tuple[str, ...]) -> tuple[ClassConfusion, ...]:
    return tuple(
        ClassConfusion(names[a], names[b], count, percent)
        for a, b, count, percent in frequent_confusions(matrix, MOST_CONFUSIONS)
    )


def _measure_corruptions(
    trained: TrainedNetwork, images: Images, corrupted: CorruptedImages
) -> Robustness:
    with ImageProgress(f"{trained.name}, corrupted images", corrupted.total) as progress:

        def top1(split: LabelledImages, name: str) -> float:
            of = f"{trained.path}: {trained.name}, {name}"
            logits = predict(trained.network, split, images, of, advance=progress.advance)
            return accuracy(logits, split.labels)

        return corrupted.measure(top1)
