"""What the benchmarks run: the training step of a method, on images of noise.

The noise has the number, size and classes of CIFAR-100; pixel values do not affect the time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from benchmarks import harness
from benchmarks.harness import Pipeline
from sskd import CONF
from sskd.config import Config, read_config
from sskd.data import Batch, Images, Loader, Split, eval_batches
from sskd.device import to_device
from sskd.errors import UserError
from sskd.methods import METHODS
from sskd.optimizers import build_optimizer
from sskd.teachers.assembly import assemble
from sskd.teachers.outputs import Layout, Precomputed, can_precompute, layout_of, map_rows
from sskd.training.acceleration import compile_loss, fold_teacher, fuse_teacher
from sskd.training.graph import build_step
from sskd.training.meter import Meter
from sskd.training.step import TrainingStep, set_trainable

CLASSES = 100


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training step to measure: a method, its networks, and the settings that affect its speed.

    ``pair`` is TEACHER-STUDENT, ``batch`` the number of images in a step, ``images`` the number in
    an epoch, and ``workers`` the number of worker processes of the conventional pipeline.
    """

    pair: str
    batch: int
    images: int
    device: str
    compile: str
    graph: str
    precompute: bool
    method: str = "kd"
    precision: str = "fp32"
    optimizer: str = "sgd"
    workers: int = 0

    @property
    def config(self) -> Config:
        """The run's configuration: the recipe with these settings."""
        teacher, student = self.pair.split("-")
        overrides = [
            f"arch@teacher={teacher}",
            f"arch@student={student}",
            f"method={self.method}",
            f"optimizer={self.optimizer}",
            f"batch_size={self.batch}",
            f"precision={self.precision}",
            f"compile={self.compile}",
            f"graph={self.graph}",
            f"teacher.precompute={self.precompute}",
        ]
        with initialize_config_dir(str(CONF), version_base=None):
            return read_config(compose("student", overrides))


def case_of(options: argparse.Namespace, **settings: Any) -> Case:
    """Return the case of the command line's options, with ``settings`` added or replaced."""
    given = vars(options) | settings
    return Case(**{each.name: given[each.name] for each in fields(Case) if each.name in given})


def noise(count: int, device: torch.device) -> Images:
    """Return ``count`` training images of noise in 100 classes, 32x32."""
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    train = Split(images, torch.arange(count) % CLASSES)
    names = tuple(f"class {label}" for label in range(CLASSES))
    test = train.take(torch.arange(1))
    return Images(
        name="noise",
        classes=names,
        train=train,
        test=test,
        holdout=None,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    ).to(device)


def phase_names(case: Case) -> list[str]:
    """Return the phases of a case's method; if its pair lacks support, print why and return []."""
    try:
        assembled = assemble(case.config, noise(200, torch.device("cpu")))
    except UserError as error:
        print(f"{error}; skipped", file=sys.stderr, flush=True)
        return []
    return [phase.name for phase in assembled.phases()]


def loader_of(case: Case, images: Images) -> Loader:
    """Return the suite's loader of the training images, with the views that the method needs."""
    views = METHODS[case.method].views
    return Loader(images.train, images.mean, images.std, batch_size=case.batch, views=views)


def suite_step(case: Case, images: Images, loader: Loader, phase: str | None = None) -> Pipeline:
    """Return the suite's training step of a phase, by default the last."""
    step = training_step(case.config, images, loader, phase)
    draw = drawer(loader)

    def whole() -> None:
        if loader.position == loader.steps:
            loader.begin_epoch(0)
        step.take()

    warmup = harness.WARMUP if loader.device.type == "cuda" else 1  # with the capture of a graph
    return Pipeline(draw, step.train, loader.device, case.batch, warmup=warmup, whole=whole)


def drawer(loader: Loader) -> Callable[[], Batch]:
    """Return a function that draws the next batch, epoch after epoch."""

    def draw() -> Batch:
        if loader.position == loader.steps:
            loader.begin_epoch(0)
        return loader.next_batch()

    return draw


def training_step(config: Config, images: Images, loader: Loader, name: str | None) -> TrainingStep:
    """Return the training step of the phase ``name``, as the training loop takes it.

    If ``name`` is None, it is the method's last phase. On an NVIDIA GPU the current stream of this
    process becomes another than the default one, as in a run. The teacher has random weights.
    """
    use_new_stream(loader.device)
    method = assemble(config, images)
    if method.needs_teacher:
        set_statistics(method.teacher, images)
    fold_teacher(method)
    to_device(method, loader.device)
    fuse_teacher(method, config, loader.device)
    if config.teacher and config.teacher.precompute and can_precompute(method):
        method.precomputed = outputs_of_noise(layout_of(method, images, config.precision), images)
    phases = [phase for phase in method.phases() if name in (None, phase.name)]
    phase = phases[-1]
    set_trainable(phase, method)
    optimizer = build_optimizer(config.optimizer, phase.trains.parameters(), config.optimizer.lr)
    return build_step(
        config,
        method=method,
        loader=loader,
        phase=compile_loss(phase, config),
        optimizer=optimizer,
        meter=Meter(),
    )


def use_new_stream(device: torch.device) -> None:
    """Compute on a new stream from now on, if ``device`` is an NVIDIA GPU."""
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.set_stream(stream)


@torch.no_grad()
def set_statistics(network: nn.Module, images: Images) -> None:
    """Set the statistics of the BatchNorms of ``network``, on the CPU, to those of a batch.

    Without them the feature maps of a network that is not trained grow with its depth, so much that
    some losses overflow.
    """
    layers = [each for each in network.modules() if isinstance(each, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    few = Split(images.train.images[:16], images.train.labels[:16]).to("cpu")
    ((x, _),) = eval_batches(few, images.mean, images.std, len(few))
    network.train()
    network(x)
    network.eval()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def outputs_of_noise(layout: Layout, images: Images) -> Precomputed:
    """Return random outputs of a teacher in a memory-mapped file, from which a run reads them."""
    count = min(1000, layout.images)
    part = replace(layout, images=count)
    rows = torch.randn(part.shape).to(layout.dtype).view(torch.uint8).numpy().tobytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outputs")
        with path.open("wb") as file:
            for start in range(0, layout.images, count):
                file.write(rows[: (layout.images - start) * layout.image_size])
        mapped = map_rows(path, layout, images.train.images.device)
    return Precomputed(mapped, layout.widths)
