"""A teacher's outputs in a file, which ``sskd.teachers.precompute`` writes: layout and rows."""

from __future__ import annotations

import gc
import hashlib
import mmap
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sskd.data import CROPS, Batch, Images
from sskd.errors import UserError
from sskd.files import path_in_errors
from sskd.methods import Method
from sskd.methods.networks import probe_features
from sskd.models import VECTOR_FIELDS, Features, partial_features
from sskd.teachers.shared import corrupt_file_error

MEMORY_ERROR = "out of memory"  # of PyTorch, on any device


@dataclass(frozen=True)
class Layout:
    """The content of the file: fields of Features of these ``widths``, for all crops of images."""

    images: int
    crops: int
    widths: dict[str, int]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Images, crops of an image, numbers of a crop."""
        return self.images, self.crops, sum(self.widths.values())

    @property
    def image_size(self) -> int:
        """Bytes of the outputs of one image."""
        _, crops, width = self.shape
        return crops * width * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes of all outputs."""
        return self.images * self.image_size


@dataclass(frozen=True)
class Precomputed:
    """Looks up a teacher's outputs in ``rows`` [images, crops, numbers] on the images' device."""

    rows: Tensor
    widths: dict[str, int]

    def __call__(self, batch: Batch) -> Features:
        """Return the teacher's features of ``batch``; fields that the file lacks are empty."""
        first = batch.indices[:, None] * self.rows.shape[1]
        positions = (first + batch.crops.view(len(batch.indices), -1)).flatten()
        rows = self.rows.flatten(0, 1).index_select(0, positions)
        parts = rows.split(list(self.widths.values()), dim=1)
        return partial_features(dict(zip(self.widths, parts, strict=True)))


def can_precompute(method: Method | type[Method]) -> bool:
    """Return whether ``method`` reads only fields of the teacher that fit on a disk.

    There are too many views other than rotations to store.
    """
    read = set(method.teacher_outputs)
    return method.views.are_rotations and set() < read <= set(VECTOR_FIELDS)


def layout_of(method: Method, images: Images, precision: str) -> Layout:
    """Return the layout of the fields that the losses of ``method`` read of its teacher."""
    features = probe_features(method.teacher, images)
    widths = {name: getattr(features, name).shape[1] for name in method.teacher_outputs}
    rotations = max(phase.views.rotations for phase in method.phases())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Layout(len(images.train), rotations * CROPS, widths, dtype)


def read_rows(path: Path, layout: Layout, digest: object, device: torch.device) -> Tensor:
    """Return the rows of a finished file on ``device``; UserError if the file is corrupt."""
    try:
        content = path.stat()
        intact = content.st_size == layout.size
        intact = intact and digest == _known_digest(path, content.st_mtime_ns, content.st_size)
    except (FileNotFoundError, IsADirectoryError):
        intact = False
    if not intact:
        raise corrupt_file_error(path)
    gc.collect()  # rows of an earlier job may be part of a reference cycle
    try:
        return map_rows(path, layout, device)
    except RuntimeError as error:
        if MEMORY_ERROR not in str(error):
            raise
        raise UserError(
            f"{path}: the teacher's outputs, {in_gib(layout.size)}, do not fit into the memory of "
            f"{device}; use precision=bf16 (half as much) or teacher.precompute=false"
        ) from None


def map_rows(path: Path, layout: Layout, device: torch.device) -> Tensor:
    """Return the rows of a file; on a CPU they are a memory map that processes share.

    Truncating the file while it is mapped kills the process (SIGBUS). Deleting it is safe, except
    on network file systems.
    """
    with path_in_errors(path), path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if device.type == "cpu":
        mapping.madvise(mmap.MADV_RANDOM)  # rows are read in random order
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # the rows are read-only
        rows = torch.frombuffer(mapping, dtype=layout.dtype)
    return rows.view(layout.shape).to(device)


def in_gib(size: int) -> str:
    """Return a number of bytes as text."""
    return f"{size / 2**30:.3g} GiB"


# The jobs of a sweep read the same file of up to tens of GiB; a changed file has another key.
@cache
def _known_digest(path: Path, modified: int, size: int) -> str:
    return str(sha256(path).hexdigest())


def sha256(path: Path) -> Any:
    """Return the hash object of a file's content, which can be updated with more."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")
