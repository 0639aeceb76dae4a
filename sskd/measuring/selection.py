"""Choose trained networks by name: files, folders of runs, and folders that hold many runs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sskd.errors import UserError, one_line
from sskd.files import expanded
from sskd.report.disambiguation import distinct_results
from sskd.report.results import (
    Epoch,
    FinishedRun,
    Warn,
    find_files,
    read_result_file,
    read_results,
)
from sskd.runs.names import BEST, CONFIG, RESULT, WEIGHTS

_FILES: dict[Epoch, str] = {"last": WEIGHTS, "best": BEST}
_DEPTHS = {"scratch": 3, "distill": 4}  # parts of a run's path from its kind on


@dataclass(frozen=True)
class Chosen:
    """A trained network that the user chose.

    Attributes:
        path: the file of its weights.
        name: its path, without the folders above the one that the user named.
        run: the run that trained it; None for a file.
    """

    path: Path
    name: str
    run: FinishedRun | None = None


def choose_networks(places: Sequence[str], epoch: Epoch, warn: Warn) -> list[Chosen]:
    """Return the networks at ``places``, each once.

    A place is a checkpoint, the folder of a run, or a folder with runs below it, of which the
    finished ones are taken. Malformed results and copies of runs are left out and reported through
    ``warn``.

    Args:
        epoch: whose weights to take of a run.

    Raises:
        UserError: no place is given, there is no network at one, or its run has not finished.
    """
    if not places:
        raise UserError("no trained network; name a checkpoint, a run or a folder of runs")
    found = {
        chosen.path.resolve(): chosen
        for place in places
        for chosen in _choose(expanded(place), epoch, warn)
    }
    runs = [chosen.run for chosen in found.values() if chosen.run]
    kept = {run.folder: run for run in distinct_results(runs, warn)}
    return _named_apart(
        [
            replace(chosen, run=kept[chosen.run.folder]) if chosen.run else chosen
            for chosen in found.values()
            if chosen.run is None or chosen.run.folder in kept
        ]
    )


def _named_apart(networks: Sequence[Chosen]) -> list[Chosen]:
    """Return ``networks``, with the paths of files that share a name below their common folder.

    The name of a file is its row: files that share one would be averaged.
    """
    counts = Counter(each.name for each in networks if each.run is None)
    same = [each.path.absolute() for each in networks if not each.run and counts[each.name] > 1]
    top = os.path.commonpath([path.parent for path in same]) if same else ""
    return [
        replace(each, name=str(each.path.absolute().relative_to(top)))
        if each.run is None and counts[each.name] > 1
        else each
        for each in networks
    ]


def _choose(place: Path, epoch: Epoch, warn: Warn) -> Iterator[Chosen]:
    if not place.exists():
        raise UserError(
            f"{place}: no such file or folder; name a checkpoint, a run or a folder of runs"
        )
    if place.is_file():
        yield Chosen(place, place.name)
        return
    is_run = any((place / name).exists() for name in (CONFIG, RESULT))
    runs = [_read_run(place)] if is_run else read_results(place, warn)
    for run in runs:
        yield Chosen(_weights_of(run, epoch), _inner_path(run, place), run)
    if runs:
        return
    if unfinished := len(list(find_files(place, [CONFIG], warn))):
        raise UserError(
            f"{place}: none of its {unfinished} runs has finished; run their commands again"
        )
    # Importing torch takes seconds, which --help should not.
    from sskd.models import find_checkpoint

    yield Chosen(find_checkpoint(place, epoch), place.absolute().name)


def _read_run(folder: Path) -> FinishedRun:
    """Return the result of the run in ``folder``; UserError if it has none."""
    path = folder / RESULT
    if not path.exists():
        raise UserError(
            f"{folder}: the run has not finished, it has no {RESULT}; run its command again, or "
            "name one of its files"
        )
    try:
        run = read_result_file(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not a result ({one_line(error)})") from None
    if run is None:
        raise UserError(f"{folder}: is a phase that students share; name the run of a network")
    return run


def _weights_of(run: FinishedRun, epoch: Epoch) -> Path:
    path = run.folder / _FILES[epoch]
    if not path.is_file():
        raise UserError(
            f"{run.folder}: has no {path.name}, the weights of the {epoch} epoch; "
            f"{'omit' if epoch == 'best' else 'add'} --best, or name a checkpoint"
        )
    return path


def _inner_path(run: FinishedRun, place: Path) -> str:
    """Return where ``run`` is below its dataset's folder, or else below ``place``."""
    parts = run.folder.absolute().parts[-_DEPTHS[run.kind] :]
    if parts[0] == run.kind:
        return "/".join(parts)
    return run.folder.name if run.folder == place else str(run.folder.relative_to(place))
