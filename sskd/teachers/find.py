"""Find a student's teacher: one of the suite's own runs, or a checkpoint from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from sskd.config import Config
from sskd.errors import UserError
from sskd.methods import METHODS
from sskd.models import (
    find_checkpoint,
    load_weights,
    read_checkpoint,
    recognise,
    weights_digest,
)
from sskd.output import say
from sskd.overrides import flatten
from sskd.runs.comparison import explain_difference, is_run_of, refuse_other_result
from sskd.runs.folder import read_config_file, read_result, run_folder
from sskd.runs.identity import full_config
from sskd.runs.names import BEST, CONFIG, HEADS, MOST_CHECKPOINT, WEIGHTS
from sskd.runs.plan import RunPlan, TeacherWeights
from sskd.runs.recipe import (
    diff_from_recipe,
    earlier_diffs_from_recipe,
    has_unfrozen_defaults,
    teacher_config,
    training_command,
)
from sskd.runs.result import RunResult
from sskd.teachers.shared import read_intact

_FILES = {"best": BEST, "last": WEIGHTS}
_TO_USE_HEADS = (
    "to use the heads, remove teacher.checkpoint and set runs=FOLDER to the folder in which the "
    "teacher was trained"
)


def missing_teacher(config: Config) -> Config | None:
    """Return the run that trains the teacher of ``config``, if it has not finished."""
    if config.teacher is None or config.teacher.checkpoint is not None:
        return None
    _refuse_other_epoch(config.teacher.method, config.teacher.epoch, config.method.name)
    expected = teacher_config(config)
    unfinished = read_result(run_folder(expected, diff_from_recipe(expected)), RunResult) is None
    return expected if unfinished else None


def _refuse_other_epoch(teacher_method: str, epoch: str, method: str) -> None:
    """Raise UserError if ``method`` uses heads of the last epoch with another epoch's weights."""
    if METHODS[method].uses_heads and METHODS[teacher_method].has_heads and epoch != "last":
        raise UserError(
            f"teacher.epoch={epoch}: method={method} uses the heads that "
            f"teacher.method={teacher_method} saves after its last epoch; use teacher.epoch=last"
        )


def _refuse_heads_of_checkpoint(teacher_method: str) -> None:
    """Raise UserError if a checkpoint, which has no heads, should come from ``teacher_method``."""
    if METHODS[teacher_method].has_heads:
        raise UserError(
            f"teacher.method={teacher_method} has no effect with teacher.checkpoint, which loads "
            f"the network without its heads; {_TO_USE_HEADS}"
        )


def report_ignored_heads(method: str, teacher: TeacherWeights) -> None:
    """Report heads beside the file of a ``teacher`` that ``method`` could use and does not get."""
    heads = teacher.path.parent / HEADS
    if METHODS[method].uses_heads and teacher.heads is None and heads.is_file():
        say(
            f"teacher: {heads} is ignored, because teacher.checkpoint gives the network alone; "
            f"{_TO_USE_HEADS}, and teacher.method to its method"
        )


def find_teacher(config: Config) -> TeacherWeights | None:
    """Return the weights of the teacher of ``config``; None for a network alone.

    Raises:
        UserError: the teacher is missing; the message has the command that trains it.
    """
    if config.teacher is None:
        return None
    if config.teacher.checkpoint is not None:
        _refuse_heads_of_checkpoint(config.teacher.method)
        path = find_checkpoint(config.teacher.checkpoint, config.teacher.epoch)
        content = path.stat()
        name = config.teacher.name
        return TeacherWeights(path, _digest(path, name, content.st_mtime_ns, content.st_size))
    uses_heads = METHODS[config.method.name].uses_heads
    return _suite_teacher(config.teacher.epoch, teacher_config(config), uses_heads=uses_heads)


