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
from sskd.methods.adapters import probe_features
from sskd.models import VECTOR_FIELDS, Features, partial_features
from sskd.teachers.phases import corrupt_file_error

MEMORY_ERROR = "out of memory"  # of PyTorch, on any device


@dataclass(frozen=True)
class Layout:
    """What is kept: ``widths`` of the fields of Features, for ``crops`` of each of ``images``."""

    images: int
    crops: int
    widths: dict[str, int]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Images, crops of each, numbers of each crop."""
        return self.images, self.crops, sum(self.widths.values())

    @property
    def image_size(self) -> int:
        """Bytes that the outputs of one image take."""
        _, crops, width = self.shape
        return crops * width * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes that all of them take."""
        return self.images * self.image_size


@dataclass(frozen=True)
class Precomputed:
    """A teacher's outputs, looked up: ``rows`` [images, crops, numbers], on the images' device."""

    rows: Tensor
    widths: dict[str, int]

    def __call__(self, batch: Batch) -> Features:
        """Return what the teacher makes of ``batch``; fields that are not kept are empty."""
        first = batch.indices[:, None] * self.rows.shape[1]
        wanted = (first + batch.crops.view(len(batch.indices), -1)).flatten()
        rows = self.rows.flatten(0, 1).index_select(0, wanted)
        parts = rows.split(list(self.widths.values()), dim=1)
        return partial_features(dict(zip(self.widths, parts, strict=True)))


def can_precompute(method: Method | type[Method]) -> bool:
    """Return whether all that the losses of ``method`` read of its teacher fits on a disk."""
    return set() < set(method.teacher_outputs) <= set(VECTOR_FIELDS)


def layout_of(method: Method, images: Images, precision: str) -> Layout:
    """Return the layout of all that the losses of ``method`` read of its teacher."""
    features = probe_features(method.teacher, images)
    widths = {name: getattr(features, name).shape[1] for name in method.teacher_outputs}
    views = max(phase.views for phase in method.phases())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Layout(len(images.train), views * CROPS, widths, dtype)


def read_rows(path: Path, layout: Layout, digest: object, device: torch.device) -> Tensor:
    """Return the rows of a finished file on ``device``; UserError where they are not there."""
    try:
        content = path.stat()
        whole = content.st_size == layout.size
        whole = whole and digest == _known_digest(path, content.st_mtime_ns, content.st_size)
    except (FileNotFoundError, IsADirectoryError):
        whole = False
    if not whole:
        raise corrupt_file_error(path)
    gc.collect()  # an earlier cell's may lie in cycles of references
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
    """Return the rows of a file: on a CPU where the system keeps the file, shared by processes.

    The process then ends by a signal (SIGBUS) if somebody cuts the file while it is in use; to
    remove it is safe, but for a network's disk.
    """
    with path_in_errors(path), path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if device.type == "cpu":
        mapping.madvise(mmap.MADV_RANDOM)  # a row here and there: read no more than that
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # nobody writes to it
        rows = torch.frombuffer(mapping, dtype=layout.dtype)
    return rows.view(layout.shape).to(device)


def in_gib(size: int) -> str:
    """Return bytes in words."""
    return f"{size / 2**30:.3g} GiB"


@cache  # the cells of a sweep ask for the same; another content is another question
def _known_digest(path: Path, modified: int, size: int) -> str:
    return str(sha256(path).hexdigest())


def sha256(path: Path) -> Any:
    """Return the hash of what is in a file, which may go on with more."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")
