"""What each method costs: seconds a step and peak memory, compared with KD.

    python -m benchmarks.methods --out results/method_cost

Each phase of each method has its own process. The process first takes a few steps to find the peak
memory. Then the steps alternate with steps of KD, in pairs whose order is reversed every other
time, so that both see the machine in the same state. The ratio is the median over the pairs, with
its quartiles. The row of KD compares KD with itself and so shows the noise of the measurement.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

from benchmarks import harness
from benchmarks.workload import Case, case_of, loader_of, noise, phase_names, suite_step
from sskd.device import choose_device, tune_device
from sskd.methods import METHODS
from sskd.precision import PRECISIONS

BASE = "kd"
COLUMNS = (
    "method", "phase", "ms a step", "ms a step of KD", "ratio", "quartiles", "peak memory, MiB",
    "ratio",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """The cost of a phase compared with KD.

    Seconds are the median of a step. ``ratio`` is the lower quartile, median and upper quartile of
    the ratio in each pair. ``memory`` is the peak in MiB above the images and their loaders.
    """

    pair: str
    method: str
    phase: str
    seconds: float
    base_seconds: float
    ratio: tuple[float, float, float]
    memory: float


def main() -> None:
    """Measure and print the tables row by row; write them if the options name a path."""
    options = parse_options()
    machine = harness.machine_of(options)
    costs: list[Cost] = []
    for pair in options.pairs:
        print("\n" + "\n".join(heading(pair, options, machine)), flush=True)
        first = len(costs)
        for case, phase in cases(pair, options):
            with harness.new_process() as process:
                costs.append(harness.call(process, partial(measure, case, phase, options.rounds)))
            print(row(costs[-1], costs[first]), flush=True)
            measured = {"costs": [asdict(cost) for cost in costs]}
            harness.write_results(options, measured, tables(costs, options, machine))


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--pairs", nargs="+", default=["resnet56-resnet20", "wrn_40_2-wrn_16_2"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--rounds", type=int, default=30, help="pairs of steps")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    options = harness.parse(parser)
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    return options


def cases(pair: str, options: argparse.Namespace) -> Iterator[tuple[Case, str]]:
    """Yield KD and the requested methods, with each phase; skip methods the pair cannot have."""
    for method in dict.fromkeys([BASE, *options.methods]):
        case = case_of(options, pair=pair, method=method)
        for phase in phase_names(case):
            yield case, phase


def measure(case: Case, phase: str, rounds: int) -> Cost:
    """Return the cost of a phase; call it in a new process."""
    device = choose_device(case.device)
    tune_device(device)
    images = noise(case.images, device)
    base_case = replace(case, method=BASE)
    loader, base_loader = loader_of(case, images), loader_of(base_case, images)
    before = harness.peak_memory(device)
    built = suite_step(case, images, loader, phase)
    step = built.step
    memory = harness.peak_memory(device, after=built.one_by_one) - before
    base = suite_step(base_case, images, base_loader).step
    for _ in range(harness.WARMUP):
        step()
        base()
    steps = {"base": base, "step": step}
    turns = {name: partial(harness.seconds_per_step, each, device) for name, each in steps.items()}
    seconds = harness.take_turns(turns, rounds)
    ratios = [a / b for a, b in zip(seconds["step"], seconds["base"], strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, method="inclusive")
    medians = statistics.median(seconds["step"]), statistics.median(seconds["base"])
    quartiles = (lower, middle, upper)
    return Cost(case.pair, case.method, phase, *medians, ratio=quartiles, memory=memory)


def heading(pair: str, options: argparse.Namespace, machine: str) -> list[str]:
    """Return the lines above the rows of a pair."""
    title = f"**{pair}**, batch {options.batch}, {options.precision}, {machine}"
    return [title, "", *harness.table_head(COLUMNS, text_columns=2)]


def row(cost: Cost, base: Cost) -> str:
    """Return a row of the table; ``base`` is the cost of KD."""
    lower, middle, upper = cost.ratio
    numbers = (
        f"{1000 * cost.seconds:.1f}",
        f"{1000 * cost.base_seconds:.1f}",
        f"{middle:.2f}",
        f"{lower:.2f} to {upper:.2f}",
        f"{cost.memory:.0f}",
        f"{cost.memory / base.memory:.2f}",
    )
    return harness.table_row([cost.method, cost.phase, *numbers])


def tables(costs: list[Cost], options: argparse.Namespace, machine: str) -> list[str]:
    """Return the lines of a table for each pair."""
    blocks = []
    for pair in dict.fromkeys(cost.pair for cost in costs):
        rows = [cost for cost in costs if cost.pair == pair]
        lines = [*heading(pair, options, machine), *(row(cost, rows[0]) for cost in rows)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks).splitlines()


if __name__ == "__main__":
    main()
