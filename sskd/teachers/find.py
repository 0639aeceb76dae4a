"""Finding a student's teacher: one of the suite's own runs, or a checkpoint from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sskd.config import Config
from sskd.errors import UserError
from sskd.models import (
    find_checkpoint,
    load_weights,
    read_checkpoint,
    recognise,
    weights_digest,
)
from sskd.runs.folder import read_config_file, read_result
from sskd.runs.identity import (
    diff_from_recipe,
    earlier_diffs_from_recipe,
    explain_difference,
    full_config,
    is_of,
    refuse_other_result,
    run_folder,
    teacher_config,
    training_command,
)
from sskd.runs.names import BEST, CONFIG, WEIGHTS

_FILES = {"best": BEST, "last": WEIGHTS}


@dataclass(frozen=True)
class TeacherWeights:
    """A teacher's weights: their file, and the SHA-256 of the tensors in it."""

    path: Path
    digest: str


def missing_teacher(config: Config) -> Config | None:
    """Return the run that trains the teacher of ``config``, where it has yet to finish."""
    if config.teacher is None or config.teacher.checkpoint is not None:
        return None
    wanted = teacher_config(config)
    unfinished = read_result(run_folder(wanted, diff_from_recipe(wanted))) is None
    return wanted if unfinished else None


def find_teacher(config: Config) -> TeacherWeights | None:
    """Return the teacher that ``config`` asks for, or None for a network alone.

    Raises:
        UserError: there is none; for a run of the suite it gives the command that trains it.
    """
    if config.teacher is None:
        return None
    if config.teacher.checkpoint is not None:
        path = find_checkpoint(config.teacher.checkpoint, config.teacher.epoch)
        content = path.stat()
        name = config.teacher.name
        return TeacherWeights(path, _digest(path, name, content.st_mtime_ns, content.st_size))
    wanted = teacher_config(config)
    folder = run_folder(wanted, diff_from_recipe(wanted))
    result = read_result(folder)
    if result is None:
        raise UserError(
            f"{folder}: no finished run of the teacher {config.teacher.name}; train it with "
            f"`{training_command(wanted)}`, or add teacher.train=true here, or name a file "
            "with teacher.checkpoint=PATH"
        )
    other = explain_difference(read_config_file(folder / CONFIG), full_config(wanted))
    if other:
        raise UserError(
            f"{folder}: holds a teacher of another configuration: {other}; train it again with "
            f"`{training_command(wanted)} force=true`, or use another runs=FOLDER"
        )
    refuse_other_result(folder, result, full_config(wanted))
    epoch = config.teacher.epoch
    digest = result.get("digest")
    if not isinstance(digest, dict) or not isinstance(digest.get(epoch), str):
        raise UserError(
            f"{folder}: its result.json tells no digest of the {epoch} epoch's weights; take the "
            "other epoch's with teacher.epoch, or train it again with force=true"
        )
    return TeacherWeights(folder / _FILES[epoch], digest[epoch])


@cache  # every cell of a pair asks, several times; another content is another question
def _digest(path: Path, name: str, modified: int, size: int) -> str:
    def fits(state: Mapping[str, Tensor]) -> bool:
        known = recognise(state)
        return known is not None and known[0] == name

    return weights_digest(read_checkpoint(path, fits).state)


def run_location(config: Config) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the run of ``config``, and what makes it differ from its recipe.

    That a teacher of the suite is missing does not matter; a ``teacher.checkpoint`` is read. A
    folder that an earlier version gave another name is the run's as well, if it holds this run.
    """
    digest = {}
    if config.teacher and config.teacher.checkpoint and (found := find_teacher(config)):
        digest = {"teacher.digest": found.digest}
    changed = diff_from_recipe(config) | digest
    folder = run_folder(config, changed)
    if not folder.is_dir():
        folder = next(_earlier_folders(config, digest), folder)
    return folder, changed


def _earlier_folders(config: Config, digest: dict[str, str]) -> Iterator[Path]:
    """Yield the folders with a name from an earlier version that hold the run of ``config``."""
    for earlier in earlier_diffs_from_recipe(config):
        with suppress(UserError):  # it is a link, or its configuration cannot be read
            folder = run_folder(config, earlier | digest)
            if folder.is_dir() and is_of(config, read_config_file(folder / CONFIG)):
                yield folder


def load_teacher(network: nn.Module, teacher: TeacherWeights) -> None:
    """Load the teacher's weights; UserError if they are not the ones that were found."""
    load_weights(network, teacher.path)
    if weights_digest(network) != teacher.digest:
        raise UserError(
            f"{teacher.path}: its weights are not those that its result.json tells of; "
            "train it again with force=true"
        )
