"""How the training step of the suite scales with the batch, and with jobs side by side.

    python -m benchmarks.scale --out results/scale

The first table has batches of 64 to 1,024 images, each in its own process. In the second, 1, 2, 4
and 8 processes take steps on one device at the same time for some seconds; on a CPU they share the
cores evenly. The rate counts the images of all processes.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache

import torch

from benchmarks import harness
from benchmarks.harness import Pipeline
from benchmarks.workload import Case, case_of, loader_of, noise, suite_step
from sskd.device import choose_device, tune_device
from sskd.methods import METHODS
from sskd.precision import PRECISIONS

STEPS = 3  # between two readings of the clock, each of which waits for a GPU


@dataclass(frozen=True)
class Scale:
    """A batch size and a number of jobs side by side; ``memory`` is the peak of one in MiB."""

    batch: int
    jobs: int
    images_per_second: float
    memory: float


def main() -> None:
    """Measure what the command line requests; print and write the tables."""
    options = parse_options()
    batches = [measure(case_of(options, batch=batch), 1, options) for batch in options.batches]
    case = case_of(options, batch=options.batches[0])
    jobs = [measure(case, count, options) for count in options.cells]
    lines = tables(options, harness.machine_of(options), batches, jobs)
    print("\n".join(lines))
    measured = {"scales": [asdict(scale) for scale in [*batches, *jobs]]}
    harness.write_results(options, measured, lines)


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--pair", default="wrn_40_2-wrn_16_2", metavar="TEACHER-STUDENT")
    parser.add_argument("--method", choices=METHODS, default="kd")
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument(
        "--cells", nargs="+", type=int, default=[1, 2, 4, 8], help="numbers of jobs side by side"
    )
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    return harness.parse(parser)


def measure(case: Case, jobs: int, options: argparse.Namespace) -> Scale:
    """Return the rate and memory of ``jobs`` processes that take steps at the same time."""
    with ExitStack() as stack:
        processes = [stack.enter_context(harness.new_process()) for _ in range(jobs)]
        for ready in [process.submit(prepare, case, jobs) for process in processes]:
            ready.result()
        running = [process.submit(run, case, jobs, options.seconds) for process in processes]
        results = [each.result() for each in running]
    steps = sum(rate for rate, _ in results)
    return Scale(case.batch, jobs, case.batch * steps, max(memory for _, memory in results))


def prepare(case: Case, jobs: int) -> None:
    """Build the step of this process and take its first steps."""
    built = pipeline(case, jobs)
    for _ in range(harness.WARMUP):
        built.step()
    harness.synchronise(built.device)


def run(case: Case, jobs: int, seconds: float) -> tuple[float, float]:
    """Take steps for ``seconds``; return steps a second and the peak memory in MiB."""
    built = pipeline(case, jobs)
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(STEPS):
            built.step()
        harness.synchronise(built.device)
        steps += STEPS
    rate = steps / (time.perf_counter() - started)
    return rate, harness.peak_memory(built.device, after=built.one_by_one)


@cache
def pipeline(case: Case, jobs: int) -> Pipeline:
    """Return the training step of this process, one of ``jobs``, which the first call builds."""
    device = choose_device(case.device)
    tune_device(device)
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    images = noise(case.images, device)
    return suite_step(case, images, loader_of(case, images))


def tables(
    options: argparse.Namespace, machine: str, batches: list[Scale], jobs: list[Scale]
) -> list[str]:
    """Return the lines of both tables."""
    title = f"{options.method}, {options.pair}, {options.precision}, {machine}"
    by_batch = table("batch", [(scale.batch, scale) for scale in batches])
    by_jobs = table("jobs side by side", [(scale.jobs, scale) for scale in jobs])
    return [title, "", *by_batch, "", *by_jobs]


def table(name: str, scales: list[tuple[int, Scale]]) -> list[str]:
    """Return a table's lines, with the ratio of each rate to the first."""
    lines = harness.table_head([name, "images/s", "ratio to the first", "MiB of a process"], 0)
    first = scales[0][1].images_per_second
    for number, scale in scales:
        rate = scale.images_per_second
        numbers = [f"{rate:,.0f}", f"{rate / first:.2f}", f"{scale.memory:,.0f}"]
        lines.append(harness.table_row([number, *numbers]))
    return lines


if __name__ == "__main__":
    main()
