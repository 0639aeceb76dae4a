"""What each method costs: seconds a step and peak memory, beside KD's.

    python -m benchmarks.methods --out results/method_cost

Every stage of every method has a process of its own. It takes a few steps alone, for the peak
of its memory, and then its steps in pairs with KD's, each first in every other pair, so that both
see the machine in the same state. The ratio is the median over the pairs, with its quartiles; KD's
own row, KD against KD, tells how far chance goes. The images are noise, as many and as large as
CIFAR-100's: what they show costs no time.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from sskd import CONF
from sskd.config import Config, read_config
from sskd.data import Batch, Images, Loader, Split
from sskd.device import choose_device, to_device
from sskd.errors import UserError
from sskd.methods import METHODS
from sskd.optimizers import build_optimizer
from sskd.teachers.assembly import assemble
from sskd.teachers.outputs import Layout, Precomputed, can_precompute, layout_of, map_rows
from sskd.training.acceleration import compile_loss, fold_teacher
from sskd.training.meter import Meter
from sskd.training.step import set_trainable, train_step

BASE = "kd"
CLASSES = 100
WARMUP = 3


@dataclass(frozen=True)
class Cost:
    """One stage's cost beside KD's.

    Seconds are a step's medians; ``ratio`` the lower quartile, median and upper quartile of
    the pairs' ratios; memory the peak above what the images and their loaders take, in MiB.
    """

    pair: str
    method: str
    stage: str
    seconds: float
    base_seconds: float
    ratio: tuple[float, float, float]
    memory: float


def main() -> None:
    """Measure what the command line asks for; print and write the tables row by row."""
    options = parse_options()
    costs: list[Cost] = []
    for pair in options.pairs:
        print(f"\n{title(pair, options)}\n\n{HEADER}", flush=True)
        base = None
        for method, stage in stages(pair, options):
            with get_context("spawn").Pool(1) as pool:
                cost = pool.apply(measure, (pair, method, stage, options))
            base = base or cost
            costs.append(cost)
            print(row(cost, base), flush=True)
            if options.out:
                write(options, costs)


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", nargs="+", default=["resnet56-resnet20", "wrn_40_2-wrn_16_2"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--rounds", type=int, default=30, help="pairs of steps")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    add_shared_options(parser)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    return options


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--images", type=int, default=50_000, help="training images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--compile", default="auto", help="as of the training commands")
    parser.add_argument(
        "--precompute",
        action="store_true",
        help="the teacher's outputs of all crops lie in a file (of noise, in TMPDIR), where they "
        "fit: teacher.precompute=true",
    )
    parser.add_argument("--out", type=Path, help="write PATH.md and PATH.json as well")


def stages(pair: str, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield KD and the methods asked for, with each of their stages that the pair can have."""
    images = noise(200, torch.device("cpu"))
    for method in dict.fromkeys([BASE, *options.methods]):
        try:
            built = assemble(composed(pair, method, options), images)
        except UserError as error:
            print(f"{error}; left out", file=sys.stderr, flush=True)
            continue
        for stage in built.phases():
            yield method, stage.name


def composed(pair: str, method: str, options: argparse.Namespace) -> Config:
    """Return the run's configuration, with the recipe's settings but for the options."""
    teacher, student = pair.split("-")
    overrides = [
        f"arch@teacher={teacher}",
        f"arch@student={student}",
        f"method={method}",
        f"batch_size={options.batch}",
        f"precision={options.precision}",
        f"compile={options.compile}",
        f"teacher.precompute={options.precompute}",
    ]
    with initialize_config_dir(str(CONF), version_base=None):
        return read_config(compose("student", overrides))


def measure(pair: str, method: str, stage: str, options: argparse.Namespace) -> Cost:
    """Return the cost of one stage; to be called in a process that has done nothing before."""
    device = choose_device(options.device)
    images = noise(options.images, device)
    arguments = (images.train, images.mean, images.std, options.batch)
    loader, base_loader = (Loader(*arguments, METHODS[name].views) for name in (method, BASE))
    before = peak_memory(device)
    step = stepper(composed(pair, method, options), stage, images, loader)
    memory = peak_memory(device, after=step) - before
    base = stepper(composed(pair, BASE, options), "distill", images, base_loader)
    for _ in range(WARMUP):
        step()
        base()
    pairs = []
    for number in range(options.rounds):
        first, second = (step, base) if number % 2 else (base, step)
        timed = {each: seconds(each, device) for each in (first, second)}
        pairs.append((timed[step], timed[base]))
    own, others = zip(*pairs, strict=True)
    lower, middle, upper = statistics.quantiles([a / b for a, b in pairs], method="inclusive")
    medians = statistics.median(own), statistics.median(others)
    return Cost(pair, method, stage, *medians, (lower, middle, upper), memory)


