"""A launcher whose worker processes die: which jobs are launched again, and the outcome."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from conftest import Compose
from omegaconf import OmegaConf

from sskd.commands.sweep import Job, Sweep
from sskd.errors import UnfinishedError
from sskd.runs.status import write_status

JOBS = 8


class Pool:
    """A launcher that runs ``size`` jobs at once; if one of them dies, all of them end.

    Attributes:
        launched: the numbers of the jobs in each call.
    """

    def __init__(self, root: Path, size: int, deadly: set[int], prepares: bool) -> None:
        self._root, self._size, self._deadly, self._prepares = root, size, deadly, prepares
        self.launched: list[list[int]] = []

    def __call__(self, batch: list[list[str]], initial_job_idx: int) -> None:
        numbers = [int(overrides[0].removeprefix("seed=")) for overrides in batch]
        self.launched.append(numbers)
        for together in chunks(numbers, self._size):
            dies = bool(self._deadly & set(together))
            for number in together:
                if not (dies and self._prepares):
                    write_status(self._root / str(number), "running")
            if dies:
                raise BrokenProcessPool("a worker was killed")
            for number in together:
                (self._root / str(number) / "result.json").write_text("{}")


def chunks(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


def sweep_of(composed: Compose, root: Path) -> Sweep:
    config = composed("dataset=digits", "method=vanilla", "arch@student=resnet8")
    sweep = Sweep([], compose=lambda _: OmegaConf.create())
    sweep.jobs = [
        Job([f"seed={k}"], "", config.model_copy(update={"seed": k}), root / str(k))
        for k in range(JOBS)
    ]
    return sweep


@pytest.mark.parametrize("size", [1, 3, JOBS])
@pytest.mark.parametrize("deadly", [{0}, {2, 7}, {0, 1, 2}])
@pytest.mark.parametrize("prepares", [False, True])  # before the run starts
def test_a_job_that_kills_its_process_fails_alone(
    composed: Compose, tmp_path: Path, capsys: Any, size: int, deadly: set[int], prepares: bool
) -> None:
    sweep, pool = sweep_of(composed, tmp_path), Pool(tmp_path, size, deadly, prepares)
    sweep.launch(sweep.queue(), None, pool)
    finished = {int(path.parent.name) for path in tmp_path.glob("*/result.json")}
    assert finished == set(range(JOBS)) - deadly
    assert len(pool.launched) <= 1 + 3 * JOBS  # each failure belongs to at least one job
    with pytest.raises(UnfinishedError) as error:
        sweep.report_unfinished()
    assert error.value.status == 1
    out, err = capsys.readouterr()
    assert f"{len(finished)} of {JOBS} jobs have finished" in out
    for number in range(JOBS):
        assert (f"  {tmp_path / str(number)}: " in err) == (number in deadly)


def test_jobs_of_a_dead_process_are_launched_again(composed: Compose, tmp_path: Path) -> None:
    sweep, pool = sweep_of(composed, tmp_path), Pool(tmp_path, 3, {4}, prepares=False)

    def dies_once(batch: list[list[str]], initial_job_idx: int) -> None:
        try:
            pool(batch, initial_job_idx)
        finally:
            pool._deadly.clear()

    sweep.launch(sweep.queue(), None, dies_once)
    sweep.report_unfinished()
    # The three jobs that were running come after the others, in the same pool.
    assert pool.launched == [list(range(JOBS)), [6, 7, 3, 4, 5]]


def test_another_failure_of_the_launcher_ends_the_sweep(
    composed: Compose, tmp_path: Path, capsys: Any
) -> None:
    """Jobs on a cluster may still be in its queue, so they must not be launched twice."""
    sweep, launched = sweep_of(composed, tmp_path), []

    def gives_up(batch: list[list[str]], initial_job_idx: int) -> None:
        launched.append(batch)
        raise RuntimeError("no cluster")

    sweep.launch(sweep.queue(), None, gives_up)
    with pytest.raises(UnfinishedError):
        sweep.report_unfinished()
    assert len(launched) == 1
    assert "error: the launcher gave up: no cluster" in capsys.readouterr().err
