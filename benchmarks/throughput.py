"""Images a second, beside the conventional pipeline: training steps, augmentation, evaluation.

    python -m benchmarks.throughput --out results/throughput

Each work has a process for the conventional pipeline (benchmarks/conventional), which computes in
float32, and one for the suite's in each precision. They take strict turns, the order reversed every
other round: steps that do not count, until what workers have drawn ahead is used up, then the
round's steps as fast as they come. The ratio is the median over the rounds, with the smallest and
the largest. The images are noise, as many and as large as CIFAR-100's.

The second table tells which share of the hardware's ceiling the suite's steps reach, of matrix
products alone and of the op-by-op roofline (benchmarks/ceiling), measured in the same processes.

works: teacher, the first network of the pair alone; kd, sskd, crd, the pair by a method; views,
four views of each image drawn and augmented by one thread; evaluation of 10,000 images.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceiling import count_work, flop_share, measure_hardware, roofline_share
from benchmarks.conventional import (
    CONVENTIONAL,
    Conventional,
    RotatedSamples,
    Samples,
    evaluate,
    loader_of,
)
from benchmarks.methods import composed, learner, noise, peak_memory, synchronise
from sskd.data import Batch, Images, Loader
from sskd.device import choose_device, place
from sskd.evaluation import accuracy, predict
from sskd.methods import METHODS
from sskd.models import build_model

EVALUATED = 10_000
VIEWS = METHODS["sskd"].views
WORKS = ("teacher", "kd", "sskd", "crd", "views", "evaluation")


@dataclass(frozen=True)
class Side:
    """One pipeline's figures: seconds a step in each round, share of data, peak memory in MiB.

    ``flop_share`` and ``roofline_share`` are the step's shares of the hardware's ceiling.
    """

    rounds: list[float]
    images: int
    data_share: float
    memory: float
    flop_share: float | None = None
    roofline_share: float | None = None

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds


@dataclass(frozen=True)
class Row:
    """One work, by both."""

    work: str
    pair: str
    precision: str
    ours: Side
    theirs: Side

    @property
    def ratio(self) -> tuple[float, float, float]:
        """The smallest, the median and the largest ratio of a round: how many times as fast."""
        pairs = zip(self.theirs.rounds, self.ours.rounds, strict=True)
        ratios = [theirs / ours for theirs, ours in pairs]
        return min(ratios), statistics.median(ratios), max(ratios)


# ---- what runs in a process of its own ----


@dataclass
class Pipeline:
    """``draw`` gets a batch, ``learn`` does the rest; ``ahead`` steps may have been drawn."""

    draw: Callable[[], Any]
    learn: Callable[[Any], object]
    device: torch.device
    ahead: int = 0

    def step(self) -> None:
        """Draw a batch and learn it."""
        self.learn(self.draw())


_here: list[Pipeline] = []


def begin(work: str, pair: str, precision: str | None, options: argparse.Namespace) -> None:
    """Make this process's pipeline: the suite's in ``precision``, or without one the other."""
    device = choose_device(options.device)
    if work == "views":
        torch.set_num_threads(1)
    images = noise(options.images, device)
    tested = images.train.take(torch.arange(min(options.images, EVALUATED), device=device))
    images = replace(images, test=tested)
    if precision is None:
        _here.append(conventional(work, pair, images, options))
    else:
        own = argparse.Namespace(**{**vars(options), "precision": precision})
        _here.append(suite(work, pair, images, own))


def run_round(steps: int) -> float:
    """Return the seconds a step, over ``steps`` of them."""
    (pipeline,) = _here
    for _ in range(1 + pipeline.ahead):
        pipeline.step()
    synchronise(pipeline.device)
    started = time.perf_counter()
    for _ in range(steps):
        pipeline.step()
    synchronise(pipeline.device)
    return (time.perf_counter() - started) / steps


def tell_more(steps: int) -> tuple[float, float]:
    """Return the share of the time that goes into getting data, and the peak memory in MiB."""
    (pipeline,) = _here
    for _ in range(pipeline.ahead):
        pipeline.step()
    drawing = learning = 0.0
    for _ in range(steps):
        started = time.perf_counter()
        batch = pipeline.draw()
        synchronise(pipeline.device)
        drawn = time.perf_counter()
        pipeline.learn(batch)
        synchronise(pipeline.device)
        drawing += drawn - started
        learning += time.perf_counter() - drawn
    memory = peak_memory(pipeline.device) + _workers_memory()
    return drawing / (drawing + learning), memory


def tell_ceiling(precision: str, seconds: float) -> tuple[float, float]:
    """Return a step's shares of the ceiling: of matrix products, and of the roofline."""
    (pipeline,) = _here
    hardware = measure_hardware(pipeline.device, precision)
    work = count_work(pipeline.step, hardware)
    return flop_share(work, seconds), roofline_share(work, seconds)