def _suite_teacher(
    epoch: Literal["best", "last"], expected: Config, *, uses_heads: bool
) -> TeacherWeights:
    """Return the weights of the finished run of the suite that ``expected`` configures.

    ``uses_heads``: include the heads that the teacher was trained with, if its run saved them.
    """
    folder = run_folder(expected, diff_from_recipe(expected))
    result = read_result(folder, RunResult)
    if result is None:
        raise UserError(
            f"{folder}: no finished run of the teacher {expected.student.name}; train it with "
            f"`{training_command(expected)}`, or add teacher.train=true here, or name a file "
            "with teacher.checkpoint=PATH"
        )
    full = full_config(expected)
    other = explain_difference(read_config_file(folder / CONFIG), full)
    if other:
        raise UserError(
            f"{folder}: holds a teacher of another configuration: {other}; train it again with "
            f"`{training_command(expected)} force=true`, or use another runs=FOLDER"
        )
    refuse_other_result(folder, result.run, full)
    digest = getattr(result.digest, epoch)
    if digest is None:
        raise UserError(
            f"{folder}: its result.json has no digest of the {epoch} epoch's weights; use "
            f"teacher.epoch={'last' if epoch == 'best' else 'best'}, or train it again with "
            f"`{training_command(expected)} force=true`"
        )
    heads = result.digest.heads if uses_heads else None
    found = TeacherWeights(folder / HEADS, heads) if heads else None
    return TeacherWeights(folder / _FILES[epoch], digest, found)


# Every job of a sweep asks for the same file, of up to 100 MB; a changed file has another key.
@cache
def _digest(path: Path, name: str, modified: int, size: int) -> str:
    def fits(state: Mapping[str, Tensor]) -> bool:
        known = recognise(state)
        return known is not None and known[0] == name

    return weights_digest(read_checkpoint(path, fits).state)


def resolve_plan(config: Config) -> RunPlan:
    """Return the plan of the run of ``config``, whose teacher must exist.

    Raises:
        UserError: the teacher is missing or is another one than ``config`` asks for.
    """
    teacher = find_teacher(config)
    folder, difference = run_location(config, teacher)
    full = full_config(config, teacher.digest if teacher else None)
    return RunPlan(
        config=config, folder=folder, difference=difference, teacher=teacher, full_config=full
    )


def run_location(
    config: Config, teacher: TeacherWeights | None = None
) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the run of ``config``, and its difference from the recipe.

    The teacher of the suite need not exist yet; the file of ``teacher.checkpoint`` is read if
    ``teacher`` is not given. A folder that an earlier version, or an earlier default of an
    extension, gave another name is found too, if it holds this run.
    """
    digest = {}
    if config.teacher and config.teacher.checkpoint and (found := teacher or find_teacher(config)):
        digest = {"teacher.digest": found.digest}
    difference = diff_from_recipe(config) | digest
    folder = run_folder(config, difference)
    if not folder.is_dir():
        folder = next(_earlier_folders(config, digest), folder)
    if has_unfrozen_defaults(config) and not _holds(folder, config, digest):
        beside = folder.parent.glob(f"seed{config.seed}*")
        folder = next((each for each in sorted(beside) if _holds(each, config, digest)), folder)
    return folder, difference


def _holds(folder: Path, config: Config, digest: dict[str, str]) -> bool:
    """Return whether ``folder`` holds the run of ``config``, whose teacher file has ``digest``."""
    try:
        found = read_config_file(folder / CONFIG)
    except UserError:  # there is none, or it cannot be read
        return False
    same = digest.items() <= flatten(found).items() and not folder.is_symlink()
    return same and is_run_of(config, found)


def _earlier_folders(config: Config, digest: dict[str, str]) -> Iterator[Path]:
    """Yield the folders with a name from an earlier version that hold the run of ``config``."""
    for earlier in earlier_diffs_from_recipe(config):
        with suppress(UserError):  # a link, or a configuration that cannot be read
            folder = run_folder(config, earlier | digest)
            if folder.is_dir() and is_run_of(config, read_config_file(folder / CONFIG)):
                yield folder


def load_heads(heads: TeacherWeights) -> dict[str, Tensor]:
    """Return the state of what a teacher was trained with; UserError if the file is corrupt."""
    state = read_intact(heads.path, MOST_CHECKPOINT, heads.digest)
    if state is None:
        raise UserError(
            f"{heads.path}: is missing or corrupt; train the teacher from scratch with force=true"
        )
    return state


def load_teacher(network: nn.Module, teacher: TeacherWeights) -> None:
    """Load the teacher's weights; UserError if they do not have its digest."""
    load_weights(network, teacher.path)
    if weights_digest(network) != teacher.digest:
        raise UserError(
            f"{teacher.path}: its weights do not have the digest in its result.json; train the "
            "teacher from scratch with its own command and force=true"
        )
