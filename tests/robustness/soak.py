"""Long work in one process, to see that nothing grows with it: memory, files, threads, time.

    python tests/robustness/soak.py cells --cells 500
    python tests/robustness/soak.py epochs --epochs 20000

``cells`` is one sweep of tiny cells, ``epochs`` one run of tiny epochs that is stopped halfway and
goes on. Both are the real command, with W&B offline. A table and a plot go to ``--out``; the exit
status is 1 where something has not levelled off. Needs Linux's /proc.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import sskd.commands.job  # noqa: E402
import train_student  # noqa: E402
from sskd.commands.process import run_command  # noqa: E402
from sskd.runs.metrics_log import MetricsLog  # noqa: E402

METHODS = ("vanilla", "kd", "crd", "sskd")
MIB = 2**20
Allowed = Callable[[float], float]  # from what a figure was early, by how much it may have grown


@dataclass(frozen=True)
class Sample:
    """What stood after ``done`` cells or epochs; seconds are one's, on average since before."""

    done: int
    memory: float  # MiB, of this process
    wandb_memory: float  # MiB, of W&B's own process
    descriptors: int
    threads: int
    seconds: float
    cpu_seconds: float


@dataclass
class Watch:
    """Counts what is done, samples it 50 times or more, and prints how far it is."""

    title: str
    total: int
    samples: list[Sample] = field(default_factory=list)
    done: int = 0

    def __post_init__(self) -> None:
        self._stdout = sys.stdout  # what is watched prints to a file
        self._every = max(1, min(self.total // 50, 100))
        self._started = self._then = time.monotonic()
        self._cpu = time.process_time()

    def count(self) -> None:
        """Count one more, and sample if it is time to."""
        self.done += 1
        if self.done % self._every:
            return
        now, cpu = time.monotonic(), time.process_time()
        each = (now - self._then) / self._every, (cpu - self._cpu) / self._every
        last = Sample(self.done, *levels(), *each)
        self.samples.append(last)
        rate = self.done / (now - self._started)
        told = f"{self.title} {self.done}/{self.total}, {rate:.2f}/s, {last.memory:.0f} MiB"
        left = f"{(self.total - self.done) / rate / 60:.1f} min left"
        print(f"{told}, {last.descriptors} files, {left}", file=self._stdout, flush=True)
        self._then, self._cpu = time.monotonic(), time.process_time()


def levels() -> tuple[float, float, int, int]:
    """Return the memory of this process and of those that it started, its files and threads."""
    gc.collect()
    started = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                started += memory(process)
        except OSError:  # it has ended meanwhile
            continue
    files, threads = (len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("fd", "task"))
    return memory(Path("/proc/self")), started, files, threads


def memory(process: Path) -> float:
    return int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def memory_allowed(before: float) -> float:
    return max(30, 0.05 * before)


def what_grows(samples: Sequence[Sample], allowed: Mapping[str, Allowed]) -> bool:
    """Tell of each figure whether it has levelled off; return whether one has not.

    The median over the last fifth of the samples is held against that over the second.
    """
    grows, fifth = False, max(1, len(samples) // 5)
    for name, most in allowed.items():
        values = [getattr(sample, name) for sample in samples]
        before, after = map(statistics.median, (values[fifth : 2 * fifth], values[-fifth:]))
        bad = after - before > most(before)
        print(f"{name}: {before:.4g}, at the end {after:.4g}: {'GROWS' if bad else 'level'}")
        grows |= bad
    return grows


def command(*words: str) -> int:
    """Run train_student.py in this process and return its exit status."""
    with patch.object(sys, "argv", [str(train_student.__file__), *words]):
        return run_command(train_student.main)


def soak_cells(count: int, out: Path) -> bool:
    """Run a sweep of ``count`` cells; return whether something grows."""
    watch, train = Watch("cells", count), sskd.commands.job._train
    runs = tempfile.mkdtemp(prefix="cells-", dir=out)

    def counted(composed: Any) -> None:
        train(composed)
        watch.count()

    with (
        (out / "cells.log").open("w") as log,
        redirect_stdout(log),
        patch.object(sskd.commands.job, "_train", counted),
    ):
        status = command(
            "-m", "dataset=digits", "dataset.fraction=0.02", "schedule.epochs=1",
            "teacher.fraction=0.02", "teacher.train=true", "batch_size=32", "wandb.mode=offline",
            "arch@teacher=resnet8", "arch@student=resnet8", f"runs={runs}",
            f"seed=range({count // len(METHODS)})", f"method={','.join(METHODS)}",
        )  # fmt: skip
    assert status == 0, f"the sweep has failed, see {out / 'cells.log'}"
    write(watch.samples, out / "cells", [count // 10, count // 5, count // 2, count])
    level: Allowed = lambda before: 0  # noqa: E731
    memories = dict.fromkeys(("memory", "wandb_memory"), memory_allowed)
    return what_grows(watch.samples, {**memories, "descriptors": level, "threads": level})


def soak_epochs(count: int, out: Path) -> bool:
    """Run ``count`` epochs, stopped halfway; return whether something grows."""
    watch, log_epoch, half = Watch("epochs", count), MetricsLog.log, count // 2
    folder = Path(tempfile.mkdtemp(prefix="epochs-", dir=out))
    draw_few(folder / "images")
    words = (
        "dataset=folder", f"dataset.root={folder / 'images'}", "batch_size=10", "method=kd",
        "arch@teacher=resnet8", "arch@student=resnet8", "teacher.train=true", "teacher.epochs=1",
        f"schedule.epochs={count}", "wandb.mode=offline", f"runs={folder / 'runs'}",
    )  # fmt: skip
    moments: list[float] = []  # of the second start, and of the end of its first epoch

    def counted(log: MetricsLog, metrics: dict[str, Any]) -> None:
        log_epoch(log, metrics)
        if metrics["stage"] != "distill":  # the teacher's only epoch
            return
        if watch.done == half:
            moments.append(time.monotonic())
        watch.count()
        if watch.done == half:
            signal.raise_signal(signal.SIGTERM)

    with (
        (out / "epochs.log").open("w") as log,
        redirect_stdout(log),
        patch.object(MetricsLog, "log", counted),
    ):
        stopped = command(*words)
        moments.append(time.monotonic())
        finished = command(*words)
    assert (stopped, finished) == (128 + signal.SIGTERM, 0), f"see {out / 'epochs.log'}"
    print(f"to go on after {half} epochs took {moments[1] - moments[0]:.1f} s")
    write(watch.samples, out / "epochs", [count // 20, count // 4, half, count])
    read_back(folder / "runs", out)
    slower: Allowed = lambda before: 0.2 * before  # noqa: E731
    # Other work on the machine moves the seconds of a clock far more than those of a processor.
    return what_grows(watch.samples, {"memory": memory_allowed, "cpu_seconds": slower})


def draw_few(root: Path) -> None:
    """Draw a training and a test image of each digit: an epoch of them is as short as can be."""
    digits = load_digits()
    for digit in range(10):
        few = digits.images[digits.target == digit][:2]
        for part, image in zip(("train", "test"), few, strict=True):
            folder = root / part / str(digit)
            folder.mkdir(parents=True)
            Image.fromarray((image * 15).astype("uint8")).save(folder / "0.png")


def read_back(runs: Path, out: Path) -> None:
    """Let the report and W&B's own reader read the long run; tell how large it is."""
    report = [sys.executable, "-m", "sskd.report", str(runs)]
    inspect = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary"]
    commands = {"report": report, "report --out": [*report, "--out", str(out / "report" / "long")]}
    for number, path in enumerate(sorted(runs.rglob("*.wandb")), 1):
        commands[f"wandb leet inspect, start {number}"] = [*inspect, str(path)]
    for name, words in commands.items():
        started = time.monotonic()
        subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        print(f"{name}: {time.monotonic() - started:.1f} s")
    for pattern in ("metrics.jsonl", "last.pt", "*.wandb"):
        print(f"{pattern}: {sum(p.stat().st_size for p in runs.rglob(pattern)) / MIB:.2f} MiB")


def write(samples: Sequence[Sample], path: Path, rows: Sequence[int]) -> None:
    """Write and print a table of some samples, and draw all of them."""
    names = [column.name for column in fields(Sample)]
    lines = ["| " + " | ".join(names) + " |", "|" + " ---: |" * len(names)]
    for row in rows:
        nearest = min(samples, key=lambda sample: abs(sample.done - row))
        lines.append("| " + " | ".join(f"{value:.5g}" for value in astuple(nearest)) + " |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")
    figure = Figure(figsize=(11, 5), layout="constrained")
    for name, panel in zip(names[1:], figure.subplots(2, 3).flat, strict=True):
        panel.plot([sample.done for sample in samples], [getattr(s, name) for s in samples])
        panel.set(title=name.replace("_", " "), xlabel=path.stem, ylim=(0, None))
    figure.savefig(path.with_suffix(".png"), dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("work", choices=["cells", "epochs"])
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("soak"))
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    soak = {"cells": soak_cells, "epochs": soak_epochs}[given.work]
    return int(soak(getattr(given, given.work), out))


if __name__ == "__main__":
    sys.exit(main())
