"""Find the teachers of finished students by what their runs recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sskd.errors import UserError
from sskd.measuring.selection import Chosen
from sskd.models import find_checkpoint, read_checkpoint, weights_digest
from sskd.report.results import FinishedRun
from sskd.runs.folder import read_config_file, read_result
from sskd.runs.names import BEST, CONFIG, WEIGHTS
from sskd.runs.result import RunResult
from sskd.trained import TrainedNetwork

DEPTH = 5  # of a student's folder below the folder of runs


def find_teacher_file(run: FinishedRun, given: str | None) -> Path:
    """Return the file with the weights of the teacher of ``run``, checked by their digest.

    It is ``given``, or the file in the run's configuration, or that of a teacher trained by this
    suite in the same folder of runs.

    Raises:
        UserError: there is no such file, or ``given`` has other weights.
    """
    recorded = run.origin.teacher
    if given is not None:
        path = find_checkpoint(given)
        if recorded is not None and _digest(path) != recorded:
            raise UserError(
                f"--teacher {given}: is not the teacher of {run.folder}, which was distilled from "
                f"other weights (digest {recorded[:8]}); name that file"
            )
        return path
    for path in _candidates(run):
        with suppress(UserError):  # it is missing or broken
            if recorded is None or _digest(path) == recorded:
                return path
    raise UserError(
        f"{run.folder}: its teacher, a {run.teacher}, is neither in its recorded place nor in the "
        "same folder of runs; name its file with --teacher FILE"
    )


def pairs_of(chosen: Sequence[Chosen], given: str | None) -> list[tuple[Chosen, Path]]:
    """Return the networks that have a teacher, each with its teacher's file.

    If ``given`` is set, it is the teacher of each network trained alone and of each file. If not, a
    network trained alone is compared with the teachers of the students in ``chosen`` that have its
    architecture and dataset; if there are none, it is left out.

    Raises:
        UserError: a teacher is missing, or no network has one.
    """
    found: list[tuple[Chosen, Path]] = []
    for each in chosen:
        if each.run is None and given is None:
            raise UserError(f"{each.name}: is not a run; name its teacher with --teacher FILE")
        found += [(each, path) for path in _teachers(each, chosen, given)]
    if not found:
        raise UserError(
            f"{chosen[0].name}: was trained without a teacher; name a teacher with --teacher FILE, "
            "or add the runs of students of the same architecture and dataset"
        )
    return found


def with_teacher(chosen: Chosen, teacher: TrainedNetwork) -> Chosen:
    """Return ``chosen``; a network trained alone as if it were a student of ``teacher``."""
    run = chosen.run
    if run is None or run.teacher is not None:
        return chosen
    origin = replace(run.origin, teacher=_digest(teacher.path))
    return replace(chosen, run=replace(run, teacher=teacher.name, origin=origin))


def _teachers(each: Chosen, chosen: Sequence[Chosen], given: str | None) -> list[Path]:
    """Return the files of the teachers with which to compare one network."""
    run = each.run
    if run is not None and run.teacher is not None:
        return [find_teacher_file(run, given)]
    if given is not None:
        return [find_checkpoint(given)]
    students = [other.run for other in chosen if other.run and other.run.teacher]
    same = [s for s in students if run and (s.student, s.dataset) == (run.student, run.dataset)]
    files = dict.fromkeys(find_teacher_file(student, None) for student in same)
    # A teacher that has a copy is one teacher.
    return list({_digest(path): path for path in files}.values())


def _candidates(run: FinishedRun) -> Iterator[Path]:
    """Yield files that may hold the teacher of ``run``."""
    teacher = read_config_file(run.folder / CONFIG).get("teacher")
    checkpoint = teacher.get("checkpoint") if isinstance(teacher, dict) else None
    if isinstance(checkpoint, str):
        with suppress(UserError):
            yield find_checkpoint(checkpoint, run.teacher_epoch or "best")
    folder = run.folder.absolute()
    if len(folder.parents) < DEPTH or run.teacher is None:
        return
    for result in sorted(folder.parents[DEPTH - 2].glob(f"scratch/{run.teacher}/*/result.json")):
        with suppress(UserError):
            kept = read_result(result.parent, RunResult)
            digests = (kept.digest.best, kept.digest.last) if kept else ()
            for name, digest in zip((BEST, WEIGHTS), digests, strict=False):
                if digest is not None and digest == run.origin.teacher:
                    yield result.parent / name


_digests: dict[Path, str] = {}  # many students share a teacher


def _digest(path: Path) -> str:
    if path not in _digests:
        _digests[path] = weights_digest(read_checkpoint(path).state)
    return _digests[path]
