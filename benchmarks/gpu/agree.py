"""Does a device compute what the CPU does, without waiting, and a CUDA graph what its steps do?

A row has the largest relative difference of the losses over a few steps, and the difference of the
weights: the norm of the difference of both updates, divided by the norm of the update. The weights,
the batches and the draws of both sides are the same, so rounding is the only difference. Training
amplifies it, and the tolerances of bf16 and TF32 are rough.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.rows import Job, Values, describe
from benchmarks.harness import table_head, table_row
from benchmarks.launches import cases
from benchmarks.workload import (
    CLASSES,
    Case,
    loader_of,
    noise,
    set_statistics,
    training_step,
)
from sskd.data import Images
from sskd.device import to_device
from sskd.models import Features, build_model, fold_batch_norms, fuse_layers
from sskd.models.fusing import FusedConvolution
from sskd.precision import computing
from sskd.training.graph import WARMUP_STEPS
from sskd.training.step import TrainingStep

IMAGES = 2000  # an epoch has a smaller last batch
STEPS = 3  # compared with the CPU
SLOWER = 0.01  # at this share of the learning rate, so that training amplifies less
GRAPH_STEPS = 40  # more than an epoch
CPU = torch.device("cpu")
# Of losses, and of weights after a few steps, by precision.
TOLERANCES = {"fp32": (0.001, 0.05), "tf32": (0.02, 0.15), "bf16": (0.15, 0.7)}
TEACHER_TOLERANCE = 1e-3  # beside twice the difference of the plain network
GRAPH_TOLERANCE = 1e-2  # of losses and weights; cuDNN's deterministic algorithms should give 0
TEACHERS = ["resnet56", "wrn_40_2", "vgg13", "resnet32x4", "ResNet50"]  # of the published pairs
COLUMNS = (
    "method", "phase", "precision", "losses", "weights", "waits", "graph: losses", "weights",
    "moved", "verdict",
)  # fmt: skip
TEACHER_COLUMNS = (
    "teacher", "precision", "folded and fused", "plain", "fused convolutions", "verdict",
)  # fmt: skip


def rows(options: argparse.Namespace) -> Iterator[tuple[str, Job]]:
    """Yield the comparisons of the teachers, then those of each method and phase."""
    for name in options.teachers:
        for precision in options.precisions:
            job = partial(compare_teacher, name, options.device, precision)
            yield f"teacher {name} {precision}", job
    for case, phase in cases(options.agree_pair, options):
        small = replace(case, images=min(case.images, IMAGES))
        key = f"{case.method} {phase} {case.precision}"
        yield f"cpu {key}", partial(compare_with_cpu, small, phase)
        yield f"graph {key}", partial(compare_graph, small, phase)


# ---- a few steps on two devices ----


@dataclass(frozen=True)
class Taken:
    """The losses of each step, the update of all weights, and where a step waited for the GPU."""

    losses: list[dict[str, float]]
    update: Tensor
    wait: str = ""


def compare_with_cpu(case: Case, phase: str) -> Values:
    """Compare a few steps on the device with those in float32 on the CPU."""
    expected = steps_on_cpu(replace(case, device="cpu", precision="fp32", graph="off"), phase)
    found = take_steps(replace(case, graph="off"), phase)
    losses = max(map(difference_of_losses, found.losses, expected.losses))
    weights = relative(found.update, expected.update)
    return {"losses": losses, "weights": weights, "wait": found.wait}


@lru_cache(maxsize=4)  # for the other precisions
def steps_on_cpu(case: Case, phase: str) -> Taken:
    """Return the steps that others are compared with."""
    return take_steps(case, phase)


def take_steps(case: Case, phase: str) -> Taken:
    """Take a few steps; if one waits, repeat them and let them wait."""
    try:
        return _take_steps(case, phase, may_wait=False)
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return replace(_take_steps(case, phase, may_wait=True), wait=describe(error))


def _take_steps(case: Case, phase: str, *, may_wait: bool) -> Taken:
    with patch("sskd.methods.crd.draw_negatives", same_negatives):
        step = new_step(case, phase)
        scale_rate(step, SLOWER)
        before, losses = weights_of(step), []
        for number in range(STEPS):
            # In the first step libraries and the optimizer set themselves up.
            with no_waiting(step.loader.device, allowed=may_wait or number == 0):
                step.take()
            losses.append(losses_of(step))
            step.meter.reset()
    return Taken(losses, weights_of(step) - before)


@contextmanager
def no_waiting(device: torch.device, *, allowed: bool) -> Iterator[None]:
    """Raise RuntimeError inside the ``with`` block if the host waits for the GPU."""
    if device.type != "cuda" or allowed:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def same_negatives(labels: Tensor, classes: Tensor, count: int) -> Tensor:
    """Choose CRD's negatives, on any device the same, by integers instead of random numbers."""
    images = torch.arange(len(labels), device=labels.device)
    shifts = torch.arange(len(classes), device=labels.device)[:, None]
    keys = ((images * 40_503 + shifts * 7_919) % 65_521).float()  # a prime: no two images tie
    keys.masked_fill_(labels == classes[:, None], torch.inf)
    return keys.topk(count, largest=False).indices


