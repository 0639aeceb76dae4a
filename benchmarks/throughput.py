"""Images a second, beside the conventional pipeline: training steps, augmentation, evaluation.

    python -m benchmarks.throughput --out results/throughput

Each work has a process for the conventional pipeline (benchmarks/conventional), which computes in
float32, and one for the suite's in each precision. They take strict turns, the order reversed every
other round: steps that do not count, until what workers have drawn ahead is used up, then the
round's steps as fast as they come. The ratio is the median over the rounds, with the smallest and
the largest. The images are noise, as many and as large as CIFAR-100's.

The conventional pipeline evaluates in batches of the training's size, as such code does, the suite
on a CPU in batches of 64. On a CPU the workers share the cores with the step.

The second table tells which share of the hardware's ceiling the suite's steps reach, of matrix
products alone and of the op-by-op roofline (benchmarks/ceiling), measured in the same processes.
The third has the hours of a run of the published length.

works: teacher, the first network of the pair alone; kd, sskd, crd, the pair by a method; views,
four views of each image drawn and augmented by one thread; evaluation of 10,000 images.
"""

from __future__ import annotations

import argparse
import json
import os
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
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.ceiling import count_work, flop_share, measure_hardware, roofline_share
from benchmarks.conventional import (
    CONVENTIONAL,
    Conventional,
    RotatedSamples,
    Samples,
    evaluate,
    loader_of,
    opponents_device,
)
from benchmarks.methods import (
    add_shared_options,
    composed,
    described,
    drawer,
    learner,
    noise,
    peak_memory,
    synchronise,
)
from sskd.config import Config
from sskd.data import Batch, Images, Loader, Split
from sskd.device import choose_device, to_device
from sskd.methods import METHODS
from sskd.models import build_model
from sskd.training.evaluation import accuracy, predict

EVALUATED = 10_000
CELL = 240 * 50_000  # images of a run of the published length
VIEWS = METHODS["sskd"].views


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
    """``draw`` gets a batch, ``learn`` does the rest; a round's first ``warmup`` do not count."""

    draw: Callable[[], Any]
    learn: Callable[[Any], object]
    device: torch.device
    warmup: int = 1

    def step(self) -> None:
        """Draw a batch and learn it."""
        self.learn(self.draw())


_here: list[Pipeline] = []


def begin(work: str, pair: str, precision: str | None, options: argparse.Namespace) -> None:
    """Make this process's pipeline: the suite's in ``precision``, or without one the other."""
    name = "cpu" if work == "views" else options.device
    # Choosing a CPU the suite's way sets its memory up, which the other must not profit from.
    device = choose_device(name) if precision else opponents_device(name)
    images = noise(options.images, device)
    tested = images.train.take(torch.arange(min(options.images, EVALUATED), device=device))
    images = replace(images, test=tested)
    ours, theirs = BUILDERS[work]
    own = argparse.Namespace(**{**vars(options), "precision": precision})
    _here.append((ours if precision else theirs)(work, pair, images, own))


def run_round(steps: int) -> float:
    """Return the seconds a step, over ``steps`` of them."""
    (pipeline,) = _here
    for _ in range(pipeline.warmup):
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
    for _ in range(pipeline.warmup):
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
    memory = peak_memory(pipeline.device, after=pipeline.step) + _workers_memory()
    return drawing / (drawing + learning), memory


def tell_ceiling(precision: str, seconds: float) -> tuple[float, float]:
    """Return a step's shares of the ceiling: of matrix products, and of the roofline."""
    (pipeline,) = _here
    hardware = measure_hardware(pipeline.device, precision)
    work = count_work(pipeline.step, hardware)
    return flop_share(work, seconds), roofline_share(work, seconds)


def _workers_memory() -> float:
    """Return what the worker processes keep in memory for themselves alone, in MiB."""
    total = 0
    for children in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for child in children.read_text().split():
            lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Private"))
    return total / 1024


# ---- the works: how the suite does each, and how the conventional pipeline does ----


def suite_step(work: str, pair: str, images: Images, options: argparse.Namespace) -> Pipeline:
    """A step of a method."""
    return _training(composed(pair, work, options), "distill", METHODS[work].views, images, options)


def suite_teacher(_: str, pair: str, images: Images, options: argparse.Namespace) -> Pipeline:
    """A step of the pair's first network alone."""
    teacher, _ = pair.split("-")
    config = composed(f"{teacher}-{teacher}", "vanilla", options)
    return _training(config, "train", 1, images, options)


def suite_views(_: str, pair: str, images: Images, options: argparse.Namespace) -> Pipeline:
    """Four views of each image, by one thread."""
    torch.set_num_threads(1)
    return Pipeline(_drawing(images, VIEWS, options), lambda batch: None, _device(images))


def suite_evaluation(_: str, pair: str, images: Images, options: argparse.Namespace) -> Pipeline:
    """The accuracy on the test images."""
    network = build_model(pair.split("-")[0], images.num_classes)
    to_device(network, _device(images))

    def score(split: Split) -> float:
        return accuracy(predict(network, split, images, "the network"), split.labels)

    return Pipeline(lambda: images.test, score, _device(images), warmup=0)


