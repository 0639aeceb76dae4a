"""How the suite's step scales: with the batch, and with cells side by side on one device.

    python -m benchmarks.scale --out results/scale

The first table takes the batch from 64 images to 1,024, each in a process of its own. The second
lets 1, 2, 4 and 8 processes take steps at the same time, for some seconds; on a CPU they share the
cores evenly. What counts is all of their images a second together.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context

import torch

from benchmarks.methods import (
    add_shared_options,
    composed,
    described,
    noise,
    peak_memory,
    stepper,
    synchronise,
)
from sskd.data import Loader
from sskd.device import choose_device
from sskd.methods import METHODS

WARMUP = 3
TOGETHER = 3  # steps between two looks at the clock, which wait for a GPU


@dataclass(frozen=True)
class Scale:
    """A batch size and a number of processes; memory in MiB is one process's peak."""

    batch: int
    cells: int
    images_per_second: float
    memory: float


def main() -> None:
    """Measure what the command line asks for; print and write the tables."""
    options = parse_options()
    batches = [measure(batch, 1, options) for batch in options.batches]
    lines = [f"{options.method}, {options.pair}, {options.precision}, {described(options)}", ""]
    lines += table("batch", [(scale.batch, scale) for scale in batches])
    cells = [measure(options.batches[0], count, options) for count in options.cells]
    lines += ["", *table("cells side by side", [(scale.cells, scale) for scale in cells])]
    print("\n".join(lines))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
        told = {key: value for key, value in vars(options).items() if key != "out"}
        figures = {"options": told, "scales": [asdict(scale) for scale in [*batches, *cells]]}
        options.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", default="wrn_40_2-wrn_16_2", metavar="TEACHER-STUDENT")
    parser.add_argument("--method", choices=METHODS, default="kd")
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--cells", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    add_shared_options(parser)
    options = parser.parse_args()
    options.device = str(choose_device(options.device))  # one for all processes
    return options


def measure(batch: int, cells: int, options: argparse.Namespace) -> Scale:
    """Return what ``cells`` processes do at the same time."""
    with ExitStack() as stack:
        context = get_context("spawn")
        workers = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(cells)]
        prepared = [worker.submit(prepare, batch, cells, options) for worker in workers]
        for each in prepared:
            each.result()
        running = [worker.submit(run, options.seconds) for worker in workers]
        told = [each.result() for each in running]
    steps = sum(rate for rate, _ in told)
    return Scale(batch, cells, batch * steps, max(memory for _, memory in told))


_step: list[tuple[Callable[[], object], torch.device]] = []


def prepare(batch: int, cells: int, options: argparse.Namespace) -> None:
    """Make this process's cell, and take its first steps."""
    device = choose_device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // cells))
    images = noise(options.images, device)
    chosen = argparse.Namespace(**{**vars(options), "batch": batch})
    views = METHODS[options.method].views
    loader = Loader(images.train, images.mean, images.std, batch, views)
    step = stepper(composed(options.pair, options.method, chosen), "distill", images, loader)
    for _ in range(WARMUP):
        step()
    synchronise(device)
    _step.append((step, device))


def run(seconds: float) -> tuple[float, float]:
    """Take steps for ``seconds``; return steps a second and the peak memory in MiB."""
    ((step, device),) = _step
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(TOGETHER):
            step()
        synchronise(device)
        steps += TOGETHER
    return steps / (time.perf_counter() - started), peak_memory(device, after=step)


def table(title: str, scales: list[tuple[int, Scale]]) -> list[str]:
    """Return a markdown table's lines, each rate beside the first one's."""
    lines = [f"| {title} | images/s | beside the first | MiB of a process |", "|--:|--:|--:|--:|"]
    first = scales[0][1].images_per_second
    for number, scale in scales:
        rate = scale.images_per_second
        lines.append(f"| {number} | {rate:,.0f} | {rate / first:.2f} | {scale.memory:,.0f} |")
    return lines


if __name__ == "__main__":
    main()
