"""A teacher's outputs for every crop of every training image, computed once for many runs.

A view of an image has 162 possible crops. A run of 240 epochs draws each about 1.5 times, and all
runs with that teacher draw from the same crops. If a method reads only the teacher's logits and
its pooled feature, the outputs of all crops fit on a disk, and a step needs no teacher.
Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, keep
the logits of some random crops. Here all crops are kept, so the losses are the same as without.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sskd.config import Config
from sskd.data import CROPS, Images, Loader, Views
from sskd.device import outputs_at_once
from sskd.errors import UserError
from sskd.files import write_at
from sskd.invocation.extensions import extension_digests
from sskd.methods import Method
from sskd.methods.base import forward_in_chunks
from sskd.output import say
from sskd.precision import computing
from sskd.runs.names import LAST, OUTPUTS
from sskd.runs.plan import RunPlan
from sskd.runs.result import SharedResult
from sskd.runs.run import Run
from sskd.streams import copy_to_host
from sskd.teachers.outputs import (
    Layout,
    Precomputed,
    can_precompute,
    in_gib,
    layout_of,
    read_rows,
    sha256,
)
from sskd.teachers.shared import corrupt_file_error, find_or_compute
from sskd.training.progress import Progress
from sskd.training.signals import StopSignals
from sskd.turns import outside_turn, shared

PHASE = "teacher_outputs"
FORMAT = 2  # file format version; increase it if rows or crop numbers change meaning


@dataclass(frozen=True)
class ResumePoint:
    """The finished part of the file: images, their seconds of work, the SHA-256 of their rows."""

    images: int = 0
    seconds: float = 0.0
    digest: str = hashlib.sha256().hexdigest()


def find_or_compute_outputs(method: Method, images: Images, plan: RunPlan) -> None:
    """Let ``method`` look up its teacher's outputs, which are computed if no run has done so.

    A line reports why nothing was precomputed: the method reads more of the teacher, or some views
    are not rotations.

    Raises:
        BusyError: another process took over the computation.
        Interrupted: a signal came; the finished part is saved.
        UserError: the file is corrupt, or there is no space for it.
    """
    config = plan.config
    if reason := _why_not(method, images, config):
        say(f"teacher.precompute: {reason}, so every step computes the teacher's features")
        return
    layout = layout_of(method, images, config.precision)
    fill = partial(_fill, teacher=method.teacher, images=images, config=config, layout=layout)
    run, result = find_or_compute(config, _settings(layout, images, plan), fill)
    device = images.train.device
    path, digest = run.folder / OUTPUTS, result.digest
    method.precomputed = shared(
        ("outputs", path, digest, device),
        lambda: Precomputed(read_rows(path, layout, digest, device), layout.widths),
    )


def _why_not(method: Method, images: Images, config: Config) -> str:
    """Return why the outputs for all crops do not suffice; "" if they do."""
    if not images.train.has_numbered_crops:
        return "there are too many crops of packed images to store"
    if config.strong_copies or method.views.strong:
        return "there are too many strong views to store"
    if not method.views.are_rotations:
        return "there are too many transformed views to store"
    if not can_precompute(method):
        return (
            f"method={config.method.name} reads more of the teacher than its logits and its pooled "
            "feature"
        )
    return ""


def _settings(layout: Layout, images: Images, plan: RunPlan) -> dict[str, Any]:
    """Return everything that the outputs depend on: of the data the images, not the labels."""
    assert plan.config.teacher is not None
    assert plan.teacher is not None
    pixels = images.train.images.cpu().contiguous().numpy()
    code = extension_digests([("arch", plan.config.teacher.name)])
    return {
        "phase": PHASE,
        "format": FORMAT,
        "teacher": {"name": plan.config.teacher.name, "digest": plan.teacher.digest},
        "images": hashlib.sha256(pixels.data).hexdigest(),
        "normalisation": [list(images.mean), list(images.std)],
        "outputs": layout.widths,
        "crops": layout.crops,
        "precision": plan.config.precision,
        **({"code": code} if code else {}),
    }


def _fill(run: Run, *, teacher: nn.Module, images: Images, config: Config, layout: Layout) -> None:
    """Fill the file of outputs, from its start or from where an earlier process stopped."""
    saved = run.checkpoints.load([PHASE]) or vars(ResumePoint())
    writer = _Writer(run, layout, _read_resume_point(saved, run.folder, layout))
    run.announce({PHASE: 1})
    done = writer.point.images
    progress = Progress(PHASE, 1, layout.images, done=done, metrics=dict)
    progress.line(
        f"computes {in_gib(layout.size)} of outputs in {run.folder}, which takes as long as "
        f"{layout.crops} epochs of the teacher's forward pass; {done}/{layout.images} images are "
        "done"
    )
    try:
        # The thread writes the rows of a piece while the next piece is computed.
        with StopSignals() as signals, ThreadPoolExecutor(max_workers=1) as thread:
            written = thread.submit(lambda: None)
            for rows in _outputs(teacher, images, config.precision, layout, first=done):
                host_rows = copy_to_host(rows)
                with outside_turn():
                    written.result()  # raises what the thread raised
                save = writer.is_due(config.checkpoint_minutes) or signals.received is not None
                written = thread.submit(writer.write, host_rows, save=save)
                progress.advance(len(rows))
                if save:
                    written.result()
                    signals.raise_if_received()
            written.result()
            signals.raise_if_received()
    finally:
        progress.close()
    point = writer.point
    run.finish(None, SharedResult(stage=PHASE, seconds=point.seconds, digest=point.digest))


class _Writer:
    """Writes the rows of successive images into the file of outputs, and saves how far it is."""

    def __init__(self, run: Run, layout: Layout, point: ResumePoint) -> None:
        self.point = point
        self._run, self._layout = run, layout
        self._digest = _truncate(run.folder / OUTPUTS, point, layout)
        _refuse_small_disk(run.folder / OUTPUTS, layout, point)
        self._last_save_time = time.monotonic()
        self._started = self._last_save_time - point.seconds

    def is_due(self, minutes: float) -> bool:
        """Return whether the last checkpoint is more than ``minutes`` old."""
        return time.monotonic() - self._last_save_time > 60 * minutes

    def write(self, host_rows: Callable[[], Tensor], *, save: bool) -> None:
        """Write the rows [k, crops, numbers] of the next k images, which ``host_rows`` returns.

        Then save how far the file is, if ``save`` is true or these are the last images.
        """
        first = self.point.images
        rows = host_rows()
        _refuse_non_finite(rows, first, self._run.folder)
        data = rows.view(torch.uint8).numpy().tobytes()
        done = first + len(rows)
        save = save or done == self._layout.images
        path, offset = self._run.folder / OUTPUTS, first * self._layout.image_size
        with self._run.lock.writing() as still_ours:
            write_at(path, offset, data, sync=save, still_ours=still_ours)
        self._digest.update(data)
        seconds = time.monotonic() - self._started
        self.point = ResumePoint(done, seconds, self._digest.hexdigest())
        if save:
            self._run.checkpoints.save({"stage": PHASE, **vars(self.point)})
            self._last_save_time = time.monotonic()


def _refuse_non_finite(rows: Tensor, first: int, folder: Path) -> None:
    non_finite = (~rows.isfinite()).flatten(1).any(1)
    if non_finite.any():
        image = first + int(non_finite.int().argmax())
        raise UserError(
            f"{folder}: the teacher's outputs for training image {image} (counting from 0) are not "
            "finite; use another teacher"
        )


def _read_resume_point(state: Mapping[str, Any], folder: Path, layout: Layout) -> ResumePoint:
    """Return the resume point in a checkpoint; UserError if it does not fit these outputs."""
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


def _truncate(path: Path, at: ResumePoint, layout: Layout) -> Any:
    """Truncate the file at ``path`` to its finished part; return the SHA-256 object of that part.

    Raises:
        UserError: the file does not have the content that was computed.
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
    needed = layout.size - at.images * layout.image_size
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{path}: the teacher's outputs need {in_gib(needed)} more, but only "
            f"{in_gib(free)} are free; use another runs=FOLDER, precision=bf16 (half as much) or "
            "teacher.precompute=false"
        )


@torch.inference_mode()
def _outputs(
    teacher: nn.Module, images: Images, precision: str, layout: Layout, *, first: int
) -> Iterator[Tensor]:
    """Yield the outputs of all crops of the images from ``first`` on, [k, crops, numbers] each."""
    device = images.train.device
    images_at_once = -(-outputs_at_once(device) // layout.crops)
    views = Views(layout.crops // CROPS)
    loader = Loader(images.train, images.mean, images.std, batch_size=images_at_once, views=views)
    crops = torch.arange(layout.crops, device=device)
    for start in range(first, layout.images, images_at_once):
        index = torch.arange(start, min(start + images_at_once, layout.images), device=device)
        x = loader.augmenter.crops_of(index, crops.expand(len(index), -1))
        with computing(precision, device):
            features = forward_in_chunks(teacher, x, tuple(layout.widths))
        rows = torch.cat([getattr(features, name) for name in layout.widths], dim=1)
        yield rows.to(layout.dtype).view(len(index), *layout.shape[1:])
