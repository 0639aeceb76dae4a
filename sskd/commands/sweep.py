"""A grid of runs: which have finished, which are to be launched, and how it ended."""

from __future__ import annotations

import os
import shlex
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sskd.commands.hydra_errors import user_message
from sskd.composition import search_path_words
from sskd.config import Config, read_config
from sskd.errors import BusyError, UnfinishedError, UserError
from sskd.invocation import command_words, current_role
from sskd.output import complain, say
from sskd.runs.folder import read_result, write_queued
from sskd.runs.identity import fingerprints_kept, full_config
from sskd.runs.lock import is_held
from sskd.runs.run import Run
from sskd.runs.status import (
    SWEEP_VARIABLE,
    failed_in_this_sweep,
    forced_in_this_sweep,
    read_status,
)
from sskd.teachers.find import find_teacher, run_location
from sskd.tracking.environment import check_environment
from sskd.training.signals import raise_on_sigterm

Overrides = Sequence[str]
_ENDING = 30.0  # seconds that the processes of a broken pool have to end


@dataclass(frozen=True)
class Job:
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
            run = Run(self.folder, full_config(self.config, found.digest if found else None))
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
        cells: dict[str, Job] = {}
        for overrides in grid:
            composed = compose(list(overrides))
            own = [str(key) for key in composed if key != "hydra"]
            config = read_config(OmegaConf.masked_copy(composed, own))
            check_environment(config.wandb.mode)
            folder, changed = run_location(config)
            cell = Job(list(overrides), _command(composed, overrides), config, folder)
            # A run that has the folder's name from an earlier recipe may be another cell's.
            cells.setdefault(f"{folder} {changed}", cell)
        self.cells = list(cells.values())

    def queue(self) -> list[list[str]]:
        """Mark the cells that are to be launched as queued, and return their overrides."""
        os.environ[SWEEP_VARIABLE] = uuid.uuid4().hex  # launchers hand it on to their processes
        with fingerprints_kept():
            left = [cell for cell in self.cells if cell.config.force or not cell.has_finished()]
        for cell in left:
            with suppress(UserError):  # it is not this sweep's then, or its own job tells
                write_queued(cell.folder, command=cell.command)
        done = len(self.cells) - len(left)
        say(f"{len(self.cells)} cells, {done} finished already")
        return [cell.overrides for cell in left]

    def launch(self, left: list[list[str]], size: int | None, launcher: Callable[..., Any]) -> None:
        """Launch ``left``, at most ``size`` at once.

        If a process of a pool dies, the pool ends the others too. So its cells are launched again:
        those that had not begun first, then those that had, and one by one those that had begun
        twice, since one of them may be the reason. Another failure of the launcher ends all.
        """
        size, number = size or max(len(left), 1), 0
        broken: Counter[tuple[str, ...]] = Counter()
        alone: list[list[str]] = []
        while left or alone:
            batch = left[:size] or alone[:1]
            left, alone = left[size:], alone if left else alone[1:]
            try:
                with raise_on_sigterm():
                    launcher(batch, initial_job_idx=number)
            except BrokenExecutor as error:
                complain(f"warning: a process has died: {user_message(error)}")
                untouched, begun = self._left_by_a_pool(batch)
                broken.update(map(tuple, begun))
                left = untouched + left + [cell for cell in begun if broken[tuple(cell)] == 1]
                alone += [cell for cell in begun if broken[tuple(cell)] == 2]
            except Exception as error:  # of joblib or submitit, about a process that died
                complain(f"error: the launcher gave up: {user_message(error)}")
                return
            number += len(batch)

    def _left_by_a_pool(self, batch: list[list[str]]) -> tuple[list[list[str]], list[list[str]]]:
        """Return the overrides of the cells that have not begun and of those that have not ended.

        At least one counts as begun: it may have died in training its teacher.
        """
        cells = [cell for cell in self.cells if cell.overrides in batch]
        end = time.monotonic() + _ENDING
        while any(is_held(cell.folder) for cell in cells) and time.monotonic() < end:
            time.sleep(0.1)  # the pool ends its processes at this moment
        settled = [c for c in cells if not _is_pending(c) or failed_in_this_sweep(c.folder)]
        left = [cell for cell in cells if cell not in settled and not is_held(cell.folder)]
        begun = [c for c in left if read_status(c.folder).get("state") != "queued"] or left[:1]
        untouched = [cell.overrides for cell in left if cell not in begun]
        return untouched, [cell.overrides for cell in begun]

    def report_unfinished(self) -> None:
        """Tell which cells have not finished, and why.

        Raises:
            UnfinishedError: some have not; its status is BusyError's where other processes are at
                work on all of these.
        """
        left = [cell for cell in self.cells if _is_pending(cell)]
        done = len(self.cells) - len(left)
        say(f"{done} of {len(self.cells)} cells have finished")
        busy = [cell for cell in left if is_held(cell.folder)]
        for cell in left:
            told = "another process is at work on it" if cell in busy else _reason(cell)
            complain(f"  {cell.folder}: {told}")
        if left:
            raise UnfinishedError((BusyError if left == busy else UserError).status)


def _is_pending(cell: Job) -> bool:
    """Return whether the run has failed or has no result; an old one may lie where it failed."""
    if failed_in_this_sweep(cell.folder) is not None:
        return True
    if cell.config.force and not forced_in_this_sweep(cell.folder):
        return True
    try:
        return read_result(cell.folder) is None
    except UserError:
        return True


def _reason(cell: Job) -> str:
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
    words = [*command_words(current_role()), *search_path_words()]
    if "-cd" in words:  # the primary configuration may be a sweep's
        words += ["-cn", composed.hydra.job.config_name, "hydra.mode=RUN"]
    return shlex.join([*words, *overrides])
