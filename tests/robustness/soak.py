"""Train for long in one process, and check that memory, files, threads and time do not grow.

    python tests/robustness/soak.py jobs --jobs 500
    python tests/robustness/soak.py epochs --epochs 20000

``jobs`` is one sweep of tiny jobs, ``epochs`` one run of tiny epochs that is stopped halfway and
resumed. Both run the real command, with W&B offline. A table and a plot are written to ``--out``;
the exit status is 1 if something still grows at the end. Needs Linux's /proc.
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
from sskd.runs.epoch_line import EpochLine  # noqa: E402
from sskd.runs.metrics_log import MetricsLog  # noqa: E402

METHODS = ("vanilla", "kd", "crd", "sskd")
MIB = 2**20
Allowed = Callable[[float], float]  # maps the early value of a measure to its allowed growth


@dataclass(frozen=True)
class Sample:
    """The state after ``done`` jobs or epochs; seconds are the average of one since the last."""

    done: int
    memory: float  # MiB, of this process
    wandb_memory: float  # MiB, of the process of W&B
    descriptors: int
    threads: int
    seconds: float
    cpu_seconds: float


@dataclass
class Watch:
    """Counts jobs or epochs, takes at least 50 samples, and prints the progress."""

    title: str
    total: int
    samples: list[Sample] = field(default_factory=list)
    done: int = 0

    def __post_init__(self) -> None:
        self._stdout = sys.stdout  # the commands print to a file
        self._every = max(1, min(self.total // 50, 100))
        self._started = self._then = time.monotonic()
        self._cpu = time.process_time()

    def count(self) -> None:
        """Count one more, and take a sample if one is due."""
        self.done += 1
        if self.done % self._every:
            return
        now, cpu = time.monotonic(), time.process_time()
        each = (now - self._then) / self._every, (cpu - self._cpu) / self._every
        last = Sample(self.done, *levels(), *each)
        self.samples.append(last)
        rate = self.done / (now - self._started)
        done = f"{self.title} {self.done}/{self.total}, {rate:.2f}/s, {last.memory:.0f} MiB"
        left = f"{(self.total - self.done) / rate / 60:.1f} min left"
        print(f"{done}, {last.descriptors} files, {left}", file=self._stdout, flush=True)
        self._then, self._cpu = time.monotonic(), time.process_time()


def levels() -> tuple[float, float, int, int]:
    """Return the memory of this process and of its children, its open files and threads."""
    gc.collect()
    children = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                children += memory(process)
        except OSError:  # it has ended meanwhile
            continue
    files, threads = (len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("fd", "task"))
    return memory(Path("/proc/self")), children, files, threads


def memory(process: Path) -> float:
    return int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def allowed_memory(before: float) -> float:
    return max(30, 0.05 * before)


def anything_grows(samples: Sequence[Sample], allowed: Mapping[str, Allowed]) -> bool:
    """Print for each measure whether it grows; return whether one does.

    The median of the last fifth of the samples is compared with the median of the second fifth.
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


def soak_jobs(count: int, out: Path) -> bool:
    """Run a sweep of ``count`` jobs; return whether anything grows."""
    watch, train = Watch("jobs", count), sskd.commands.job._train
    runs = tempfile.mkdtemp(prefix="jobs-", dir=out)

    def counted(composed: Any) -> None:
        train(composed)
        watch.count()

    with (
        (out / "jobs.log").open("w") as log,
        redirect_stdout(log),
        patch.object(sskd.commands.job, "_train", counted),
    ):
        status = command(
            "-m", "dataset=digits", "dataset.fraction=0.02", "schedule.epochs=1",
            "teacher.fraction=0.02", "teacher.train=true", "batch_size=32", "wandb.mode=offline",
            "arch@teacher=resnet8", "arch@student=resnet8", f"runs={runs}",
            f"seed=range({count // len(METHODS)})", f"method={','.join(METHODS)}",
        )  # fmt: skip
    assert status == 0, f"the sweep has failed, see {out / 'jobs.log'}"
    write(watch.samples, out / "jobs", [count // 10, count // 5, count // 2, count])
    level: Allowed = lambda before: 0  # noqa: E731
    memories = dict.fromkeys(("memory", "wandb_memory"), allowed_memory)
    return anything_grows(watch.samples, {**memories, "descriptors": level, "threads": level})


def soak_epochs(count: int, out: Path) -> bool:
    """Run ``count`` epochs, stopped halfway and resumed; return whether anything grows."""
    watch, log_epoch, half = Watch("epochs", count), MetricsLog.log, count // 2
    folder = Path(tempfile.mkdtemp(prefix="epochs-", dir=out))
    write_digits(folder / "images")
    words = (
        "dataset=folder", f"dataset.root={folder / 'images'}", "batch_size=10", "method=kd",
        "arch@teacher=resnet8", "arch@student=resnet8", "teacher.train=true", "teacher.epochs=1",
        f"schedule.epochs={count}", "checkpoint_seconds=0", "wandb.mode=offline",
        f"runs={folder / 'runs'}",
    )  # fmt: skip
    times: list[float] = []  # of the second start, and of the end of its first epoch

    def counted(log: MetricsLog, line: EpochLine) -> None:
        log_epoch(log, line)
        if line.phase != "distill":  # the teacher's only epoch
            return
        if watch.done == half:
            times.append(time.monotonic())
        watch.count()
        if watch.done == half:
            signal.raise_signal(signal.SIGTERM)

    with (
        (out / "epochs.log").open("w") as log,
        redirect_stdout(log),
        patch.object(MetricsLog, "log", counted),
    ):
        stopped = command(*words)
        times.append(time.monotonic())
        finished = command(*words)
    assert (stopped, finished) == (128 + signal.SIGTERM, 0), f"see {out / 'epochs.log'}"
    print(f"resuming after {half} epochs took {times[1] - times[0]:.1f} s")
    write(watch.samples, out / "epochs", [count // 20, count // 4, half, count])
    read_back(folder / "runs", out)
    slower: Allowed = lambda before: 0.2 * before  # noqa: E731
    # CPU time depends less on other work on the machine than wall-clock time.
    return anything_grows(watch.samples, {"memory": allowed_memory, "cpu_seconds": slower})


def write_digits(root: Path) -> None:
    """Write one training and one test image of each digit, for the shortest epochs."""
    digits = load_digits()
    for digit in range(10):
        few = digits.images[digits.target == digit][:2]
        for part, image in zip(("train", "test"), few, strict=True):
            folder = root / part / str(digit)
            folder.mkdir(parents=True)
            Image.fromarray((image * 15).astype("uint8")).save(folder / "0.png")


def read_back(runs: Path, out: Path) -> None:
    """Time the report and W&B's reader on the long run; print the sizes of its files."""
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
    """Write and print a table of some samples, and plot all of them."""
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
    parser.add_argument("work", choices=["jobs", "epochs"])
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("soak"))
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    soak = {"jobs": soak_jobs, "epochs": soak_epochs}[options.work]
    return int(soak(getattr(options, options.work), out))


if __name__ == "__main__":
    sys.exit(main())