def _workers_memory() -> float:
    """Return what the worker processes keep in memory, in MiB, what they share counted once."""
    total = 0
    for children in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for child in children.read_text().split():
            lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def suite(work: str, pair: str, images: Images, options: argparse.Namespace) -> Pipeline:
    """Return the suite's pipeline."""
    device = images.train.images.device
    views = 1 if work == "teacher" else METHODS[work].views if work in METHODS else VIEWS
    loader = Loader(images.train, images.mean, images.std, options.batch, views)

    def draw() -> Batch:
        if loader.position == loader.steps:
            loader.begin_epoch(0)
        return loader.next_batch()

    teacher, _ = pair.split("-")
    if work == "evaluation":
        network = build_model(teacher, images.num_classes)
        place(network, device)
        return Pipeline(
            lambda: images.test,
            lambda split: accuracy(predict(network, split, images), split.labels),
            device,
        )
    if work == "teacher":
        config = composed(f"{teacher}-{teacher}", "vanilla", options)
        return Pipeline(draw, learner(config, "train", images), device)
    if work == "views":
        return Pipeline(draw, lambda batch: None, device)
    return Pipeline(draw, learner(composed(pair, work, options), "distill", images), device)


def conventional(work: str, pair: str, images: Images, options: argparse.Namespace) -> Pipeline:
    """Return the conventional pipeline."""
    device = images.train.images.device
    teacher, student = (build_model(name, images.num_classes) for name in pair.split("-"))
    if work == "views":
        samples = RotatedSamples(images, train=True)
        chosen = iter(lambda: torch.randint(len(samples), (options.batch,)).tolist(), None)
        return Pipeline(
            lambda: torch.stack([samples[i][0] for i in next(chosen)]), lambda batch: None, device
        )
    if work == "evaluation":
        network = teacher.to(device)
        loader = loader_of(Samples(images, train=False), options.batch, options.workers)
        return Pipeline(lambda: loader, lambda every: evaluate(network, every, device), device)
    kind = CONVENTIONAL.get(work, Conventional)
    trained = teacher if work == "teacher" else student
    side = kind(trained, teacher, images, options.batch, options.workers)
    return Pipeline(side.draw, side.learn, device, ahead=2 * options.workers)


# ---- the processes' turns ----


def compare(work: str, pair: str, options: argparse.Namespace) -> list[Row]:
    """Return a row for each precision."""
    precisions: list[str | None] = [None, *options.precisions]
    if work in ("views", "evaluation"):  # the one is uint8, the other always float32
        precisions = [None, "fp32"]
    context = get_context("spawn")
    with ExitStack() as stack:
        turns = {each: stack.enter_context(ProcessPoolExecutor(1, context)) for each in precisions}
        for precision, process in turns.items():
            process.submit(begin, work, pair, precision, options).result()
        rounds: dict[str | None, list[float]] = {each: [] for each in precisions}
        steps = 1 if work == "evaluation" else options.steps
        for number in range(options.rounds + 1):
            for precision in reversed(precisions) if number % 2 else precisions:
                taken = turns[precision].submit(run_round, steps).result()
                if number:  # the first round fills caches
                    rounds[precision].append(taken)
        size = min(options.images, EVALUATED) if work == "evaluation" else options.batch
        sides = {}
        for precision, process in turns.items():
            data, memory = process.submit(tell_more, steps).result()
            shares: tuple[float | None, float | None] = (None, None)
            if precision and work in (*METHODS, "teacher"):
                middle = statistics.median(rounds[precision])
                shares = process.submit(tell_ceiling, precision, middle).result()
            sides[precision] = Side(rounds[precision], size, data, memory, *shares)
    return [Row(work, pair, str(each), sides[each], sides[None]) for each in precisions[1:]]


