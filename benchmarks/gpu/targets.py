"""The tables of the measured steps: how far each is from its target, and from other pipelines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from benchmarks.gpu.speed import PAIRS, Key, case_for
from benchmarks.gpu.worker import Values
from benchmarks.grid import DISTILLATIONS, Seconds
from benchmarks.harness import table_head, table_row
from benchmarks.workload import Case, noise
from sskd.teachers.assembly import assemble
from sskd.training.phase_settings import phase_schedule

FIRST, CRD_PAIR = PAIRS
EPOCHS, EPOCH_IMAGES = 240, 50_000
COLUMNS = (
    "pair", "work", "mode", "precision", "jobs", "ms a step", "images/s", "ratio to conventional",
    "ratio to one job", "MiB",
)  # fmt: skip
TARGET_COLUMNS = ("target", "measured", "reached")


@dataclass(frozen=True)
class Measurements:
    """The finished rows of ``throughput``, and what follows from them; None for what is missing."""

    found: Mapping[str, Values]
    options: argparse.Namespace

    def seconds(self, key: Key | str) -> float | None:
        """Return the seconds of a step, of an evaluation or of a checkpoint."""
        return self.found.get(str(key), {}).get("seconds")

    def milliseconds(self, work: str) -> float | None:
        """Return the milliseconds of a step of a job alone."""
        seconds = self.seconds(Key(FIRST, work))
        return seconds and 1000 * seconds

    def speedup(self, work: str) -> float | None:
        """Return how many times as fast as the conventional pipeline a job alone is."""
        conventional = Key(FIRST, work, mode="conventional", precision="fp32")
        return ratio(self.seconds(conventional), self.seconds(Key(FIRST, work)))

    def gain(self, work: str) -> float | None:
        """Return the rate of the most jobs side by side in relation to one job's."""
        return ratio(self.seconds(Key(FIRST, work)), self._seconds_side_by_side(FIRST, work))

    def minutes(self) -> float | None:
        """Return the minutes of a run of SSKD with its first phase, evaluation and checkpoints."""
        extra = self._after_epochs(EPOCHS)
        steps = -(-EPOCH_IMAGES // self.options.batch)
        epochs = epochs_of_phases(case_for(self.options, Key(FIRST, "sskd")))
        seconds = [self.seconds(Key(FIRST, work)) for work in ("ss_head", "sskd")]
        if extra is None or None in seconds:
            return None
        phases = zip(epochs, filter(None, seconds), strict=True)
        return (sum(count * steps * each for count, each in phases) + extra) / 60

    def grid_hours(self) -> float | None:
        """Return the hours of all distillations, with evaluation, without their first phases."""
        size, pairs = self.options.batch, self.options.grid_pairs
        extra = self._after_epochs(EPOCHS * DISTILLATIONS * len(pairs))
        crd, base = (self._seconds_side_by_side(CRD_PAIR, work) for work in ("crd", "kd"))
        if crd is None or base is None or extra is None:
            return None
        hours = extra / 3600
        for pair in pairs:
            kd, sskd = (self._seconds_side_by_side(pair, work) for work in ("kd", "sskd"))
            if kd is None or sskd is None:
                return None
            seconds = Seconds(pair, kd=(kd / size,), sskd=(sskd / size,))
            hours += seconds.hours(((crd - base) / size,))[0]
        return hours

    def _seconds_side_by_side(self, pair: str, work: str) -> float | None:
        return self.seconds(Key(pair, work, jobs=max(self.options.jobs)))

    def _after_epochs(self, epochs: int) -> float | None:
        """Return the seconds of the evaluation and the checkpoint after each of some epochs."""
        work = ("evaluation", "checkpoint")
        evaluation, checkpoint = (self.seconds(f"{each} {FIRST}") for each in work)
        if evaluation is None or checkpoint is None:
            return None
        return epochs * (evaluation + checkpoint)


@cache
def epochs_of_phases(case: Case) -> list[int]:
    """Return the epochs of each phase of the recipe."""
    phases = assemble(case.config, noise(200, torch.device("cpu"))).phases()
    return [phase_schedule(phase, case.config).epochs for phase in phases]


def ratio(slow: float | None, fast: float | None) -> float | None:
    """Return how many times as long ``slow`` takes."""
    return slow / fast if slow and fast else None


class Target(NamedTuple):
    """A number to reach: at most ``limit``, or at least if ``is_least``."""

    text: str
    limit: float
    measure: Callable[[Measurements], float | None]
    is_least: bool = False


TARGETS = (
    Target(f"KD, {FIRST}: ms a step", 1.6, lambda m: m.milliseconds("kd")),
    Target(f"SSKD, {FIRST}: ms a step", 3.5, lambda m: m.milliseconds("sskd")),
    Target("KD: ratio to the conventional pipeline", 8, lambda m: m.speedup("kd"), True),
    Target("SSKD: ratio to the conventional pipeline", 8, lambda m: m.speedup("sskd"), True),
    Target("KD, most jobs side by side: ratio to one", 4, lambda m: m.gain("kd"), True),
    Target("SSKD, most jobs side by side: ratio to one", 4, lambda m: m.gain("sskd"), True),
    Target("SSKD, 240 epochs and its first phase: minutes", 14, Measurements.minutes),
    Target("the grid, most jobs side by side: hours", 12, Measurements.grid_hours),
)


def table(found: Mapping[str, Values], options: argparse.Namespace) -> list[str]:
    """Return the lines of the targets and of the rates."""
    measured = Measurements(found, options)
    targets = [target_row(target, target.measure(measured)) for target in TARGETS]
    rates = [rate_row(key, measured) for key in found if len(key.split()) == len(Key._fields)]
    return [
        *(f"Targets: graph, bf16, batch {options.batch}", ""),
        *(*table_head(TARGET_COLUMNS, text_columns=1), *targets, ""),
        *(*table_head(COLUMNS, text_columns=4), *rates),
    ]


def target_row(target: Target, value: float | None) -> str:
    """Return the row of a target."""
    text = f"{target.text}, {'at least' if target.is_least else 'at most'} {target.limit:g}"
    if not value:
        return table_row([text, "", "not measured"])
    reached = value >= target.limit if target.is_least else value <= target.limit
    return table_row([text, f"{value:.2f}", "yes" if reached else "no"])


def rate_row(text: str, measured: Measurements) -> str:
    """Return the row of a measurement, with its rate in relation to others."""
    key, values = Key(*text.split()), measured.found[text]  # type: ignore[arg-type]
    if "error" in values:
        return table_row([*key, values["error"], *[""] * 4])
    seconds = values["seconds"]
    conventional = key._replace(mode="conventional", precision="fp32", jobs=1)
    others = measured.seconds(conventional), measured.seconds(key._replace(jobs=1))
    ratios = [f"{other / seconds:.2f}" if other else "" for other in others]
    numbers = [f"{1000 * seconds:.3f}", f"{values['images'] / seconds:,.0f}", *ratios]
    return table_row([*key, *numbers, f"{values['mib']:,.0f}"])