def stepper(
    config: Config, stage_name: str, images: Images, loader: Loader
) -> Callable[[], object]:
    """Return a function that takes one training step, its batch's augmentation included."""
    draw, learn = drawer(loader), learner(config, stage_name, images)
    return lambda: learn(draw())


def drawer(loader: Loader) -> Callable[[], Batch]:
    """Return a function that draws the next batch, epoch after epoch."""

    def draw() -> Batch:
        if loader.position == loader.steps:
            loader.begin_epoch(0)
        return loader.next_batch()

    return draw


def learner(config: Config, stage_name: str, images: Images) -> Callable[[Batch], object]:
    """Return a function that trains a stage on a batch, as the loop does."""
    method = assemble(config, images)
    to_device(method, images.train.images.device)
    fold_teacher(method, images.train.images.device)
    if config.teacher and config.teacher.precompute and can_precompute(method):
        method.precomputed = outputs_of_noise(layout_of(method, images, config.precision), images)
    stage = next(stage for stage in method.phases() if stage.name == stage_name)
    set_trainable(stage, method)
    fast = compile_loss(stage, config)
    optimizer = build_optimizer(config.optimizer, stage.trains.parameters(), config.optimizer.lr)
    meter = Meter()

    def learn(batch: Batch) -> None:
        meter.add(train_step(fast, optimizer, batch, config.precision), len(batch.y))

    return learn


def outputs_of_noise(layout: Layout, images: Images) -> Precomputed:
    """Return as many outputs as a teacher's, of noise, where a run has them: in a file's memory."""
    some = min(1000, layout.images)
    part = replace(layout, images=some)
    noise = torch.randn(part.shape).to(layout.dtype).view(torch.uint8).numpy().tobytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outputs")
        with path.open("wb") as file:
            for start in range(0, layout.images, some):
                file.write(noise[: (layout.images - start) * layout.image_size])
        rows = map_rows(path, layout, images.train.images.device)
    return Precomputed(rows, layout.widths)


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the time of one step, the device's work included."""
    synchronise(device)
    started = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device, after: Callable[[], object] = lambda: None) -> float:
    """Return the peak in MiB after some calls: of what a GPU has allocated, or of the process.

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


def noise(count: int, device: torch.device) -> Images:
    """Return ``count`` training images of noise in 100 classes, 32x32."""
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    train = Split(images, torch.arange(count) % CLASSES)
    names = tuple(f"class {label}" for label in range(CLASSES))
    test = train.take(torch.arange(1))
    return Images("noise", names, train, test, None, (0.5,) * 3, (0.25,) * 3).to(device)


HEADER = """\
| method | stage | ms a step | KD beside it | ratio | its quartiles | peak memory, MiB | ratio |
|---|---|--:|--:|--:|--:|--:|--:|"""


def title(pair: str, options: argparse.Namespace) -> str:
    """Return what was measured, in words."""
    return f"**{pair}**, batch {options.batch}, {options.precision}, {described(options)}"


def described(options: argparse.Namespace) -> str:
    """Return where something was measured, in words."""
    device = choose_device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = f"{torch.get_num_threads()} threads, " if device.type == "cpu" else ""
    compiled = f"compile={options.compile}, torch {torch.__version__}"
    looked_up = ", teacher's outputs precomputed" * options.precompute
    return f"{device.type} ({where}), {threads}{compiled}{looked_up}"


def row(cost: Cost, base: Cost) -> str:
    """Return a cost as a row of the table."""
    lower, middle, upper = cost.ratio
    figures = (
        f"{1000 * cost.seconds:.1f}",
        f"{1000 * cost.base_seconds:.1f}",
        f"{middle:.2f}",
        f"{lower:.2f} to {upper:.2f}",
        f"{cost.memory:.0f}",
        f"{cost.memory / base.memory:.2f}",
    )
    return f"| {cost.method} | {cost.stage} | " + " | ".join(figures) + " |"


def write(options: argparse.Namespace, costs: list[Cost]) -> None:
    """Write the tables as markdown and the figures as JSON."""
    lines = []
    for pair in dict.fromkeys(cost.pair for cost in costs):
        here = [cost for cost in costs if cost.pair == pair]
        lines += [title(pair, options), "", HEADER, *(row(cost, here[0]) for cost in here), ""]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text("\n".join(lines))
    told = {key: value for key, value in vars(options).items() if key != "out"}
    figures = {"options": told, "costs": [asdict(cost) for cost in costs]}
    options.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