def main() -> None:
    """Measure what the command line asks for; print and write the tables."""
    options = parse_options()
    rows: list[Row] = []
    print(f"{title(options)}\n\n{HEADER}", flush=True)
    for work in options.works:
        for row in compare(work, options.crd_pair if work == "crd" else options.pair, options):
            rows.append(row)
            print(tell(row), flush=True)
    print("\n" + "\n".join(ceilings(rows)))
    if options.out:
        write(options, rows)


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--pair", default="wrn_40_2-wrn_16_2", metavar="TEACHER-STUDENT")
    parser.add_argument("--crd-pair", default="resnet56-resnet20", metavar="TEACHER-STUDENT")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], metavar="PRECISION")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--images", type=int, default=50_000, help="training images")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--compile", default="auto", help="as of the training commands")
    parser.add_argument("--out", type=Path, help="write PATH.md and PATH.json as well")
    options = parser.parse_args()
    options.precisions = options.precisions or ["fp32", "bf16"]
    return options


HEADER = """\
| work | pair | precision | conventional, images/s | suite, images/s | ratio | its range | \
data, conventional | data, suite | MiB, conventional | MiB, suite |
|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"""
CEILING_HEADER = """\
| work | pair | precision | ms a step | of the matrix-product rate | of the op-by-op roofline |
|---|---|---|--:|--:|--:|"""


def title(options: argparse.Namespace) -> str:
    """Return what was measured, in words."""
    device = choose_device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = f"{torch.get_num_threads()} threads, " if device.type == "cpu" else ""
    return (
        f"Batch {options.batch}, {device.type} ({where}), {threads}{options.workers} workers of "
        f"the conventional pipeline, compile={options.compile}, torch {torch.__version__}"
    )


def tell(row: Row) -> str:
    """Return a work as a row of the first table."""
    least, middle, most = row.ratio
    figures = [
        f"{row.theirs.rate:,.0f}",
        f"{row.ours.rate:,.0f}",
        f"{middle:.2f}",
        f"{least:.2f} to {most:.2f}",
        f"{100 * row.theirs.data_share:.0f} %",
        f"{100 * row.ours.data_share:.0f} %",
        f"{row.theirs.memory:,.0f}",
        f"{row.ours.memory:,.0f}",
    ]
    return f"| {row.work} | {row.pair} | {row.precision} | " + " | ".join(figures) + " |"


def ceilings(rows: list[Row]) -> list[str]:
    """Return the second table's lines."""
    lines = CEILING_HEADER.splitlines()
    for row in rows:
        if row.ours.flop_share is not None and row.ours.roofline_share is not None:
            shares = f"{100 * row.ours.flop_share:.0f} % | {100 * row.ours.roofline_share:.0f} %"
            step = f"{1000 * row.ours.seconds:.1f}"
            lines.append(f"| {row.work} | {row.pair} | {row.precision} | {step} | {shares} |")
    return lines


def write(options: argparse.Namespace, rows: list[Row]) -> None:
    """Write the tables as markdown and every figure as JSON."""
    lines = [title(options), "", *HEADER.splitlines(), *map(tell, rows), "", *ceilings(rows)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    told = {key: value for key, value in vars(options).items() if key != "out"}
    figures = {"options": told, "title": title(options), "rows": [asdict(row) for row in rows]}
    options.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
