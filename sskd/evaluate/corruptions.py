"""CIFAR-10-C and CIFAR-100-C: the test set under 19 corruptions, each with 5 severities.

Hendrycks and Dietterich, *Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations*, ICLR 2019. A folder holds an array of images for each corruption, whose first fifth
has severity 1 and whose last fifth has severity 5, and the labels, which all of them share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO

import numpy as np
import torch

from sskd.data import LabelledImages, Split
from sskd.data.reading import abbreviate
from sskd.errors import UserError, one_line
from sskd.files import expanded, open_bounded

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur"),
    *("motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness", "contrast"),
    *("elastic_transform", "pixelate", "jpeg_compression"),
    # The four that the paper calls validation corruptions.
    *("speckle_noise", "gaussian_blur", "spatter", "saturate"),
)
SEVERITIES = 5
LABELS = "labels"
_MOST_HEADER = 2**12  # bytes of an array file beside its numbers; NumPy writes 128
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class Robustness:
    """Top-1 in percent on the corrupted images: the mean of all, and by corruption and severity."""

    mean_top1_percent: float
    top1_percent: dict[str, tuple[float, ...]]


class CorruptedImages:
    """The corrupted copies of ``test``, in the array files of ``folder``.

    The files are not trusted: they are read as numbers, and never unpickled.

    Raises:
        UserError: a file is missing, or is not the corrupted copy of these images.
    """

    def __init__(self, folder: str | Path, test: LabelledImages) -> None:
        self._folder, self._test = expanded(folder), test
        names = (*CORRUPTIONS, LABELS)
        missing = [f"{name}.npy" for name in names if not self._path(name).is_file()]
        if missing:
            raise UserError(
                f"--corruptions {folder}: has no {abbreviate(missing)}; name the folder of "
                "CIFAR-100-C or CIFAR-10-C with all 19 corruptions"
            )
        self._require_labels()
        for name in CORRUPTIONS:  # so that a wrong file is reported before hours of work
            with open_array(self._path(name), self._shape, "u") as (_, dtype):
                if dtype != np.uint8:
                    raise UserError(f"{self._path(name)}: holds {dtype} instead of uint8 pixels")

    @property
    def total(self) -> int:
        """The number of corrupted images."""
        return len(CORRUPTIONS) * SEVERITIES * len(self._test)

    def measure(self, top1: Callable[[Split, str], float]) -> Robustness:
        """Return the accuracies that ``top1`` returns, in percent.

        ``top1`` takes the images of a corruption and severity, and a name of them for its errors.
        """
        found = {
            name: tuple(
                top1(split, f"{name}, severity {severity}")
                for severity, split in enumerate(self.severities(name), 1)
            )
            for name in CORRUPTIONS
        }
        return Robustness(fmean(fmean(values) for values in found.values()), found)

    def severities(self, corruption: str) -> Iterator[Split]:
        """Yield the images of each severity from 1 to 5, on the device of the test images."""
        size = math.prod(self._shape) // SEVERITIES
        device = self._test.device
        with open_array(self._path(corruption), self._shape, "u") as (stream, _):
            for _ in range(SEVERITIES):
                pixels = torch.frombuffer(bytearray(stream.read(size)), dtype=torch.uint8)
                images = pixels.reshape(len(self._test), *self._shape[1:]).permute(0, 3, 1, 2)
                yield Split(images.contiguous().to(device), self._test.labels)

    @property
    def _shape(self) -> tuple[int, ...]:
        """The shape of an array of images: [5 * N, H, W, 3]."""
        return SEVERITIES * len(self._test), self._test.size, self._test.size, 3

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"

    def _require_labels(self) -> None:
        """Raise UserError if the labels are not those of the test images, in their order."""
        with open_array(self._path(LABELS), self._shape[:1], "iu") as (stream, dtype):
            found = np.frombuffer(stream.read(), dtype)
        expected = self._test.labels.cpu().repeat(SEVERITIES)
        if not np.array_equal(found, expected.numpy()):
            raise UserError(
                f"{self._path(LABELS)}: differs from the labels of the test set; name the folder "
                "of this dataset's corrupted test images"
            )


@contextmanager
def open_array(
    path: Path, shape: tuple[int, ...], kinds: str
) -> Iterator[tuple[BinaryIO, np.dtype[Any]]]:
    """Open an untrusted array file of NumPy; yield it at its first number, and the numbers' type.

    Args:
        shape: the shape that the array must have.
        kinds: the kinds of numbers that it may have: ``i`` signed, ``u`` unsigned integers.

    Raises:
        UserError: it is not a complete array of that kind and shape.
    """
    most = math.prod(shape) * 8 + _MOST_HEADER
    try:
        with open_bounded(path, most, follow=True) as (stream, status):
            read_header = _HEADERS.get(np.lib.format.read_magic(stream))
            if read_header is None:
                raise ValueError("it has an unknown version of NumPy's format")
            found, is_fortran, dtype = read_header(stream, max_header_size=_MOST_HEADER)
            if found != shape or is_fortran or dtype.kind not in kinds:
                order = "Fortran" if is_fortran else "C"
                raise ValueError(
                    f"it holds {dtype} of shape {list(found)} in {order} order, not integers of "
                    f"shape {list(shape)} in C order, as the test set's size requires"
                )
            if status.st_size != stream.tell() + math.prod(shape) * dtype.itemsize:
                raise ValueError("it is truncated, or has more bytes than its header says")
            yield stream, dtype
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
