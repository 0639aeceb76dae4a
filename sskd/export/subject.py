"""The network to export, and the record of its training if a run holds one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sskd.errors import UserError
from sskd.files import expanded
from sskd.models import find_checkpoint, weights_digest
from sskd.runs.folder import read_result
from sskd.runs.names import BEST, CONFIG, RESULT, WEIGHTS
from sskd.runs.result import RunResult
from sskd.runs.status import STATUS
from sskd.trained import TrainedNetwork

FILES = {"last": WEIGHTS, "best": BEST}  # of a run, by epoch


@dataclass(frozen=True)
class Subject:
    """A trained network.

    Attributes:
        trained: the network and its dataset.
        result: of its run; None for a file outside of a run's folder.
        epoch: of its weights, ``last`` or ``best``; None without a run.
    """

    trained: TrainedNetwork
    result: RunResult | None = None
    epoch: str | None = None

    @property
    def arch(self) -> str:
        """The architecture, whichever method deploys it."""
        return (self.result and self.result.student) or self.trained.name

    @property
    def name(self) -> str:
        """A name for files: dataset, networks, method and folder of the run, or the file's stem."""
        path, result = self.trained.path, self.result
        if result is None:
            return _as_file_name(path.stem)
        networks = f"{result.teacher}-{result.student}" if result.teacher else result.student
        method = result.method if result.teacher else None
        parts = (result.dataset, networks, method, path.absolute().parent.name)
        name = "-".join(str(part) for part in parts if part)
        return _as_file_name(f"{name}-best" if self.epoch == "best" else name)


def find_subject(
    checkpoint: str,
    *,
    epoch: str = "last",
    arch: str | None = None,
    overrides: Sequence[str] = (),
    folders: Sequence[Path] = (),
) -> Subject:
    """Return the network that ``checkpoint``, a run's folder or a file, names.

    Args:
        epoch: ``last`` or ``best``, of a folder.
        arch: as in ``TrainedNetwork``; so are ``overrides`` and ``folders``.

    Raises:
        UserError: there is no such file; ``epoch`` is given for a file; the run has not finished;
            or the weights are not those of its result.
    """
    path = expanded(checkpoint)
    # A run that has not started has a status alone.
    if any((path / name).exists() for name in (CONFIG, STATUS)):
        _require_finished(path, path / FILES[epoch])
        path = path / FILES[epoch]
    elif path.is_dir():
        path = find_checkpoint(path, epoch)
    elif epoch != "last":
        raise UserError(f"{path}: is a file; --epoch chooses one in the folder of a run")
    trained = TrainedNetwork(path, arch=arch, overrides=overrides, folders=folders)
    if not (path.parent / CONFIG).exists():
        return Subject(trained)
    result = _require_finished(path.parent, path)
    return Subject(trained, result, _epoch_of(trained, result))


def _require_finished(folder: Path, weights: Path) -> RunResult:
    result = read_result(folder, RunResult)
    if result is None:
        raise UserError(
            f"{folder}: the run has not finished (there is no {RESULT}); train it to its end with "
            f"the command in {STATUS}"
        )
    if not weights.exists():
        raise UserError(f"{folder}: has no {weights.name}; choose --epoch last or --epoch best")
    return result


def _epoch_of(trained: TrainedNetwork, result: RunResult) -> str:
    """Return the epoch of ``result`` whose weights ``trained`` has."""
    recorded = {"last": result.digest.last, "best": result.digest.best}
    named = [epoch for epoch, file in FILES.items() if file == trained.path.name]
    found = weights_digest(trained.network)
    # The last epoch can be the best one: then the name of the file decides.
    for epoch in (*named, *recorded):
        if recorded[epoch] == found or (epoch in named and recorded[epoch] is None):
            return epoch
    raise UserError(
        f"{trained.path}: holds other weights than those that {RESULT} describes; move the file "
        f"out of the run's folder, or train the run again with force=true"
    )


def _as_file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "network"
