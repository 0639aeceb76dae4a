"""A teacher's outputs for every crop of every training image, computed once for many runs.

A view of an image comes in 162 crops. A run of 240 epochs draws one and a half times as many, and
the other runs of the same teacher draw from the same ones. Where a method reads nothing but the
teacher's logits, or its pooled feature, they all fit on a disk, and a step needs no teacher.
Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, keep
the logits of some random crops; here it is all of them, so a run computes what it does without.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sskd.config import Config
from sskd.data import CROPS, Batch, Images, Loader
from sskd.errors import UserError
from sskd.evaluation import batch_size
from sskd.identity import describe, identity
from sskd.interrupt import StopSignals
from sskd.methods import Method
from sskd.methods.adapters import features_of
from sskd.models import Features
from sskd.paths import below
from sskd.progress import Progress
from sskd.run import Run
from sskd.run_files import OUTPUTS
from sskd.teachers import Teacher

STAGE = "teacher_outputs"
FITTING = ("logits", "pooled")  # fields of Features that are vectors; maps would be terabytes


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

    def bytes(self, images: int) -> int:
        """Return how much the outputs of ``images`` take."""
        _, crops, width = self.shape
        return images * crops * width * self.dtype.itemsize

    @property
    def size(self) -> str:
        """How much all of them take, in words."""
        return _told(self.bytes(self.images))


@dataclass(frozen=True)
class Precomputed:
    """A teacher's outputs, looked up: ``rows`` [images, crops, numbers], on the images' device."""

    rows: Tensor
    widths: dict[str, int]

    def __call__(self, batch: Batch) -> Features:
        """Return what the teacher makes of ``batch``; fields that are not kept are None."""
        image = batch.index[:, None] * self.rows.shape[1]
        place = image + batch.crop.view(len(batch.index), -1)
        rows = self.rows.flatten(0, 1).index_select(0, place.flatten())
        parts = rows.split(list(self.widths.values()), dim=1)
        kept = dict(zip(self.widths, parts, strict=True))
        return Features(*(kept.get(name) for name in Features._fields))  # type: ignore[arg-type]


def precompute(
    method: Method, images: Images, config: Config, found: Teacher
) -> Precomputed | None:
    """Compute the outputs of the method's teacher, or find them computed.

    Returns None, with a line that says so, for a method that reads more of the teacher.

    Raises:
        UserError: what was found is damaged, or there is no room for it.
    """
    if not fits(method):
        print(
            f"teacher.precompute: of no use to method={config.method.name}, which reads more of "
            f"the teacher than its {' and '.join(FITTING)}"
        )
        return None
    layout = layout_of(method, images, config.precision)
    settings = _settings(method, config, found)
    with Run(_folder(config, settings), settings).open(wait=True) as run:
        result = run.finished()
        if result is None:
            result = _compute(run, method, images, config, layout)
        else:
            print(f"{run.folder}: reused")
        rows = _read(run.folder / OUTPUTS, layout, result.get("digest"))
    return Precomputed(place(rows, layout, images.train.images.device), layout.widths)


def fits(method: Method | type[Method]) -> bool:
    """Return whether all that the losses of ``method`` read of its teacher fits on a disk."""
    return set(method.teacher_outputs) <= set(FITTING)


def layout_of(method: Method, images: Images, precision: str) -> Layout:
    """Return the layout of all that the losses of ``method`` read of its teacher."""
    features = features_of(method.teacher, images)
    widths = {name: getattr(features, name).shape[1] for name in method.teacher_outputs}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Layout(len(images.train), method.views * CROPS, widths, dtype)


def _settings(method: Method, config: Config, found: Teacher) -> dict[str, Any]:
    """Return everything that the outputs depend on."""
    values = identity(describe(config))
    return {
        "phase": STAGE,
        "teacher": {"name": values["teacher"]["name"], "digest": found.digest},
        "outputs": list(method.teacher_outputs),
        "views": method.views,
        **{key: values[key] for key in ("dataset", "precision")},
    }


def _folder(config: Config, settings: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    what = ["phases", settings["teacher"]["name"], STAGE, digest]
    return below(Path(config.runs), config.dataset.name, *what)


def _compute(
    run: Run, method: Method, images: Images, config: Config, layout: Layout
) -> dict[str, Any]:
    """Fill the file of outputs, from its beginning or on from where it was left."""
    state = run.checkpoint([STAGE]) or {"images": 0, "seconds": 0.0}
    run.plan({STAGE: 1})
    path, before = run.folder / OUTPUTS, state["seconds"]
    done = _cut_back(path, state["images"], layout)
    _refuse_small_disk(path, layout, done)
    saved = started = time.monotonic()
    progress = Progress(STAGE, 1, layout.images, done, dict)
    progress.line(f"computes {layout.size} in {run.folder}, {done}/{layout.images} images")
    try:
        with StopSignals() as signals, path.open("ab") as file:
            for rows in _outputs(method, images, config.precision, layout, done):
                file.write(rows.cpu().view(torch.uint8).numpy().tobytes())
                done += len(rows)
                progress.advance(len(rows))
                due = time.monotonic() - saved > 60 * config.checkpoint_minutes
                if due or signals.received is not None or done == layout.images:
                    file.flush()
                    os.fsync(file.fileno())
                    saved = time.monotonic()
                    run.save({"stage": STAGE, "images": done, "seconds": before + saved - started})
                    signals.raise_if_received()
    finally:
        progress.close()
    told = {"kind": "phase", "stage": STAGE, "seconds": before + time.monotonic() - started}
    result = {**told, "digest": _sha256(path)}
    run.finish(None, result)
    return result


def _cut_back(path: Path, images: int, layout: Layout) -> int:
    """Cut the file at ``path`` to what a checkpoint tells, or what it holds; return its images."""
    path.touch()
    whole = min(images, path.stat().st_size // layout.bytes(1))
    os.truncate(path, layout.bytes(whole))
    return whole


def _refuse_small_disk(path: Path, layout: Layout, done: int) -> None:
    wanted, free = layout.bytes(layout.images - done), shutil.disk_usage(path.parent).free
    if wanted > free:
        raise UserError(
            f"{path}: the teacher's outputs take {layout.size}, and {_told(free)} are free "
            "there; use another runs=FOLDER, precision=bf16 (half as much), or "
            "teacher.precompute=false"
        )


@torch.inference_mode()
def _outputs(
    method: Method, images: Images, precision: str, layout: Layout, first: int
) -> Iterator[Tensor]:
    """Yield the outputs of all crops of the images from ``first`` on: [k, crops, numbers]."""
    device = images.train.images.device
    size = batch_size(device)
    together = -(-size // layout.crops)  # images
    loader = Loader(images.train, images.mean, images.std, together, method.views)
    crops = torch.arange(layout.crops, device=device)
    for start in range(first, layout.images, together):
        index = torch.arange(start, min(start + together, layout.images), device=device)
        x = loader.crops_of(index, crops.expand(len(index), -1))
        parts = x.chunk(-(-len(x) // size))
        rows = torch.cat([_rows(method.teacher, part, precision, layout) for part in parts])
        yield rows.to(layout.dtype).view(len(index), *layout.shape[1:])


def _rows(teacher: nn.Module, x: Tensor, precision: str, layout: Layout) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = teacher(x)
    return torch.cat([getattr(features, name) for name in layout.widths], dim=1)


def _read(path: Path, layout: Layout, digest: object) -> Tensor:
    """Return the file of outputs; UserError unless it is whole."""
    try:
        content = path.stat()
        whole = content.st_size == layout.bytes(layout.images)
        whole = whole and digest == _known_sha256(path, content.st_mtime_ns, content.st_size)
    except OSError:
        whole = False
    if not whole:
        raise UserError(
            f"{path}: is damaged; remove the folder {path.parent}, and the same command computes "
            "the teacher's outputs again"
        )
    return mapped(path, layout)


def mapped(path: Path, layout: Layout) -> Tensor:
    """Map a file of outputs into memory, which the processes of one machine then share."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapping.madvise(mmap.MADV_RANDOM)  # a row here and there
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # nobody writes to it
        return torch.frombuffer(mapping, dtype=layout.dtype).view(layout.shape)


def place(rows: Tensor, layout: Layout, device: torch.device) -> Tensor:
    """Return ``rows`` on ``device``; UserError where they do not fit into its memory."""
    try:
        return rows.to(device)
    except torch.OutOfMemoryError:
        raise UserError(
            f"teacher.precompute: the teacher's outputs, {layout.size}, do not fit into the memory "
            f"of {device}; use precision=bf16 (half as much) or teacher.precompute=false"
        ) from None


def _told(size: int) -> str:
    return str(tqdm.format_sizeof(size, "iB", 1024))


@cache  # the cells of a sweep ask for the same; another content is another question
def _known_sha256(path: Path, modified: int, size: int) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
