"""The accuracy that a search (a sweeper such as Optuna's) maximises."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from sskd.errors import UserError
from sskd.output import complain_once
from sskd.runs.names import RESULT
from sskd.runs.result import RunResult
from sskd.training.result import last_top1

# They run a grid, whatever its results are.
_GRIDS = ("ResumableSweeper", "BasicSweeper")


def objective(result: RunResult, folder: Path) -> float:
    """Return the top-1 of the last epoch in percent: on held-out images, else on the test set.

    Raises:
        UserError: the ``result`` in ``folder`` has none.
    """
    if result.holdout_top1 is None:
        return last_top1(result, folder)
    if result.holdout_top1.last is None:
        raise UserError(
            f"{folder / RESULT}: has no accuracy on held-out images; start from scratch with "
            "force=true"
        )
    return result.holdout_top1.last


def check_search(holdout: float) -> None:
    """Check the sweeper of this job, if it is one that searches.

    A warning is printed once if the search, without ``holdout``, chooses by the test set.

    Raises:
        UserError: it searches for the lowest accuracy.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN or str(hydra.sweeper.get("_target_")).endswith(_GRIDS):
        return
    direction = hydra.sweeper.get("direction")
    if getattr(direction, "name", direction) == "minimize":
        raise UserError(
            "hydra.sweeper.direction=minimize: would search for the lowest accuracy; add "
            "hydra.sweeper.direction=maximize"
        )
    if not holdout:
        complain_once(
            "warning: this search maximises the accuracy on the test set, so the accuracy that it "
            "finds is optimistic; add dataset.holdout=0.1 to search on held-out training images"
        )
