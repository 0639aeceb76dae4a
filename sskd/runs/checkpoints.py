"""The checkpoints of a run: ``last.pt``, ``previous.pt`` and ``best.pt``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sskd.distributed import ranks
from sskd.errors import CorruptFileError, UserError
from sskd.output import complain
from sskd.runs.checkpoint_file import load_checkpoint, save_checkpoint
from sskd.runs.comparison import other_run
from sskd.runs.identity import identity
from sskd.runs.lock import FolderLock
from sskd.runs.metrics_log import MetricsLog
from sskd.runs.names import BEST, DAMAGED, LAST, NAME, PREVIOUS

State = dict[str, Any]


class Checkpoints:
    """Saves and loads the checkpoints of the run of ``config`` in ``folder``.

    A checkpoint names its run by the settings that decide the result, and holds the position in
    ``metrics``. The first of several ranks writes and reads; all of them get what it read.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], lock: FolderLock, metrics: MetricsLog
    ) -> None:
        self._folder, self._config, self._lock, self._metrics = folder, config, lock, metrics

    def save(self, state: State) -> None:
        """Write ``last.pt``, from which the run resumes; the one before it becomes previous.pt.

        Then the subscribers of the metrics receive the lines that it covers.
        """
        ranks.from_first(lambda: self._save(state))
        self._metrics.notify()

    def _save(self, state: State) -> None:
        content = {**state, **self._metrics.position(), NAME: identity(self._config)}
        last, previous = self._folder / LAST, self._folder / PREVIOUS
        with self._lock.writing() as still_ours:
            save_checkpoint(last, content, keep=previous, still_ours=still_ours)

    def load(self, phases: Collection[str]) -> State | None:
        """Return the last saved state, on the CPU, and cut the metrics back to its position.

        If ``last.pt`` is corrupt, ``previous.pt`` is used, with a warning. Returns None, without
        metrics, if nothing was saved.

        Args:
            phases: the names of the run's phases; the checkpoint belongs to one of them.

        Raises:
            UserError: all checkpoints or the metrics are corrupt, or they are another run's.
        """
        return ranks.from_first(lambda: self._load(phases))

    def _load(self, phases: Collection[str]) -> State | None:
        last, previous = self._folder / LAST, self._folder / PREVIOUS
        damage = ""
        for path in (last, previous):
            if not path.exists():
                continue
            try:
                state = self._read(path, phases)
                lines = self._metrics.lines_at(state)
            except CorruptFileError as error:
                damage = damage or f"{self._folder}: {error}"
                continue
            if damage:
                complain(f"warning: {damage}; resuming from {path.name}")
                self._replace_last(path)
            self._metrics.rewind(lines)
            return state
        if damage:
            raise UserError(
                f"{damage}; restore the file from a copy, or delete this folder to start from "
                "scratch"
            )
        self._metrics.rewind([])
        return None

    def _read(self, path: Path, phases: Collection[str]) -> State:
        state = load_checkpoint(path)
        if other := self._other_run(path, state):
            raise UserError(
                f"{path}: is a checkpoint of another run: {other}; restore this run's file, or "
                "delete this folder to start again"
            )
        if not isinstance(state.get("stage"), str) or state["stage"] not in phases:
            raise CorruptFileError(path.name, f"it belongs to phase '{state.get('stage')}'")
        return state

    def _replace_last(self, intact: Path) -> None:
        """Put the ``intact`` checkpoint in the place of a corrupt ``last.pt``.

        Otherwise the next checkpoint would move the corrupt one over the intact one.
        """
        last = self._folder / LAST
        self._lock.check()
        if last.exists():
            last.replace(self._folder / DAMAGED)  # kept for inspection
        intact.replace(last)

    def _other_run(self, path: Path, state: Mapping[str, Any]) -> str:
        """Return how the run that a checkpoint names differs from this one; "" if it does not."""
        try:
            return other_run(state, self._config)
        except ValueError as error:
            raise CorruptFileError(path.name, str(error)) from None

    def save_best(self, weights: Mapping[str, Tensor], epoch: int, accuracy: float) -> None:
        """Write ``best.pt``: the ``weights`` of the best epoch, in the published layout."""
        ranks.from_first(lambda: self._save_best(weights, epoch, accuracy))

    def _save_best(self, weights: Mapping[str, Tensor], epoch: int, accuracy: float) -> None:
        state = {"model": weights, "epoch": epoch, "accuracy": accuracy}
        content = {**state, NAME: identity(self._config)}
        with self._lock.writing() as still_ours:
            save_checkpoint(self._folder / BEST, content, still_ours=still_ours)

    def load_best(self, epoch: int) -> dict[str, Tensor] | None:
        """Return the weights of the best ``epoch``; None, with a warning, if they are lost."""
        try:
            best = load_checkpoint(self._folder / BEST)
            if other := self._other_run(self._folder / BEST, best):
                raise CorruptFileError(BEST, f"it is of another run: {other}")
            if best.get("epoch") != epoch:
                raise CorruptFileError(BEST, f"it is of epoch {best.get('epoch')}")
            weights = best.get("model")
            if not isinstance(weights, dict) or not _are_tensors(weights):
                raise CorruptFileError(BEST, "it has no weights")
        except (CorruptFileError, OSError) as error:
            lost = f"the weights of epoch {epoch}, the best, are lost"
            complain(f"warning: {self._folder}: {lost}: {error}")
            return None
        return weights


def _are_tensors(weights: dict[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items())
