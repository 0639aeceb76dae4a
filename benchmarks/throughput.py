"""Images a second of the suite and of the conventional pipeline.

    python -m benchmarks.throughput --out results/throughput

Each kind of work has one process for the conventional pipeline (benchmarks/conventional.py), which
computes in float32 (on an NVIDIA GPU with PyTorch's default, convolutions in TF32), and one for the
suite in each precision. The processes take turns, in reverse
order every other round. A round starts with untimed steps, which use up the batches that workers
have loaded in advance. The ratio is the median over the rounds, with the smallest and the largest.
The images are noise, with the number and size of CIFAR-100.

The conventional pipeline evaluates in batches of the training size, as most distillation code does,
the suite on a CPU in batches of 64. On a CPU the workers share the cores with the step.

The second table has the share of the device's matrix-product rate that the steps of the suite
reach (benchmarks/ceiling.py), measured in the same processes. The third has the hours of a run of
the published length.

Works: teacher, the first network of the pair alone; kd, sskd, crd, the pair with that method;
views, four views of each image drawn and augmented by one thread; evaluation of 10,000 images.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import conventional, harness
from benchmarks.ceiling import flop_share
from benchmarks.harness import Pipeline, new_process, table_head, table_row, take_turns
from benchmarks.workload import Case, case_of, drawer, loader_of, noise, suite_step
from sskd.data import Images, Split
from sskd.device import choose_device, to_device, tune_device
from sskd.models import build_model
from sskd.precision import PRECISIONS
from sskd.training.evaluation import accuracy, predict

TEST_IMAGES = 10_000
IMAGES_PER_RUN = 240 * 50_000  # of the published length
EAGER = ("auto", "off")  # values of compile= that compile nothing here

# ---- how the suite and the conventional pipeline do each kind of work ----

Build = Callable[[Case, Images], Pipeline]


def suite_training(case: Case, images: Images) -> Pipeline:
    """Return a training step of the suite."""
    return suite_step(case, images, loader_of(case, images))


def suite_views(case: Case, images: Images) -> Pipeline:
    """Return a step that draws the views of each image with one thread."""
    torch.set_num_threads(1)
    draw = drawer(loader_of(case, images))
    return Pipeline(draw, lambda batch: None, _device(images), case.batch)


def suite_evaluation(case: Case, images: Images) -> Pipeline:
    """Return a step that computes the accuracy on the test images."""
    network = build_model(case.pair.split("-")[0], images.num_classes, images.image_size)
    to_device(network, _device(images))

    def score(split: Split) -> float:
        return accuracy(predict(network, split, images, "the network"), split.labels)

    return Pipeline(lambda: images.test, score, _device(images), len(images.test), warmup=0)


def baseline_training(case: Case, images: Images) -> Pipeline:
    """Return a training step of the conventional pipeline."""
    teacher, student = (
        build_model(name, images.num_classes, images.image_size) for name in case.pair.split("-")
    )
    side = conventional.CONVENTIONAL[case.method](
        student, teacher, images, batch_size=case.batch, workers=case.workers
    )
    warmup = 1 + 2 * case.workers
    return Pipeline(side.draw, side.train, _device(images), case.batch, warmup=warmup)


def baseline_views(case: Case, images: Images) -> Pipeline:
    """Return a step that draws the views of one image after the other, with one thread."""
    torch.set_num_threads(1)
    samples = conventional.RotatedSamples(images, train=True)

    def draw() -> Tensor:
        chosen = torch.randint(len(samples), (case.batch,)).tolist()
        return torch.stack([samples[position][0] for position in chosen])

    return Pipeline(draw, lambda batch: None, _device(images), case.batch)


def baseline_evaluation(case: Case, images: Images) -> Pipeline:
    """Return a step that computes the accuracy from workers, with a copy to the host a batch."""
    device = _device(images)
    network = build_model(case.pair.split("-")[0], images.num_classes, images.image_size).to(device)
    samples = conventional.Samples(images, train=False)
    loader = conventional.loader_of(samples, case.batch, case.workers)
    score = partial(conventional.evaluate, network, device=device)
    return Pipeline(lambda: loader, score, device, len(images.test), warmup=0)


def _device(images: Images) -> torch.device:
    return images.train.images.device


@dataclass(frozen=True)
class Work:
    """A kind of work.

    ``pair_option`` is the command-line option that names the networks; ``alone`` takes the first
    of them without a teacher. ``device`` and ``steps`` replace those of the command line. Work that
    does not train has no precision, FLOPs or hours.
    """

    method: str = "vanilla"
    suite: Build = suite_training
    baseline: Build = baseline_training
    pair_option: str = "pair"
    alone: bool = False
    trains: bool = True
    device: str | None = None
    steps: int | None = None


WORKS = {
    "teacher": Work(alone=True),
    "kd": Work("kd"),
    "sskd": Work("sskd"),
    "crd": Work("crd", pair_option="crd_pair"),
    "views": Work("sskd", suite_views, baseline_views, trains=False, device="cpu"),
    "evaluation": Work(suite=suite_evaluation, baseline=baseline_evaluation, trains=False, steps=1),
}

# ---- the measurement of one pipeline, in its process ----


class Side(NamedTuple):
    """A pipeline that takes part: the suite, or the conventional one."""

    work: str
    case: Case
    suite: bool


@dataclass(frozen=True)
class Measured:
    """What a pipeline needed for a step of ``images`` images.

    ``rounds`` has the seconds a step in each round, ``data_share`` the share of the time spent on
    getting data, ``memory`` the peak in MiB, ``flop_share`` the result of ``ceiling.flop_share``.
    """

    rounds: list[float]
    images: int
    data_share: float
    memory: float
    flop_share: float | None = None

    @property
    def seconds(self) -> float:
        """Median seconds a step."""
        return statistics.median(self.rounds)

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds


@cache
def pipeline(side: Side) -> Pipeline:
    """Return the pipeline of this process, which the first call builds."""
    work = WORKS[side.work]
    choose = choose_device if side.suite else conventional.baseline_device
    device = choose(work.device or side.case.device)
    if side.suite:  # the settings of the suite must not speed up the other pipeline
        tune_device(device)
    images = noise(side.case.images, device)
    tested = torch.arange(min(side.case.images, TEST_IMAGES), device=device)
    images = replace(images, test=images.train.take(tested))
    return (work.suite if side.suite else work.baseline)(side.case, images)


def run_round(side: Side, steps: int) -> float:
    """Return the seconds a step, over ``steps`` steps after the warm-up."""
    built = pipeline(side)
    built.warm_up()
    return harness.seconds_per_step(built.step, built.device, steps)


def measure(side: Side, steps: int, rounds: list[float], flops: bool) -> Measured:
    """Add to the ``rounds`` the share of data, the memory and, if ``flops``, the FLOP share."""
    built = pipeline(side)
    share = data_share(built, steps)
    memory = harness.peak_memory(built.device, after=built.one_by_one) + _workers_memory()
    measured = Measured(rounds, built.images, share, memory)
    if not flops:
        return measured
    reached = flop_share(built.one_by_one, measured.seconds, built.device, side.case.precision)
    return replace(measured, flop_share=reached)


def data_share(built: Pipeline, steps: int) -> float:
    """Return the share of the time that goes into getting data."""
    built.warm_up()
    drawing = training = 0.0
    for _ in range(steps):
        started = time.perf_counter()
        batch = built.draw()
        harness.synchronise(built.device)
        drawn = time.perf_counter()
        built.train(batch)
        harness.synchronise(built.device)
        drawing += drawn - started
        training += time.perf_counter() - drawn
    return drawing / (drawing + training)


def _workers_memory() -> float:
    """Return the private memory of all worker processes in MiB."""
    total = 0
    for children in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for child in children.read_text().split():
            lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Private"))
    return total / 1024


# ---- both pipelines in turns ----


@dataclass(frozen=True)
class Row:
    """One kind of work by both pipelines, the suite in ``precision``."""

    work: str
    pair: str
    precision: str
    suite: Measured
    baseline: Measured

    @property
    def ratio(self) -> tuple[float, float, float]:
        """How many times as fast the suite is: smallest, median and largest over the rounds."""
        rounds = zip(self.baseline.rounds, self.suite.rounds, strict=True)
        ratios = [baseline / suite for baseline, suite in rounds]
        return min(ratios), statistics.median(ratios), max(ratios)


class Turns(NamedTuple):
    """The rounds, the steps of each, the precisions of the suite, and whether to count FLOPs."""

    rounds: int
    steps: int
    precisions: Sequence[str]
    flops: bool


def compare(name: str, case: Case, turns: Turns) -> list[Row]:
    """Measure one kind of work by both pipelines; return a row for each precision."""
    work = WORKS[name]
    networks = "-".join([case.pair.split("-")[0]] * 2) if work.alone else case.pair
    built = replace(case, method=work.method, pair=networks)
    precisions = turns.precisions if work.trains else ["fp32"]
    baseline = Side(name, built, suite=False)
    suites = [Side(name, replace(built, precision=each), suite=True) for each in precisions]
    steps = work.steps or turns.steps
    flops = turns.flops and work.trains and case.compile in EAGER
    with ExitStack() as stack:
        processes = {side: stack.enter_context(new_process()) for side in (baseline, *suites)}
        timers = {
            side: partial(harness.call, process, partial(run_round, side, steps))
            for side, process in processes.items()
        }
        # The first round builds the pipelines and fills caches.
        rounds = {side: each[1:] for side, each in take_turns(timers, turns.rounds + 1).items()}
        measured = {
            side: harness.call(
                process, partial(measure, side, steps, rounds[side], flops=flops and side.suite)
            )
            for side, process in processes.items()
        }
    return [
        Row(
            name,
            case.pair,
            side.case.precision,
            suite=measured[side],
            baseline=measured[baseline],
        )
        for side in suites
    ]


def main() -> None:
    """Measure what the command line requests; print and write the tables."""
    options = parse_options()
    turns = Turns(options.rounds, options.steps, options.precisions, flops=True)
    rows: list[Row] = []
    title = title_of(options, harness.machine_of(options))
    print("\n".join([title, "", *table_head(COLUMNS, text_columns=3)]), flush=True)
    for name in options.works:
        pair = getattr(options, WORKS[name].pair_option)
        for row in compare(name, case_of(options, pair=pair), turns):
            rows.append(row)
            print(rate_row(row), flush=True)
            measured = {"rows": [asdict(each) for each in rows]}
            harness.write_results(options, measured, tables(title, rows))
    print("\n" + "\n".join([*flop_table(rows), "", *hours_table(rows)]))


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--pair", default="wrn_40_2-wrn_16_2", metavar="TEACHER-STUDENT")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=["fp32", "bf16"],
        metavar="PRECISION",
    )
    add_turns(parser, rounds=5, steps=4)
    return harness.parse(parser)


def add_turns(parser: argparse.ArgumentParser, rounds: int, steps: int) -> None:
    """Add the options of a comparison, with ``rounds`` and ``steps`` as defaults."""
    parser.add_argument("--crd-pair", default="resnet56-resnet20", metavar="TEACHER-STUDENT")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=steps, help="steps of a round")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))


# ---- the tables ----

WHICH = ("work", "pair", "precision")
COLUMNS = (
    *WHICH, "conventional, images/s", "suite, images/s", "ratio", "range",
    "data, conventional", "data, suite", "MiB, conventional", "MiB, suite",
)  # fmt: skip
FLOP_COLUMNS = (*WHICH, "ms a step", "of the matrix-product rate")
HOURS_COLUMNS = (
    "240 epochs of 50,000 images", *WHICH[1:], "conventional, hours", "suite, hours",
)  # fmt: skip


def title_of(options: argparse.Namespace, machine: str) -> str:
    """Return a line with what all rows share."""
    return (
        f"Batch {options.batch}, {machine}, {options.workers} workers of the conventional pipeline"
    )


def tables(title: str, rows: list[Row]) -> list[str]:
    """Return the lines of all three tables."""
    rates = [*table_head(COLUMNS, text_columns=3), *map(rate_row, rows)]
    return [title, "", *rates, "", *flop_table(rows), "", *hours_table(rows)]


def rate_row(row: Row) -> str:
    """Return a row of the first table."""
    least, middle, most = row.ratio
    sides = (row.baseline, row.suite)
    numbers = [
        *(f"{side.rate:,.0f}" for side in sides),
        f"{middle:.2f}",
        f"{least:.2f} to {most:.2f}",
        *(f"{100 * side.data_share:.0f} %" for side in sides),
        *(f"{side.memory:,.0f}" for side in sides),
    ]
    return table_row([row.work, row.pair, row.precision, *numbers])


def flop_table(rows: list[Row]) -> list[str]:
    """Return the second table's lines."""
    lines = table_head(FLOP_COLUMNS, text_columns=3)
    for row in rows:
        if row.suite.flop_share is not None:
            numbers = [f"{1000 * row.suite.seconds:.1f}", f"{100 * row.suite.flop_share:.0f} %"]
            lines.append(table_row([row.work, row.pair, row.precision, *numbers]))
    return lines


def hours_table(rows: list[Row]) -> list[str]:
    """Return the third table's lines, without the hours of evaluation."""
    lines = table_head(HOURS_COLUMNS, text_columns=3)
    for row in rows:
        if WORKS[row.work].trains:
            hours = [IMAGES_PER_RUN / side.rate / 3600 for side in (row.baseline, row.suite)]
            numbers = [f"{each:,.1f}" for each in hours]
            lines.append(table_row([row.work, row.pair, row.precision, *numbers]))
    return lines


if __name__ == "__main__":
    main()
