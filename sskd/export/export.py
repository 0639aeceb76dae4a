"""Export a trained network in several formats, and run each file on the test images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sskd.export.agreement import compare, require_agreement, require_any_batch
from sskd.export.card import CARD, describe, render_card
from sskd.export.contents import Classifier, Contents
from sskd.export.formats import FORMATS, run_onnx
from sskd.export.placing import place, refuse_existing, staging
from sskd.export.quantise import IMAGES, write_int8
from sskd.export.subject import Subject
from sskd.files import write_text
from sskd.image_progress import ImageProgress
from sskd.models import fold_batch_norms
from sskd.output import say
from sskd.training.evaluation import predict


@dataclass(frozen=True)
class Choices:
    """How a network is exported.

    Attributes:
        formats: keys of ``FORMATS``.
        fold: fold the BatchNorms into the convolutions in front of them.
        int8: write the ONNX file in int8 too.
        force: move folders of earlier exports to ``.old``.
    """

    formats: Sequence[str]
    fold: bool = False
    int8: bool = False
    force: bool = False


def export(subject: Subject, out: Path, choices: Choices) -> list[Path]:
    """Export ``subject`` into one folder for each format in ``out``, and return those.

    Each file is written, run on the test images and compared. Then all folders appear.

    Raises:
        UserError: a folder exists, a format cannot hold the network, or a file does not compute
            what the network computes. Nothing has been written then.
    """
    folders = [out / name for name in choices.formats]
    refuse_existing(folders, CARD, force=choices.force)
    trained = subject.trained
    trained.require_own_classes()
    contents = _contents(subject, fold=choices.fold)
    title = f"{trained.path}: {contents.entry}"
    images = trained.images
    with ImageProgress(contents.entry, len(images.test)) as progress:
        expected = predict(trained.network, images.test, images, title, advance=progress.advance)
    with staging(out) as staged:
        for folder in folders:
            (staged / folder.name).mkdir()
            _write(staged / folder.name, contents, subject, expected=expected, int8=choices.int8)
        for folder in folders:
            place(staged / folder.name, folder)
    return folders


def _contents(subject: Subject, *, fold: bool) -> Contents:
    trained = subject.trained
    classifier = Classifier(trained.network, *trained.normalisation)
    count = classifier.batch_norms
    if fold:
        classifier = Classifier(fold_batch_norms(trained.network), *trained.normalisation)
        say(f"folded {count - classifier.batch_norms} of {count} BatchNorms")
    return Contents(
        classifier=classifier,
        original=trained.network,
        entry=subject.arch if subject.arch.isidentifier() else "network",
        size=trained.images.image_size,
        facts=describe(subject, classifier, folded=count - classifier.batch_norms),
    )


def _write(
    folder: Path, contents: Contents, subject: Subject, *, expected: Tensor, int8: bool
) -> None:
    """Fill ``folder``, named after its format, and print how its file agrees."""
    name, images = folder.name, subject.trained.images
    say(f"{name}: exporting ...")
    FORMATS[name].write(folder, contents)
    run = FORMATS[name].load(folder, contents)
    require_any_batch(run, expected, images.test, name)
    agreement = compare(run, expected, images.test, title=name)
    require_agreement(agreement, name)
    say(f"{name}: {agreement}")
    quantised = None
    if int8 and name == "onnx":
        quantised = _quantise(folder / FORMATS[name].file, subject, expected)
    write_text(folder / CARD, render_card(name, contents, agreement, quantised))


def _quantise(source: Path, subject: Subject, expected: Tensor) -> dict[str, Any]:
    """Write the file in int8, print what it costs, and return both."""
    images = subject.trained.images
    say("int8: calibrating ...")
    path = write_int8(source, images.train)
    agreement = compare(run_onnx(path), expected, images.test, title="int8")
    before, after = source.stat().st_size, path.stat().st_size
    say(f"int8: {agreement}; {before:,} -> {after:,} bytes")
    return {
        "file": path.name,
        "bytes": after,
        "bytes_float32": before,
        "calibration_images": min(IMAGES, len(images.train)),
        "agreement": asdict(agreement),
    }