# ---- a graph and the steps that it replaces ----


def compare_graph(case: Case, phase: str) -> Values:
    """Compare steps by a CUDA graph with the same steps without it, over a change of the rate.

    On a CPU both are the same.
    """
    with deterministic_cudnn():
        expected, _ = train(replace(case, graph="off"), phase)
        found, moved = train(replace(case, graph="auto"), phase)
    losses = max(map(difference_of_losses, found.losses, expected.losses))
    return {"losses": losses, "weights": relative(found.update, expected.update), "moved": moved}


def train(case: Case, phase: str) -> tuple[Taken, list[str]]:
    """Take some dozens of steps; return them and the names of the tensors that moved."""
    step = new_step(case, phase)
    torch.manual_seed(0)
    before, losses = weights_of(step), []
    known: dict[str, int] = {}
    for number in range(GRAPH_STEPS):
        if number == WARMUP_STEPS:
            known = places(step)
        if number == GRAPH_STEPS // 2:
            losses.append(losses_of(step))
            scale_rate(step, 0.1)
        if step.loader.position == step.loader.steps:
            step.loader.begin_epoch(1)
        step.take()
    taken = Taken([*losses, losses_of(step)], weights_of(step) - before)
    now = places(step)
    return taken, [name for name, place in known.items() if now[name] != place]


@contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """Let cuDNN compute the same bits again inside the ``with`` block."""
    backend = torch.backends.cudnn
    before = backend.deterministic, backend.benchmark
    backend.deterministic, backend.benchmark = True, False
    try:
        yield
    finally:
        backend.deterministic, backend.benchmark = before


def places(step: TrainingStep) -> dict[str, int]:
    """Return the addresses of all tensors that last from step to step, by name."""
    return {name: tensor.data_ptr() for name, tensor in step.lasting_tensors().items()}


# ---- a teacher, folded and fused ----


