"""Processes that train a job and have a fault at a chosen moment.

A moment is a change of files. The server of tests/starting.py forks the processes, so that a start
takes a fraction of a second and a job can have a fault at each of its moments.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from starting import forked

# Only 40 images, five batches an epoch, because the tests train on them thousands of times. Each
# epoch ends with a checkpoint, so that the number of saves does not depend on the clock.
SMALL = (
    "dataset=digits", "dataset.fraction=0.03", "teacher.fraction=0.03", "schedule.epochs=3",
    "batch_size=9", "arch@teacher=resnet14", "arch@student=resnet8", "teacher.train=true",
    "checkpoint_seconds=0",
)  # fmt: skip
# Half of the images of ``SMALL``: its moments are those of saves, whatever an epoch computes.
FEW = (*SMALL, "dataset.fraction=0.014")
# Every kind of phase: one alone (alone, kd), with banks in its state (crd), after a first one (ab),
# after a shared one (ft, sskd), with the teacher's outputs in a file (precomputed). Each job but
# the first trains its teacher too.
JOBS = {
    "alone": (*SMALL, "method=vanilla"),
    **{name: (*FEW, f"method={name}") for name in ("kd", "crd", "ab", "ft", "sskd")},
    # Saves after every image, for the same reason.
    "precomputed": (
        *FEW, "method=kd", "teacher.precompute=true", "arch@teacher=resnet8",
        "checkpoint_minutes=1e-9",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What happens at a moment at which files under ``root`` change.

    Attributes:
        act: a key of ``ACTS``.
        number: the moment, from 1.
        seed: decides what a power failure loses.
    """

    act: str
    number: int
    root: Path
    seed: int = 0


YEAR = 365 * 24 * 3600.0


class SplitStream:
    """A stream that announces each write and splits it in two, with a moment in between."""

    def __init__(
        self, stream: Any, announce: Callable[[], object], moment: Callable[[], None]
    ) -> None:
        self._stream, self._announce, self._moment = stream, announce, moment

    def write(self, data: Any) -> int:
        self._announce()
        half = len(data) // 2
        self._stream.write(data[:half])
        self._stream.flush()
        self._moment()
        self._stream.write(data[half:])
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> SplitStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


@dataclass(frozen=True)
class Change:
    """A name that was created, replaced or removed in ``folder``.

    ``undo`` reverts it, as a power failure may. ``shadow`` is a second name of the old
    file, if any.
    """

    folder: Path
    undo: Callable[[], object]
    shadow: Path | None


@dataclass
class Disk:
    """Counts how this process changes files under the root of ``fault``, and causes the fault."""

    fault: Fault
    moments: int = 0
    full: bool = False
    watching: bool = True
    # The size of each file at its last sync, for files written since.
    synced_sizes: dict[str, int] = field(default_factory=dict)
    # In order, the changes of names since the last sync of their folder.
    changes: list[Change] = field(default_factory=list)

    def watch(self) -> None:
        """Watch the changes of files that this process makes from now on."""
        sys.addaudithook(self._audit)
        sync, original_open = os.fsync, Path.open

        def fsync(descriptor: int) -> None:
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            if self._is_watched(path):
                self._moment(grows=True)
            sync(descriptor)
            self._synced(path)  # also for the root's parent

        def open_split(path: Path, mode: str = "r", *more: Any, **keywords: Any) -> Any:
            stream = original_open(path, mode, *more, **keywords)
            if mode not in ("wb", "a", "ab") or not self._is_watched(str(path)):
                return stream

            def announce() -> None:
                self.synced_sizes.setdefault(str(path), path.stat().st_size)

            announce()
            return SplitStream(stream, announce, lambda: self._moment(grows=True))

        os.fsync = fsync  # type: ignore[assignment]
        Path.open = open_split  # type: ignore[assignment, method-assign]

    def _is_watched(self, path: object) -> bool:
        return self.watching and f"{path}/".startswith(f"{self.fault.root}/")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            creates = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if creates and self._is_watched(path):
                self._moment(grows=True)
        elif event in RECORDERS and self._is_watched(arguments[0]):
            self._moment(grows=event == "os.mkdir")
            with self.not_watching():
                RECORDERS[event](self, *map(Path, arguments[: 2 if event == "os.rename" else 1]))

    def _moment(self, grows: bool) -> None:
        self.moments += 1
        if self.moments == self.fault.number:
            ACTS[self.fault.act](self)
        if self.full and grows:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def record_rename(self, source: Path, target: Path) -> None:
        """Keep the file that a rename will replace, so that a power failure can restore it."""
        shadow = self._shadow(target)

        def undo() -> None:
            if target.exists():  # it may have been removed since
                target.rename(source)
            if shadow:
                shadow.rename(target)

        self.changes.append(Change(target.parent, undo, shadow))
        self.synced_sizes.pop(str(target), None)
        if str(source) in self.synced_sizes:  # a rename does not sync the content
            self.synced_sizes[str(target)] = self.synced_sizes.pop(str(source))

    def record_removal(self, path: Path) -> None:
        """Keep a file that is about to be removed."""
        shadow = self._shadow(path)
        if shadow:
            self.changes.append(Change(path.parent, lambda: shadow.rename(path), shadow))

    def record_folder(self, path: Path) -> None:
        """Record that a folder is about to be created."""
        if not path.exists():
            undo = partial(shutil.rmtree, path, ignore_errors=True)
            self.changes.append(Change(path.parent, undo, None))

    def _shadow(self, path: Path) -> Path | None:
        if not path.is_file():
            return None
        shadow = path.with_name(f"{path.name}.{self.moments}.shadow")
        os.link(path, shadow)
        return shadow

    def _synced(self, path: str) -> None:
        self.synced_sizes.pop(path, None)
        with self.not_watching():
            for change in [change for change in self.changes if change.folder == Path(path)]:
                self.changes.remove(change)
                if change.shadow:
                    change.shadow.unlink()

    @contextlib.contextmanager
    def not_watching(self) -> Iterator[None]:
        self.watching = False
        try:
            yield
        finally:
            self.watching = True

    def kill(self) -> None:
        """Kill the process."""
        self._clear_shadows()
        os.kill(os.getpid(), signal.SIGKILL)

    def lose_power(self) -> None:
        """Kill the process, and lose a random part of what was not synced.

        Of the bytes written since a file's last sync, a random number of the first ones stay; of
        the changes of names since their folder's last sync too.
        """
        chance = random.Random(self.fault.seed)
        self.watching = False
        for path, synced in self.synced_sizes.items():
            if Path(path).is_file():
                os.truncate(path, chance.randint(synced, Path(path).stat().st_size))
        for change in reversed(self.changes[chance.randint(0, len(self.changes)) :]):
            change.undo()
        self.kill()

    def fill(self) -> None:
        """Fill the disk: from now on, each change that needs space fails."""
        self.full = True

    def shift_clock(self) -> None:
        """Set the clock a year forward at odd moments, a year back at even ones.

        The modification times of leases change too, as if they were on the same machine.
        """
        clock, shift = time.time, YEAR if self.fault.number % 2 else -YEAR
        time.time = lambda: clock() + shift
        with self.not_watching():
            for lease in self.fault.root.rglob(".lease"):
                os.utime(lease, (time.time(),) * 2)

    def suspend(self) -> None:
        """Suspend the process until it gets SIGCONT."""
        self._clear_shadows()
        os.kill(os.getpid(), signal.SIGSTOP)

    def only_count(self) -> None:
        """Do nothing, since the moments are only counted."""

    def _clear_shadows(self) -> None:
        self.watching = False
        for shadow in self.fault.root.rglob("*.shadow"):
            shadow.unlink()