def conventional_step(
    work: str, pair: str, images: Images, options: argparse.Namespace
) -> Pipeline:
    """A step of a method, or of the first network alone."""
    teacher, student = (build_model(name, images.num_classes) for name in pair.split("-"))
    kind = CONVENTIONAL.get(work)
    if kind is None:
        kind, student = Conventional, teacher
    side = kind(student, teacher, images, options.batch, options.workers)
    return Pipeline(side.draw, side.learn, _device(images), warmup=1 + 2 * options.workers)


def conventional_views(_: str, pair: str, images: Images, options: argparse.Namespace) -> Pipeline:
    """Four views of each image, one image after the other, by one thread."""
    torch.set_num_threads(1)
    samples = RotatedSamples(images, train=True)

    def draw() -> Tensor:
        chosen = torch.randint(len(samples), (options.batch,)).tolist()
        return torch.stack([samples[position][0] for position in chosen])

    return Pipeline(draw, lambda batch: None, _device(images))


def conventional_evaluation(
    _: str, pair: str, images: Images, options: argparse.Namespace
) -> Pipeline:
    """The accuracy on the test images, from workers, with a copy to the host a batch."""
    network = build_model(pair.split("-")[0], images.num_classes).to(_device(images))
    loader = loader_of(Samples(images, train=False), options.batch, options.workers)

    def score(batches: DataLoader) -> float:
        return evaluate(network, batches, _device(images))

    return Pipeline(lambda: loader, score, _device(images), warmup=0)


Build = Callable[[str, str, Images, argparse.Namespace], Pipeline]
BUILDERS: dict[str, tuple[Build, Build]] = {
    "teacher": (suite_teacher, conventional_step),
    **dict.fromkeys(("kd", "sskd", "crd"), (suite_step, conventional_step)),
    "views": (suite_views, conventional_views),
    "evaluation": (suite_evaluation, conventional_evaluation),
}


def _training(
    config: Config, stage: str, views: int, images: Images, options: argparse.Namespace
) -> Pipeline:
    return Pipeline(
        _drawing(images, views, options), learner(config, stage, images), _device(images)
    )


def _drawing(images: Images, views: int, options: argparse.Namespace) -> Callable[[], Batch]:
    return drawer(Loader(images.train, images.mean, images.std, options.batch, views))


def _device(images: Images) -> torch.device:
    return images.train.images.device


# ---- the processes' turns ----


def compare(work: str, pair: str, options: argparse.Namespace) -> list[Row]:
    """Return a row for each precision, with the shares of the ceiling if the options want them."""
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
            # A compiled step has operations of its own, of which the count would know nothing.
            trains = work in (*METHODS, "teacher")
            if options.ceiling and precision and trains and options.compile in ("auto", "off"):
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
            if options.out:
                write(options, rows)
    print("\n" + "\n".join([*ceilings(rows), "", *hours(rows)]))


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", nargs="+", choices=BUILDERS, default=list(BUILDERS))
    parser.add_argument("--pair", default="wrn_40_2-wrn_16_2", metavar="TEACHER-STUDENT")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], metavar="PRECISION")
    add_turns(parser, rounds=5, steps=4)
    add_shared_options(parser)
    options = resolve(parser.parse_args())
    options.precisions = options.precisions or ["fp32", "bf16"]
    options.ceiling = True
    return options


def add_turns(parser: argparse.ArgumentParser, rounds: int, steps: int) -> None:
    """Add the options of ``compare``, with defaults for its ``rounds`` and their ``steps``."""
    parser.add_argument("--crd-pair", default="resnet56-resnet20", metavar="TEACHER-STUDENT")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=steps, help="of a round")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))


def resolve(options: argparse.Namespace) -> argparse.Namespace:
    """Return ``options`` with one device for all processes."""
    options.device = str(choose_device(options.device))
    return options


HEADER = """\
| work | pair | precision | conventional, images/s | suite, images/s | ratio | its range | \
data, conventional | data, suite | MiB, conventional | MiB, suite |
|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"""
HOURS_HEADER = """\
| 240 epochs of 50,000 images | pair | precision | conventional, hours | suite, hours |
|---|---|---|--:|--:|"""
CEILING_HEADER = """\
| work | pair | precision | ms a step | of the matrix-product rate | of the op-by-op roofline |
|---|---|---|--:|--:|--:|"""


def title(options: argparse.Namespace) -> str:
    """Return what was measured, in words."""
    workers = f"{options.workers} workers of the conventional pipeline"
    return f"Batch {options.batch}, {described(options)}, {workers}"


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


def hours(rows: list[Row]) -> list[str]:
    """Return the third table's lines: a cell of the published length, evaluation aside."""
    lines = HOURS_HEADER.splitlines()
    for row in rows:
        if row.work in (*METHODS, "teacher"):
            told = " | ".join(f"{CELL / side.rate / 3600:,.1f}" for side in (row.theirs, row.ours))
            lines.append(f"| {row.work} | {row.pair} | {row.precision} | {told} |")
    return lines


def write(options: argparse.Namespace, rows: list[Row]) -> None:
    """Write the tables as markdown and every figure as JSON."""
    lines = [title(options), "", *HEADER.splitlines(), *map(tell, rows)]
    lines += ["", *ceilings(rows), "", *hours(rows)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    told = {key: value for key, value in vars(options).items() if key != "out"}
    figures = {"options": told, "title": title(options), "rows": [asdict(row) for row in rows]}
    options.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
