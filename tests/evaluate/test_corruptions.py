"""Corrupted test images in arrays as CIFAR-100-C has them, and untrusted ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sskd.data import Split
from sskd.errors import UserError
from sskd.evaluate.corruptions import CORRUPTIONS, CorruptedImages

COUNT, SIZE = 4, 8


@pytest.fixture
def test_images() -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(200, (COUNT, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return Split(images, torch.tensor([2, 0, 1, 2]))


@pytest.fixture
def folder(tmp_path: Path, test_images: Split) -> Path:
    """Corruption k at severity s adds k + s to each pixel."""
    pixels = test_images.images.permute(0, 2, 3, 1).numpy()
    for number, name in enumerate(CORRUPTIONS):
        parts = [pixels + np.uint8(number + severity) for severity in range(1, 6)]
        np.save(tmp_path / f"{name}.npy", np.concatenate(parts))
    labels = np.tile(test_images.labels.numpy(), 5).astype(np.uint8)
    np.save(tmp_path / "labels.npy", labels)
    return tmp_path


def test_each_severity_has_its_images(folder: Path, test_images: Split) -> None:
    corrupted = CorruptedImages(folder, test_images)
    assert corrupted.total == 19 * 5 * COUNT
    for number in (0, 18):
        for severity, split in enumerate(corrupted.severities(CORRUPTIONS[number]), 1):
            assert torch.equal(split.images, test_images.images + (number + severity))
            assert torch.equal(split.labels, test_images.labels)


def test_the_mean_is_over_corruptions_and_severities(folder: Path, test_images: Split) -> None:
    names = []

    def top1(split: Split, name: str) -> float:
        names.append(name)
        return float((split.images.int() - test_images.images.int()).unique())

    found = CorruptedImages(folder, test_images).measure(top1)
    assert names[:6:5] == ["gaussian_noise, severity 1", "shot_noise, severity 1"]
    assert list(found.top1_percent) == list(CORRUPTIONS)
    assert list(found.top1_percent["shot_noise"]) == [2, 3, 4, 5, 6]
    assert found.mean_top1_percent == pytest.approx(9 + 3)


def replaced(name: str, array: Any, **how: Any) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / f"{name}.npy", array, **how)


def cut(folder: Path) -> None:
    path = folder / "fog.npy"
    path.write_bytes(path.read_bytes()[:-1])


def with_huge_shape(folder: Path) -> None:
    path = folder / "fog.npy"
    path.write_bytes(path.read_bytes().replace(b"(20, 8, 8, 3)", b"(2**60,)     ")[:200])


PIXELS = np.zeros((5 * COUNT, SIZE, SIZE, 3), np.uint8)
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no file": (lambda folder: (folder / "fog.npy").unlink(), "has no fog.npy; name the folder of"),
    "no labels": (lambda folder: (folder / "labels.npy").unlink(), "has no labels.npy; name"),
    "objects": (
        replaced("fog", np.array([print] * 3, dtype=object), allow_pickle=True),
        "fog.npy: it holds object of shape [3]",
    ),
    "unpickled labels": (
        replaced("labels", np.array([print] * 20, dtype=object), allow_pickle=True),
        "labels.npy: it holds object of shape [20]",
    ),
    "another size": (
        replaced("fog", PIXELS[:-1]),
        "fog.npy: it holds uint8 of shape [19, 8, 8, 3]",
    ),
    "other numbers": (replaced("fog", PIXELS.astype(np.uint16)), "fog.npy: holds uint16"),
    "fractions": (replaced("fog", PIXELS.astype(np.float32)), "fog.npy: it holds float32"),
    "Fortran": (replaced("fog", np.asfortranarray(PIXELS)), "in Fortran order, not integers"),
    "cut": (cut, "fog.npy: it is truncated"),
    "a huge shape": (with_huge_shape, "fog.npy: "),
    "text": (lambda folder: (folder / "fog.npy").write_text("fog"), "fog.npy: "),
    "other labels": (replaced("labels", np.zeros(20, np.int64)), "labels.npy: differs from the"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_another_file_is_refused_in_one_line(folder: Path, test_images: Split, kind: str) -> None:
    change, message = BROKEN[kind]
    change(folder)
    with pytest.raises(UserError) as error:
        CorruptedImages(folder, test_images)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_large_file_is_not_read(
    folder: Path, test_images: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (folder / "fog.npy").open("ab") as stream:
        stream.truncate(2**34)
    with pytest.raises(UserError, match=r"fog.npy: it has more than \d+ bytes"):
        CorruptedImages(folder, test_images)
