"""The time of a step: eager and by a graph, alone and with several jobs side by side.

Jobs side by side are in one process. Each has its own stream and its own graph, and one thread
starts a step of each in turn. The conventional pipeline is that of benchmarks/throughput.py.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import throughput
from benchmarks.conventional import baseline_device
from benchmarks.gpu.rows import settings_of
from benchmarks.gpu.worker import Measurement, Values
from benchmarks.harness import Pipeline, seconds_per_step
from benchmarks.workload import Case, case_of, loader_of, noise, suite_step, training_step
from sskd.data import Images
from sskd.device import choose_device, tune_device
from sskd.methods import state_without_teacher
from sskd.report.published import published_for
from sskd.runs.checkpoint_file import save_checkpoint

PAIRS = ("wrn_40_2-wrn_16_2", "resnet56-resnet20")
MODES = {"graph": ("auto", "off"), "eager": ("off", "off"), "compiled": ("auto", "default")}


class Key(NamedTuple):
    """What a row measures: by default what the targets are about."""

    pair: str
    work: str
    mode: str = "graph"  # of MODES (values of graph= and compile=), or conventional
    precision: str = "bf16"
    jobs: int = 1

    def __str__(self) -> str:
        return " ".join(map(str, self))


@dataclass(frozen=True)
class Work:
    """A step to measure: a method's ``phase`` (None: the last), or a network ``alone``."""

    method: str
    phase: str | None = None
    alone: bool = False
    has_baseline: bool = True


WORKS = {
    "kd": Work("kd"),
    "sskd": Work("sskd"),
    "ss_head": Work("sskd", "ss_head", has_baseline=False),
    "crd": Work("crd"),
    "teacher": Work("vanilla", alone=True),
}


def grid_pairs() -> list[str]:
    """Return the pairs of the published tables."""
    tables = published_for("cifar100")[0].tables.values()
    return ["-".join(pair) for table in tables for pair in table]


# ---- what to measure ----


def settings(options: argparse.Namespace) -> Values:
    """Return what decides the values of the rows beside their keys."""
    return settings_of(options, "batch", "images", "rounds", "steps", "workers")


def measurements(options: argparse.Namespace) -> Iterator[tuple[str, Measurement]]:
    """Yield the measurement of each key."""
    first = case_for(options, Key(options.pairs[0], "kd"))
    yield f"evaluation {first.pair}", partial(time_evaluation, first)
    yield f"checkpoint {first.pair}", partial(time_checkpoint, first)
    for key in keys(options):
        yield str(key), measurement_of(options, key)


def keys(options: argparse.Namespace) -> Iterator[Key]:
    """Yield what to measure, the most important first; some come more than once."""
    alone = [Key(pair, work) for pair in options.pairs for work in options.works]
    in_grid = [work for work in ("kd", "sskd") if work in options.works]
    grid = [Key(pair, work) for pair in options.grid_pairs for work in in_grid]
    yield from alone
    with_baseline = [key for key in alone if WORKS[key.work].has_baseline]
    yield from (key._replace(mode="conventional", precision="fp32") for key in with_baseline)
    yield from (key._replace(jobs=max(options.jobs)) for key in [*alone, *grid])
    modes = [mode for mode in options.modes if mode != "compiled"]
    for mode, precision in product(modes, options.precisions):
        yield from (key._replace(mode=mode, precision=precision) for key in alone)
    for jobs in options.jobs:
        yield from (key._replace(jobs=jobs) for key in alone)
    if "compiled" in options.modes:
        yield from (key._replace(mode="compiled") for key in alone)


def measurement_of(options: argparse.Namespace, key: Key) -> Measurement:
    """Return the function that measures ``key``."""
    case, turns = case_for(options, key), (options.rounds, options.steps)
    if key.mode == "conventional":
        return partial(time_conventional, case, turns)
    graph, compile_ = MODES[key.mode]
    case = replace(case, precision=key.precision, graph=graph, compile=compile_)
    return partial(time_suite, case, WORKS[key.work].phase, jobs=key.jobs, turns=turns)


def case_for(options: argparse.Namespace, key: Key) -> Case:
    """Return the case of a work on a pair, in float32."""
    work, teacher = WORKS[key.work], key.pair.split("-")[0]
    networks = f"{teacher}-{teacher}" if work.alone else key.pair
    return case_of(options, pair=networks, method=work.method)


# ---- the measurements, each in the process of a worker ----


def time_suite(case: Case, phase: str | None, *, jobs: int, turns: tuple[int, int]) -> Values:
    """Time the training steps of ``jobs`` jobs side by side."""
    device = choose_device(case.device)
    tune_device(device)
    forget_earlier(device)
    images = images_on(device, case.images)

    def build() -> tuple[torch.cuda.Stream | None, Pipeline]:
        pipeline = suite_step(case, images, loader_of(case, images), phase)
        return torch.cuda.current_stream(device) if device.type == "cuda" else None, pipeline

    return time_jobs([build() for _ in range(jobs)], turns)


def time_conventional(case: Case, turns: tuple[int, int]) -> Values:
    """Time the training step of the conventional pipeline."""
    device = baseline_device(case.device)
    forget_earlier(device)
    pipeline = throughput.baseline_training(case, images_on(device, case.images))
    return time_jobs([(None, pipeline)], turns)


def time_jobs(
    jobs: list[tuple[torch.cuda.Stream | None, Pipeline]], turns: tuple[int, int]
) -> Values:
    """Take steps of all jobs in turn; return the seconds of a step of one, and of each round."""
    (_, first), *_ = jobs
    number, steps = turns

    def take() -> None:
        for stream, pipeline in jobs:
            with torch.cuda.stream(stream):
                pipeline.step()

    rounds = []
    for _ in range(number + 1):  # the first round fills caches, and captures
        for _ in range(first.warmup):
            take()
        rounds.append(seconds_per_step(take, first.device, steps) / len(jobs))
    reserved = torch.cuda.memory_reserved() / 2**20 if first.device.type == "cuda" else 0.0
    seconds = statistics.median(rounds[1:])
    return {"seconds": seconds, "rounds": rounds[1:], "images": first.images, "mib": reserved}


def time_evaluation(case: Case) -> Values:
    """Time the evaluation of the student on the test images."""
    student = case.pair.split("-")[1]
    side = throughput.Side("evaluation", replace(case, pair=f"{student}-{student}"), suite=True)
    device = choose_device(case.device)
    forget_earlier(device)
    return time_jobs([(None, throughput.pipeline(side))], (3, 1))


def time_checkpoint(case: Case) -> Values:
    """Time the writing of a checkpoint after a step."""
    device = choose_device(case.device)
    images = images_on(device, case.images)
    step = training_step(case.config, images, loader_of(case, images), None)
    step.take()
    content = {
        "module": state_without_teacher(step.method),
        "optimizer": step.optimizer.state_dict(),
        "model": step.phase.trains.state_dict(),
    }
    with tempfile.TemporaryDirectory() as folder:
        last, previous = Path(folder, "last.pt"), Path(folder, "previous.pt")
        started = time.perf_counter()
        for _ in range(3):
            save_checkpoint(last, content, keep=previous)
        return {"seconds": (time.perf_counter() - started) / 3}


@cache
def images_on(device: torch.device, count: int) -> Images:
    """Return the images of noise of this process."""
    return noise(count, device)


def forget_earlier(device: torch.device) -> None:
    """Free what earlier measurements of this process have left."""
    throughput.pipeline.cache_clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
