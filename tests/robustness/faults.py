"""Processes that train a cell and are broken on purpose, at a moment of one's choice.

The server of tests/starting.py forks; so a start takes a fraction of a second, and a cell can be
broken at each of the moments at which it touches the disk.
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

# 40 images in five batches an epoch: tests train on them some thousand times.
SMALL = (
    "dataset=digits", "dataset.fraction=0.03", "teacher.fraction=0.03", "schedule.epochs=3",
    "batch_size=9", "arch@teacher=resnet14", "arch@student=resnet8", "teacher.train=true",
)  # fmt: skip
# Every kind of stage: none but the student's, banks in the state, a phase of its own before it,
# one that is shared by students; the teacher's outputs in a file. The teacher comes with each.
CELLS = {
    "alone": (*SMALL, "method=vanilla"),
    **{name: (*SMALL, f"method={name}") for name in ("kd", "crd", "ab", "ft", "sskd")},
    # Saved at every chance: how often does not depend on the clock.
    "precomputed": (
        *SMALL, "method=kd", "teacher.precompute=true", "dataset.fraction=0.014",
        "arch@teacher=resnet8", "checkpoint_minutes=1e-9",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """``act``, one of ``ACTS``, happens at a moment at which files under ``root`` change.

    It is the ``number``-th such moment, from 1.

    ``seed`` decides what a power failure takes.
    """

    act: str
    number: int
    root: Path
    seed: int = 0


YEAR = 365 * 24 * 3600.0


class Torn:
    """A stream whose every write is told, and is two, with a moment in between."""

    def __init__(
        self, stream: Any, begins: Callable[[], object], moment: Callable[[], None]
    ) -> None:
        self._stream, self._begins, self._moment = stream, begins, moment

    def write(self, data: Any) -> int:
        self._begins()
        half = len(data) // 2
        self._stream.write(data[:half])
        self._stream.flush()
        self._moment()
        self._stream.write(data[half:])
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


@dataclass(frozen=True)
class Change:
    """A name that was made, changed or removed in ``folder``, and how a disk forgets that.

    ``shadow`` is another name of what stood there before.
    """

    folder: Path
    undo: Callable[[], object]
    shadow: Path | None


@dataclass
class Disk:
    """What this process does to files under a fault's root, moment by moment."""

    fault: Fault
    moments: int = 0
    full: bool = False
    watching: bool = True
    # How long each file that is not synced was when it last was.
    written: dict[str, int] = field(default_factory=dict)
    # What became of names, in its order, that folders not synced since may lose again.
    names: list[Change] = field(default_factory=list)

    def watch(self) -> None:
        """Watch everything that this process does from now on."""
        sys.addaudithook(self._audit)
        sync, opened = os.fsync, Path.open

        def fsync(descriptor: int) -> None:
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            if self._is_ours(path):
                self._moment(grows=True)
            sync(descriptor)
            self._synced(path)  # the folder that holds the root among them

        def open_torn(path: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
            stream = opened(path, mode, *more, **named)
            if mode not in ("wb", "a", "ab") or not self._is_ours(str(path)):
                return stream

            def begins() -> None:
                self.written.setdefault(str(path), path.stat().st_size)

            begins()
            return Torn(stream, begins, lambda: self._moment(grows=True))

        os.fsync = fsync  # type: ignore[assignment]
        Path.open = open_torn  # type: ignore[assignment, method-assign]

    def _is_ours(self, path: object) -> bool:
        return self.watching and f"{path}/".startswith(f"{self.fault.root}/")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            creates = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if creates and self._is_ours(path):
                self._moment(grows=True)
        elif event in REMEMBERED and self._is_ours(arguments[0]):
            self._moment(grows=event == "os.mkdir")
            with self.not_watching():
                REMEMBERED[event](self, *map(Path, arguments[: 2 if event == "os.rename" else 1]))

    def _moment(self, grows: bool) -> None:
        self.moments += 1
        if self.moments == self.fault.number:
            ACTS[self.fault.act](self)
        if self.full and grows:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def remember_rename(self, source: Path, target: Path) -> None:
        """Keep what a rename will replace, as a disk does until it has written the new name."""
        shadow = self._shadow(target)

        def undo() -> None:
            if target.exists():  # else it was removed since
                target.rename(source)
            if shadow:
                shadow.rename(target)

        self.names.append(Change(target.parent, undo, shadow))
        self.written.pop(str(target), None)
        if str(source) in self.written:  # a new name does not bring the bytes to the disk
            self.written[str(target)] = self.written.pop(str(source))

    def remember_removal(self, path: Path) -> None:
        """Keep what is about to be removed."""
        shadow = self._shadow(path)
        if shadow:
            self.names.append(Change(path.parent, lambda: shadow.rename(path), shadow))

    def remember_folder(self, path: Path) -> None:
        """Keep in mind that a folder is about to be made."""
        if not path.exists():
            undo = partial(shutil.rmtree, path, ignore_errors=True)
            self.names.append(Change(path.parent, undo, None))

    def _shadow(self, path: Path) -> Path | None:
        if not path.is_file():
            return None
        shadow = path.with_name(f"{path.name}.{self.moments}.shadow")
        os.link(path, shadow)
        return shadow

    def _synced(self, path: str) -> None:
        self.written.pop(path, None)
        with self.not_watching():
            for change in [change for change in self.names if change.folder == Path(path)]:
                self.names.remove(change)
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
        """End the process here and now."""
        self._clear_shadows()
        os.kill(os.getpid(), signal.SIGKILL)

    def lose_power(self) -> None:
        """End the process, and lose what the disk was not asked to keep.

        Of what was written since a file's last sync a random beginning stays, of the names made,
        changed and removed since their folder's last sync the first few.
        """
        chance = random.Random(self.fault.seed)
        self.watching = False
        for path, synced in self.written.items():
            if Path(path).is_file():
                os.truncate(path, chance.randint(synced, Path(path).stat().st_size))
        for change in reversed(self.names[chance.randint(0, len(self.names)) :]):
            change.undo()
        self.kill()

    def fill(self) -> None:
        """Let the disk be full from now on."""
        self.full = True

    def shift_clock(self) -> None:
        """Let the clock jump by a year, on at odd moments and back at even ones.

        What the lease was stamped with jumps along, as it does when the clock is the server's.
        """
        clock, shift = time.time, YEAR if self.fault.number % 2 else -YEAR
        time.time = lambda: clock() + shift
        with self.not_watching():
            for lease in self.fault.root.rglob(".lease"):
                os.utime(lease, (time.time(),) * 2)

    def stand_still(self) -> None:
        """Stop until somebody continues the process."""
        self._clear_shadows()
        os.kill(os.getpid(), signal.SIGSTOP)

    def tell(self) -> None:
        """Do nothing: the moments are only counted."""

    def _clear_shadows(self) -> None:
        self.watching = False
        for shadow in self.fault.root.rglob("*.shadow"):
            shadow.unlink()


REMEMBERED: dict[str, Callable[..., None]] = {
    "os.rename": Disk.remember_rename,
    "os.remove": Disk.remember_removal,
    "os.mkdir": Disk.remember_folder,
}
ACTS: dict[str, Callable[[Disk], None]] = {
    "killed": Disk.kill,
    "power failure": Disk.lose_power,
    "disk full": Disk.fill,
    "clock jumps": Disk.shift_clock,
    "stands still": Disk.stand_still,
    "undisturbed": Disk.tell,
}


def _train(overrides: tuple[str, ...], fault: Fault | None, told: Any) -> None:
    """Train a cell, in a process of its own; send what it was told and its moments."""
    import torch

    import train_student
    from sskd.commands.process import run_command

    torch.set_num_threads(1)
    os.environ["WANDB_MODE"] = "disabled"
    os.environ["HYDRA_FULL_ERROR"] = "0"
    sys.argv = [str(train_student.__file__), *overrides]
    log = Path(told)
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
                status = 70  # EX_SOFTWARE: a traceback, which no fault may end in
        if disk:
            stream.write(f"\nmoments {disk.moments}\n")
    os._exit(status)


class Attempt:
    """A process that trains ``cell`` under ``runs``, broken by ``fault``."""

    def __init__(
        self, cell: str, runs: Path, *more: str, fault: Fault | None = None, log: Path | None = None
    ) -> None:
        self.log = log or runs.with_name(f"{runs.name}.log")
        overrides = (*CELLS[cell], *more, f"runs={runs}")
        self._process = forked(_train, overrides, fault, str(self.log))

    def end(self, after: float | None = None) -> int:
        """Wait for the process, kill it ``after`` seconds if it lives, return its exit status."""
        self._process.join(after)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        status = self._process.exitcode
        assert isinstance(status, int)
        return status

    def is_alive(self) -> bool:
        """Return whether the process is still at work."""
        return bool(self._process.is_alive())

    def is_stopped(self) -> bool:
        """Return whether the process stands still."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    def send(self, signum: int) -> None:
        """Send a signal, if there is anyone to get it."""
        pid = self._process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)

    @property
    def told(self) -> list[str]:
        """What the process printed, line by line."""
        return self.log.read_text().splitlines()

    @property
    def moments(self) -> int:
        """At how many moments it changed files."""
        return int(self.told[-1].removeprefix("moments "))
