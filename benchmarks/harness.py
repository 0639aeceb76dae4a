"""What the benchmarks share: options, processes, timing in turns, peak memory and result files."""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from sskd.device import choose_device

WARMUP = 4  # steps that are not timed; on a GPU the last of them captures the CUDA graph
Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Pipeline:
    """A step in two parts: ``draw`` returns a batch, ``train`` uses it.

    A step processes ``images`` images. The first ``warmup`` steps of a round are not timed.
    ``whole`` does both parts, if they can be one, as in a CUDA graph.
    """

    draw: Callable[[], Any]
    train: Callable[[Any], object]
    device: torch.device
    images: int
    warmup: int = 1
    whole: Callable[[], object] | None = None

    def step(self) -> None:
        """Draw a batch and train on it."""
        if self.whole is None:
            self.train(self.draw())
        else:
            self.whole()

    def one_by_one(self) -> None:
        """Take a step in its two parts: a replay hides its operations and its memory."""
        self.train(self.draw())

    def warm_up(self) -> None:
        """Take the steps that are not timed."""
        for _ in range(self.warmup):
            self.step()


# ---- the command line ----


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=50_000, help="training images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--compile", default="auto", help="compile= of the training commands")
    parser.add_argument("--graph", default="auto", help="graph= of the training commands")
    parser.add_argument(
        "--precompute",
        action="store_true",
        help="read the teacher's outputs from a file (of noise, in TMPDIR) if the method supports "
        "teacher.precompute=true",
    )
    parser.add_argument("--out", type=Path, help="also write OUT.md and OUT.json")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options of the command line, with one device for all processes."""
    options = parser.parse_args()
    options.device = str(choose_device(options.device))
    return options


def machine_of(options: argparse.Namespace) -> str:
    """Describe the machine and the settings that all of its measurements share."""
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    parts = [
        f"{device.type} ({torch.cuda.get_device_name(device) if on_gpu else platform.machine()})",
        *([f"{torch.get_num_threads()} threads"] if device.type == "cpu" else []),
        f"compile={options.compile}",
        *([f"graph={options.graph}"] if on_gpu else []),
        f"torch {torch.__version__}",
        *(["teacher's outputs precomputed"] if options.precompute else []),
    ]
    return ", ".join(parts)


# ---- processes and time ----


def new_process() -> ProcessPoolExecutor:
    """Return an executor with one process, which shares no memory with this one."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def call(process: ProcessPoolExecutor, function: Callable[[], Value]) -> Value:
    """Call ``function`` in ``process`` and wait for its result."""
    return process.submit(function).result()


def take_turns(measures: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """Call each of ``measures`` once a round, in reverse order every other round.

    So all of them see the machine in the same state, and none is always first.
    """
    values: dict[Key, list[float]] = {key: [] for key in measures}
    for number in range(rounds):
        keys = list(measures)
        for key in reversed(keys) if number % 2 else keys:
            values[key].append(measures[key]())
    return values


def seconds_per_step(step: Callable[[], object], device: torch.device, steps: int = 1) -> float:
    """Time ``steps`` steps, including the work that they leave to the device."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise(device)
    return (time.perf_counter() - started) / steps


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device, after: Callable[[], object] = lambda: None) -> float:
    """Call ``after`` a few times; return the peak in MiB of a GPU's allocations or the process.

    On a GPU the first call, in which cuDNN tries its algorithms, does not count.
    """
    after()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARMUP):
        after()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


# ---- result files ----


def table_row(cells: Iterable[object]) -> str:
    """Return a row of a markdown table."""
    return "|" + "|".join(f" {cell} " if cell != "" else " " for cell in cells) + "|"


def table_head(columns: Sequence[str], text_columns: int) -> list[str]:
    """Return the first two lines of a markdown table; all but ``text_columns`` hold numbers."""
    rules = ["---"] * text_columns + ["--:"] * (len(columns) - text_columns)
    return [table_row(columns), "|" + "|".join(rules) + "|"]


def write_results(
    options: argparse.Namespace, measured: Mapping[str, Any], lines: Sequence[str]
) -> None:
    """Write ``lines`` as markdown and ``measured`` as JSON, if the options name a path."""
    if options.out is None:
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    recorded = {key: value for key, value in vars(options).items() if key != "out"}
    results = {"options": recorded, "machine": machine_of(options), **measured}
    options.out.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