RECORDERS: dict[str, Callable[..., None]] = {
    "os.rename": Disk.record_rename,
    "os.remove": Disk.record_removal,
    "os.mkdir": Disk.record_folder,
}
ACTS: dict[str, Callable[[Disk], None]] = {
    "killed": Disk.kill,
    "power failure": Disk.lose_power,
    "disk full": Disk.fill,
    "clock jumps": Disk.shift_clock,
    "suspended": Disk.suspend,
    "undisturbed": Disk.only_count,
}


def _train(overrides: tuple[str, ...], fault: Fault | None, log: Path) -> None:
    """Train a job and end this process; write its output and number of moments to ``log``."""
    import torch

    import train_student
    from sskd.commands.process import run_command

    torch.set_num_threads(1)
    os.environ["WANDB_MODE"] = "disabled"
    os.environ["HYDRA_FULL_ERROR"] = "0"
    sys.argv = [str(train_student.__file__), *overrides]
    disk = Disk(fault) if fault else None
    with log.open("w") as stream, contextlib.redirect_stdout(stream):
        with contextlib.redirect_stderr(stream):
            if disk:
                disk.watch()
            try:
                status = run_command(train_student.main)
            except SystemExit as stop:
                status = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
                status = 70  # EX_SOFTWARE: no fault may cause a traceback
        if disk:
            stream.write(f"\nmoments {disk.moments}\n")
    os._exit(status)


class Attempt:
    """A process that trains ``job`` under ``runs``, with ``fault``."""

    def __init__(
        self, job: str, runs: Path, *more: str, fault: Fault | None = None, log: Path | None = None
    ) -> None:
        self.log = log or runs.with_name(f"{runs.name}.log")
        overrides = (*JOBS[job], *more, f"runs={runs}")
        self._process = forked(_train, overrides, fault, self.log)

    def end(self, after: float | None = None) -> int:
        """Wait for the process, kill it after ``after`` seconds, and return its exit status."""
        self._process.join(after)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        status = self._process.exitcode
        assert isinstance(status, int)
        return status

    def is_alive(self) -> bool:
        """Return whether the process is running."""
        return bool(self._process.is_alive())

    def is_suspended(self) -> bool:
        """Return whether the process is suspended."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    def send(self, signum: int) -> None:
        """Send a signal, if the process still exists."""
        pid = self._process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)

    @property
    def output(self) -> list[str]:
        """The lines that the process printed."""
        return self.log.read_text().splitlines()

    @property
    def moments(self) -> int:
        """The number of moments at which it changed files."""
        return int(self.output[-1].removeprefix("moments "))
