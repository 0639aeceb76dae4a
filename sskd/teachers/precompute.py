"""A teacher's outputs for every crop of every training image, computed once for many runs.

A view of an image comes in 162 crops. A run of 240 epochs draws one and a half times as many, and
the other runs of the same teacher draw from the same ones. Where a method reads nothing but the
teacher's logits, or its pooled feature too, they all fit on a disk, and a step needs no teacher.
Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, keep
the logits of some random crops; here it is all of them, so a run computes what it does without.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sskd.config import Config
from sskd.data import CROPS, Images, Loader
from sskd.device import inference_batch_size
from sskd.errors import UserError
from sskd.methods import Method
from sskd.methods.base import forward_in_chunks
from sskd.output import say
from sskd.runs.names import LAST, OUTPUTS
from sskd.runs.run import Run
from sskd.teachers.find import TeacherWeights
from sskd.teachers.outputs import (
    Layout,
    Precomputed,
    can_precompute,
    in_gib,
    layout_of,
    read_rows,
    sha256,
)
from sskd.teachers.phases import corrupt_file_error, phase_folder
from sskd.training.progress import Progress
from sskd.training.signals import StopSignals

PHASE = "teacher_outputs"
FORMAT = 1  # of the file: another one where the rows or the numbers of crops mean something else


@dataclass(frozen=True)
class ResumePoint:
    """How far the file of outputs is: images, the seconds they took, the SHA-256 of their rows."""

    images: int = 0
    seconds: float = 0.0
    digest: str = hashlib.sha256().hexdigest()


def precompute(
    method: Method, images: Images, config: Config, found: TeacherWeights
) -> Precomputed | None:
    """Compute the outputs of the method's teacher, or find them computed.

    Returns None, with a line that says so, for a method that reads more of the teacher.

    Raises:
        BusyError: another process has taken over what this one was computing.
        Interrupted: a signal came; what was computed is saved.
        UserError: what was found is damaged, or there is no room for it.
    """
    if not can_precompute(method):
        say(
            f"teacher.precompute: method={config.method.name} reads more of the teacher than its "
            "logits and its pooled feature, so that the teacher is asked in every step"
        )
        return None
    layout = layout_of(method, images, config.precision)
    settings = _settings(layout, images, config, found)
    with Run(phase_folder(config, settings), settings).open(wait=True) as run:
        result = run.finished()
        if result is None:
            result = _compute(run, method.teacher, images, config, layout)
        else:
            say(f"{run.folder}: reused")
    rows = read_rows(run.folder / OUTPUTS, layout, result.get("digest"), images.train.images.device)
    return Precomputed(rows, layout.widths)


def _settings(
    layout: Layout, images: Images, config: Config, found: TeacherWeights
) -> dict[str, Any]:
    """Return everything that the outputs depend on: of the data the images, not the labels."""
    assert config.teacher is not None
    shown = images.train.images.cpu().contiguous().numpy()
    return {
        "phase": PHASE,
        "format": FORMAT,
        "teacher": {"name": config.teacher.name, "digest": found.digest},
        "images": hashlib.sha256(shown.data).hexdigest(),
        "normalisation": [list(images.mean), list(images.std)],
        "outputs": layout.widths,
        "crops": layout.crops,
        "precision": config.precision,
    }


def _compute(
    run: Run, teacher: nn.Module, images: Images, config: Config, layout: Layout
) -> dict[str, Any]:
    """Fill the file of outputs, from its beginning or on from where it was left."""
    at = _read_resume_point(run.checkpoint([PHASE]) or vars(ResumePoint()), run.folder, layout)
    run.plan({PHASE: 1})
    path = run.folder / OUTPUTS
    digest = _resume(path, at, layout)
    _refuse_small_disk(path, layout, at)
    progress = Progress(PHASE, 1, layout.images, at.images, dict)
    progress.line(
        f"computes {in_gib(layout.size)} in {run.folder}, which takes as long as {layout.crops} "
        f"epochs of the teacher; {at.images}/{layout.images} images are done"
    )
    saved = time.monotonic()
    started = saved - at.seconds
    try:
        with StopSignals() as signals:
            for rows in _outputs(teacher, images, config.precision, layout, at.images):
                _refuse_lost(rows, at.images, run.folder)
                data = rows.cpu().view(torch.uint8).numpy().tobytes()
                done, offset = at.images + len(rows), at.images * layout.image_size
                is_due = time.monotonic() - saved > 60 * config.checkpoint_minutes
                save = is_due or signals.received is not None or done == layout.images
                run.write_at(OUTPUTS, offset, data, sync=save)
                digest.update(data)
                at = ResumePoint(done, time.monotonic() - started, digest.hexdigest())
                progress.advance(len(rows))
                if save:
                    run.save({"stage": PHASE, **vars(at)})
                    saved = time.monotonic()
                    signals.raise_if_received()
    finally:
        progress.close()
    result = {"kind": "phase", "stage": PHASE, "seconds": at.seconds, "digest": at.digest}
    run.finish(None, result)
    return result


def _refuse_lost(rows: Tensor, first: int, folder: Path) -> None:
    lost = (~rows.isfinite()).flatten(1).any(1)
    if lost.any():
        image = first + int(lost.int().argmax())
        raise UserError(
            f"{folder}: the teacher's outputs for training image {image} (the first is 0) are not "
            "finite; take another teacher"
        )


def _read_resume_point(state: Mapping[str, Any], folder: Path, layout: Layout) -> ResumePoint:
    """Return what a checkpoint tells; UserError where that is not how far these outputs are."""
    images, seconds, digest = (state.get(name) for name in vars(ResumePoint()))
    if (
        type(images) is not int
        or not 0 <= images <= layout.images
        or type(seconds) is not float
        or not 0 <= seconds < math.inf
        or type(digest) is not str
    ):
        raise corrupt_file_error(folder / LAST)
    return ResumePoint(images, seconds, digest)


def _resume(path: Path, at: ResumePoint, layout: Layout) -> Any:
    """Cut the file at ``path`` back to how far it is; return the SHA-256 of that, to go on with.

    UserError where the file does not hold what was computed.
    """
    kept = at.images * layout.image_size
    if at.images == 0:
        path.touch()
    elif not path.is_file() or path.stat().st_size < kept:
        raise corrupt_file_error(path)
    os.truncate(path, kept)
    digest = sha256(path)
    if digest.hexdigest() != at.digest:
        raise corrupt_file_error(path)
    return digest


def _refuse_small_disk(path: Path, layout: Layout, at: ResumePoint) -> None:
    wanted = layout.size - at.images * layout.image_size
    free = shutil.disk_usage(path.parent).free
    if wanted > free:
        raise UserError(
            f"{path}: {in_gib(wanted)} of the teacher's outputs are to be written, and "
            f"{in_gib(free)} are free; use another runs=FOLDER, precision=bf16 (half as much) or "
            "teacher.precompute=false"
        )


@torch.inference_mode()
def _outputs(
    teacher: nn.Module, images: Images, precision: str, layout: Layout, first: int
) -> Iterator[Tensor]:
    """Yield the outputs of all crops of the images from ``first`` on: [k, crops, numbers]."""
    device = images.train.images.device
    together = -(-inference_batch_size(device) // layout.crops)  # images
    views = layout.crops // CROPS
    loader = Loader(images.train, images.mean, images.std, together, views)
    crops = torch.arange(layout.crops, device=device)
    for start in range(first, layout.images, together):
        index = torch.arange(start, min(start + together, layout.images), device=device)
        x = loader.crops_of(index, crops.expand(len(index), -1))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            features = forward_in_chunks(teacher, x, tuple(layout.widths))
        rows = torch.cat([getattr(features, name) for name in layout.widths], dim=1)
        yield rows.to(layout.dtype).view(len(index), *layout.shape[1:])
