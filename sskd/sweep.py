"""A grid of runs: which have finished, which are to be launched, and how it ended."""

from __future__ import annotations

import os
import shlex
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sskd.cli import explain
from sskd.config import Config, read_config
from sskd.errors import BusyError, UnfinishedError, UserError
from sskd.identity import describe
from sskd.interrupt import termination_raised
from sskd.lock import FolderLock, is_held
from sskd.run import Run
from sskd.run_folder import read_result
from sskd.status import (
    SWEEP_VARIABLE,
    failed_in_this_sweep,
    forced_in_this_sweep,
    read_status,
    write_status,
)
from sskd.storage import make_folder
from sskd.teachers import find_teacher, locate
from sskd.wandb_environment import check_environment

Overrides = Sequence[str]


@dataclass(frozen=True)
class Cell:
    """One run of a grid: the overrides that compose it, the command that repeats it, its folder."""

    overrides: list[str]
    command: str
    config: Config
    folder: Path

    def has_finished(self) -> bool:
        """Return whether the run has a result; one that cannot be judged has to run to say why."""
        try:
            if read_result(self.folder) is None:
                return False
            found = find_teacher(self.config)
            run = Run(self.folder, describe(self.config, found.digest if found else None))
            return run.finished() is not None
        except UserError:
            return False


class Sweep:
    """The cells of one command; cells that are one run, as a student alone of two pairs, are one.

    Args:
        grid: the overrides of each cell.
        compose: returns the configuration of one cell's overrides.

    Raises:
        UserError: a cell's configuration is wrong; nothing has been launched.
    """

    def __init__(
        self, grid: Iterable[Overrides], compose: Callable[[list[str]], DictConfig]
    ) -> None:
        cells: dict[Path, Cell] = {}
        for overrides in grid:
            composed = compose(list(overrides))
            own = [str(key) for key in composed if key != "hydra"]
            config = read_config(OmegaConf.masked_copy(composed, own))
            check_environment(config.wandb.mode)
            folder, _ = locate(config)
            cell = Cell(list(overrides), _command(composed, overrides), config, folder)
            cells.setdefault(folder, cell)
        self.cells = list(cells.values())

    def begin(self) -> list[list[str]]:
        """Mark the cells that are to be launched as queued, and return their overrides."""
        os.environ[SWEEP_VARIABLE] = uuid.uuid4().hex  # launchers hand it on to their processes
        left = [cell for cell in self.cells if cell.config.force or not cell.has_finished()]
        for cell in left:
            with suppress(UserError):  # it is not this sweep's then, or its own job tells
                _queue(cell)
        done = len(self.cells) - len(left)
        print(f"{len(self.cells)} cells, {done} finished already", flush=True)
        return [cell.overrides for cell in left]

    def launch(self, left: list[list[str]], size: int | None, launcher: Callable[..., Any]) -> None:
        """Launch ``left``, at most ``size`` at once; a launcher that breaks down ends that."""
        size = size or max(len(left), 1)
        for first in range(0, len(left), size):
            try:
                with termination_raised():
                    launcher(left[first : first + size], initial_job_idx=first)
            except Exception as error:  # of joblib or submitit, about a process that died
                print(f"error: the launcher gave up: {explain(error)}", file=sys.stderr)
                return

    def end(self) -> None:
        """Tell which cells have not finished, and why.

        Raises:
            UnfinishedError: some have not; its status is BusyError's where other processes are at
                work on all of these.
        """
        left = [cell for cell in self.cells if _is_left(cell)]
        done = len(self.cells) - len(left)
        print(f"{done} of {len(self.cells)} cells have finished", flush=True)
        busy = [cell for cell in left if is_held(cell.folder)]
        for cell in left:
            told = "another process is at work on it" if cell in busy else _reason(cell)
            print(f"  {cell.folder}: {told}", file=sys.stderr, flush=True)
        if left:
            raise UnfinishedError((BusyError if left == busy else UserError).status)


def _queue(cell: Cell) -> None:
    make_folder(cell.folder)
    lock = FolderLock(cell.folder)
    lock.acquire(watch=False)  # whoever may have died there is its own job's concern
    try:
        write_status(cell.folder, "queued", command=cell.command)
    finally:
        lock.release()


def _is_left(cell: Cell) -> bool:
    """Return whether the run has failed or has no result; an old one may lie where it failed."""
    if failed_in_this_sweep(cell.folder) is not None:
        return True
    if cell.config.force and not forced_in_this_sweep(cell.folder):
        return True
    try:
        return read_result(cell.folder) is None
    except UserError:
        return True


def _reason(cell: Cell) -> str:
    """Return why the run of ``cell`` has not finished."""
    status = read_status(cell.folder)
    if status.get("state") == "failed":
        return "failed: " + str(status.get("error")).removeprefix(f"{cell.folder}: ")
    again = "the same command" + " without force=true" * cell.config.force
    if status.get("state") == "running":
        return f"was killed; {again} goes on from its last checkpoint"
    return f"{status.get('state', 'not begun')}; the same command does it"


def _command(composed: DictConfig, overrides: Overrides) -> str:
    """Return the command line that runs one cell alone."""
    words = ["python", Path(sys.argv[0]).name]
    for source in composed.hydra.runtime.config_sources:
        if source.provider == "command-line":  # the folder of a sweep's file
            words += ["-cd", source.path, "-cn", composed.hydra.job.config_name, "hydra.mode=RUN"]
    return shlex.join([*words, *overrides])
