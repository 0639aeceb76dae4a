"""The tracker of a run: of W&B, whose package is imported only by a run that uses it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from sskd.distributed import ranks
from sskd.errors import UserError
from sskd.output import complain
from sskd.runs.epoch_line import EpochLine
from sskd.runs.plan import RunPlan
from sskd.runs.result import RunResult
from sskd.runs.run import Run
from sskd.tracking.environment import requested_mode

if TYPE_CHECKING:
    from sskd.tracking.tracker import Tracker


class NoTracker:
    """Takes the place of a ``Tracker`` in a run without W&B."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing."""

    def log(self, line: EpochLine) -> None:
        """Do nothing."""

    def picture(self, name: str, path: Path) -> None:
        """Do nothing."""

    def summarise(self, result: RunResult) -> None:
        """Do nothing."""


def tracker_of(run: Run, plan: RunPlan, *, under_agent: bool = False) -> Tracker | NoTracker:
    """Return the tracker of ``run`` for a ``with`` statement; see ``Tracker``.

    Of several ranks, the first one logs.
    """
    if requested_mode(plan.config.wandb.mode) == "disabled" or not ranks.is_first():
        return NoTracker()
    # It takes a second, and a machine that trains without W&B may lack its package.
    from sskd.tracking.tracker import Tracker

    return Tracker(run, plan, under_agent=under_agent)


def report_finished(run: Run, plan: RunPlan, result: RunResult) -> None:
    """Log a run that had finished before to the W&B run that ``wandb agent`` has named for it."""
    try:
        run.metrics.lines = run.metrics.read()
    except UserError as error:
        complain(f"warning: {error}")
    with tracker_of(run, plan, under_agent=True) as tracker:
        run.metrics.subscribe(tracker.log)
        tracker.summarise(result)