@torch.no_grad()
def compare_teacher(name: str, device_name: str, precision: str) -> Values:
    """Compare a network, and the same folded and fused, with itself in float32 on the CPU.

    ``features`` is the largest difference of the fused one, ``plain`` that of the network.
    """
    torch.manual_seed(0)
    device, network = torch.device(device_name), build_model(name, CLASSES)
    set_statistics(network, images_of(IMAGES))
    folded = fold_batch_norms(network)
    x = torch.randn(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with computing("fp32", CPU):
        expected = network(x)
    for each in (network, folded):
        to_device(each, device)
    fused = fuse_layers(folded, precision, len(x)) if device.type == "cuda" else folded
    with computing(precision, device):
        plain, faster = (
            difference_of_features(each(x.to(device)), expected) for each in (network, fused)
        )
    kernels = sum(isinstance(module, FusedConvolution) for module in fused.modules())
    return {"features": faster, "plain": plain, "fused": kernels}


def difference_of_features(found: Features, expected: Features) -> float:
    """Return the largest difference over the logits and the stages."""
    pairs = zip([found.logits, *found.stages], [expected.logits, *expected.stages], strict=True)
    return max(relative(one, other) for one, other in pairs)


# ---- what all of them need ----


@cache
def images_of(count: int) -> Images:
    """Return ``count`` images of noise on the CPU, in each process the same."""
    torch.manual_seed(0)
    return noise(count, CPU)


def new_step(case: Case, phase: str) -> TrainingStep:
    """Return the step of a new method, at the start of an epoch."""
    images = images_of(case.images)
    return training_step(case.config, images, loader_of(case, images.to(case.device)), phase)


def scale_rate(step: TrainingStep, factor: float) -> None:
    """Multiply the learning rate."""
    for group in step.optimizer.param_groups:
        group["lr"] *= factor


def weights_of(step: TrainingStep) -> Tensor:
    """Return all trained weights as a vector on the CPU."""
    weights = [each.detach().flatten() for each in step.phase.trains.parameters()]
    return torch.cat(weights).to(CPU, torch.float64)


def losses_of(step: TrainingStep) -> dict[str, float]:
    """Return the losses since the last reset of the meter."""
    return {key: value for key, value in step.meter.read().items() if key.startswith("loss")}


def difference_of_losses(found: Mapping[str, float], expected: Mapping[str, float]) -> float:
    """Return the largest relative difference; infinity if one is not finite."""
    return max(
        abs(found[key] - value) / max(abs(value), 1e-6) if math.isfinite(found[key]) else math.inf
        for key, value in expected.items()
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of ``expected``; infinity if not finite."""
    found, expected = found.to(CPU, torch.float64), expected.to(CPU, torch.float64)
    value = ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()
    return value if math.isfinite(value) else math.inf


# ---- the tables ----


def table(found: Mapping[str, Values], options: argparse.Namespace) -> list[str]:
    """Return the lines of both tables."""
    names = [key.split(" ", 1)[1] for key in found if not key.startswith("teacher ")]
    steps = [step_row(name, found) for name in dict.fromkeys(names)]
    teachers = [teacher_row(key, found[key]) for key in found if key.startswith("teacher ")]
    return [
        *(f"**{options.agree_pair}**", "", *table_head(COLUMNS, text_columns=3), *steps, ""),
        *(*table_head(TEACHER_COLUMNS, text_columns=2), *teachers),
    ]


def step_row(name: str, found: Mapping[str, Values]) -> str:
    """Return the row of a method, phase and precision, of both comparisons."""
    cpu, graph = found.get(f"cpu {name}", {}), found.get(f"graph {name}", {})
    precision = name.split()[-1]
    limits = dict(zip(("losses", "weights"), TOLERANCES[precision], strict=True))
    faults = [f"CPU: {fault}" for fault in faults_of(cpu, limits)]
    exact = dict.fromkeys(limits, GRAPH_TOLERANCE)
    faults += [f"graph: {fault}" for fault in faults_of(graph, exact)]
    numbers = [*shown(cpu, limits), "yes" if cpu.get("wait") else "no" if cpu else ""]
    more = [*shown(graph, exact), len(graph["moved"]) if "moved" in graph else ""]
    verdict = "; ".join(faults) or ("agree" if cpu and graph else "")
    return table_row([*name.split(), *numbers, *more, verdict])


def teacher_row(key: str, values: Values) -> str:
    """Return the row of a teacher in a precision."""
    _, name, precision = key.split()
    limits = {"features": 2 * values.get("plain", 0.0) + TEACHER_TOLERANCE}
    verdict = "; ".join(faults_of(values, limits)) or "agree"
    numbers = [*shown(values, ["features", "plain"]), values.get("fused", "")]
    return table_row([name, precision, *numbers, verdict])


def faults_of(values: Values, limits: Mapping[str, float]) -> Iterator[str]:
    """Yield what is wrong with a comparison."""
    if "error" in values:
        yield values["error"]
    for key, limit in limits.items():
        if key in values and not (values[key] <= limit and math.isfinite(values[key])):
            yield f"{key} above {limit:g}"
    if values.get("wait"):
        yield values["wait"]
    if values.get("moved"):
        yield f"moved: {', '.join(values['moved'][:3])}"


def shown(values: Values, keys: Sequence[str] | Mapping[str, float]) -> list[str]:
    """Return the numbers of a comparison; "" for one that is missing."""
    return [f"{values[key]:.1e}" if key in values else "" for key in keys]
