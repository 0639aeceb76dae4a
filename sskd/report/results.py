"""Find the ``result.json`` of every finished run, check it and read it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sskd.errors import shortened
from sskd.files import MOST_DEPTH, is_regular_file, is_too_deep, read_bounded_text
from sskd.overrides import flatten
from sskd.runs import fields
from sskd.runs.names import CONFIG, MOST_CONFIG, MOST_RESULT, NAME, RESULT
from sskd.runs.result import HoldoutTop1, RunResult, Top5
from sskd.runs.weightings import RECIPE, WEIGHTING, name_weighting

Epoch = Literal["last", "best"]
Metric = Literal["top1", "top5"]
Settings = tuple[tuple[str, str], ...]
Warn = Callable[[str], None]

DIGEST = "teacher.digest"
# A difference in these settings makes a separate row, a difference in others a separate table.
ROW_KEYS = ("teacher.", "method.", WEIGHTING)
# Settings in which the runs of a row differ on purpose, or that the tables show elsewhere.
NOT_SETTINGS = ("seed", "dataset.name", "dataset.digest", DIGEST)
SHORT_DIGEST = 8  # characters
# Sources whose content never changes. Their names belong to no other data.
FIXED_SOURCES = frozenset({"cifar100", "cifar10", "stl10", "svhn", "digits"})


@dataclass(frozen=True)
class Origin:
    """Which data a run used, and which weights its teacher had.

    Attributes:
        source: the source of the data; None if it was not recorded.
        digest: the digest of the data; None for ``FIXED_SOURCES``, whose content never changes.
        teacher: the digest of the teacher's weights; None without a teacher or a record.
    """

    source: str | None = None
    digest: str | None = None
    teacher: str | None = None

    @property
    def data(self) -> Origin:
        """The origin of the data alone."""
        return Origin(self.source, self.digest)

    def data_text(self, digits: int | None = None) -> str:
        """Return the source and the first ``digits`` of the digest (None: all of them)."""
        return " ".join(filter(None, (self.source or "unknown data", (self.digest or "")[:digits])))


@dataclass(frozen=True)
class FinishedRun:
    """The result of one finished run.

    Accuracies and ``agreement`` are percentages, ``kl`` is in nats.

    Attributes:
        teacher: the network's name; None for a network trained from scratch, the ``student``.
        difference: the settings that differ from today's recipe: dotted keys and values as text,
            sorted by key, without the method's name. Weights of CE and KD that have a name are one
            key, ``weighting``.
        teacher_epoch: the requested epoch of the teacher. ``difference`` lacks it if the teacher
            is a file.
        epochs: the number of epochs of the last phase.
        passes: the number of views of each image on which the student was trained.
        departures: the settings of the recipe that the method itself replaces.
        settings: all settings that decide the result, without ``NOT_SETTINGS``.
        holdout: the accuracies on held-out images; None without ``dataset.holdout``.
        top5: the top-5 accuracies; None if they were not recorded.

    ``teacher_epoch``, ``peak_memory_mib``, ``commit``, ``epochs`` and ``passes`` are None, and
    ``settings`` empty, if they were not recorded.
    """

    kind: str
    dataset: str
    teacher: str | None
    student: str
    method: str
    seed: int
    difference: Settings
    last: float
    best: float
    teacher_epoch: str | None
    teacher_top1: float | None
    agreement: float | None
    kl: float | None
    seconds: float
    images_per_second: float
    parameters: int
    peak_memory_mib: float | None
    commit: str | None
    epochs: int | None
    passes: int | None
    departures: Settings
    origin: Origin
    folder: Path
    settings: Settings = ()
    holdout: HoldoutTop1 | None = None
    top5: Top5 | None = None
    teacher_top5: float | None = None

    @property
    def setting(self) -> Settings:
        """The part of the difference that all runs of a table share."""
        return tuple(item for item in self.difference if not item[0].startswith(ROW_KEYS))

    @property
    def variant(self) -> Settings:
        """The part of the difference that gives the run a separate row."""
        return tuple(item for item in self.difference if item[0].startswith(ROW_KEYS))

    def top1(self, epoch: Epoch) -> float:
        """Return the test accuracy, in percent, of the last or of the best epoch."""
        return self.last if epoch == "last" else self.best

    def accuracy(self, metric: Metric, epoch: Epoch) -> float | None:
        """Return the top-1 or top-5 as ``top1`` does; None if it was not recorded.

        The best epoch is that of the best top-1.
        """
        if metric == "top1":
            return self.top1(epoch)
        if self.top5 is None:
            return None
        return self.top5.last if epoch == "last" else self.top5.best

    def teacher_accuracy(self, metric: Metric) -> float | None:
        """Return the teacher's top-1 or top-5, in percent; None if it was not recorded."""
        return self.teacher_top1 if metric == "top1" else self.teacher_top5

    def holdout_top1(self, epoch: Epoch) -> float | None:
        """Return the accuracy on the held-out images, in percent, of their last or best epoch."""
        if self.holdout is None:
            return None
        return self.holdout.last if epoch == "last" else self.holdout.best


def as_number(text: str) -> float | None:
    """Return ``text`` as a finite number; None if it is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def numeric_order(settings: Settings) -> tuple[tuple[str, float, str], ...]:
    """Return the key that sorts settings by name, then numbers by value, then other texts."""
    numbers = ((key, as_number(text), text) for key, text in settings)
    return tuple((key, math.inf if n is None else n, text) for key, n, text in numbers)


def without_digest(settings: Settings) -> Settings:
    """Return ``settings`` without the digest of the teacher's weights."""
    return tuple((key, value) for key, value in settings if key != DIGEST)


def read_results(root: Path, warn: Warn) -> list[FinishedRun]:
    """Read all results under ``root``, sorted by path.

    A malformed file is skipped and reported through ``warn`` in one line.
    """
    results = []
    for path in find_files(root, [RESULT], warn):
        try:
            result = read_result_file(path)
        except (OSError, ValueError) as error:
            warn(f"{path}: {error}; left out")
            continue
        if result is not None:
            results.append(result)
    return results


def read_result_file(path: Path) -> FinishedRun | None:
    """Return the result in the file ``path``; None if it is of a phase shared by students.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is malformed.
    """
    result = parse_result(read_bounded_text(path, MOST_RESULT), path.parent)
    if result is not None and result.origin == Origin():
        return replace(result, origin=read_origin(path.parent))
    return result


def find_files(root: Path, names: Iterable[str], warn: Warn) -> Iterator[Path]:
    """Yield the regular files under ``root`` that have one of ``names``.

    Hidden folders and links are skipped. Folders that are too deep are skipped too, and reported
    once through ``warn``.
    """
    deep: list[str] = []
    for folder, subfolders, files in os.walk(root, onerror=lambda error: warn(str(error))):
        if is_too_deep(folder, root):
            deep.append(folder)
            subfolders.clear()
            continue
        subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
        for path in (Path(folder, name) for name in names if name in files):
            if is_regular_file(path):
                yield path
    if deep:
        more = f" and {len(deep) - 1} more" if deep[1:] else ""
        warn(
            f"{shortened(deep[0], 120)}{more}: more than {MOST_DEPTH} folders below "
            f"{shortened(str(root), 120)}; left out"
        )


def parse_result(text: str, folder: Path) -> FinishedRun | None:
    """Return the result in ``text``, a JSON object; None if it is of a phase shared by students.

    Raises:
        ValueError: a field is missing or malformed; the message names it.
    """
    record = fields.parse_object(text)
    if _kind(record) == "phase":
        return None
    result = RunResult.from_json(record)
    top1 = fields.mapping(record, "top1")
    return FinishedRun(
        kind=fields.text(record, "kind"),
        dataset=fields.text(record, "dataset"),
        teacher=result.teacher,
        student=fields.text(record, "student"),
        method=fields.text(record, "method"),
        seed=fields.integer(record, "seed"),
        difference=_difference(record, follows=result.follows_weighting is True),
        last=fields.number(top1, "last", high=100),
        best=fields.number(top1, "best", high=100),
        teacher_epoch=result.teacher_epoch,
        teacher_top1=result.teacher_top1,
        agreement=result.agreement,
        kl=result.kl,
        seconds=fields.number(record, "seconds"),
        images_per_second=fields.number(record, "images_per_second"),
        parameters=fields.integer(record, "parameters"),
        peak_memory_mib=result.peak_memory_mib,
        commit=result.commit,
        epochs=result.epoch,
        passes=result.passes,
        departures=_departures(result.departures),
        origin=Origin(result.dataset_source, result.dataset_digest, result.teacher_digest),
        folder=folder,
        settings=_settings(record, result.precision),
        holdout=result.holdout_top1,
        top5=result.top5,
        teacher_top5=result.teacher_top5,
    )


def _kind(record: fields.Record) -> str:
    kind = fields.text(record, "kind")
    if kind not in ("scratch", "distill", "phase"):
        raise ValueError(f"'kind' is {shortened(kind)}, neither 'scratch' nor 'distill'")
    if kind == "scratch" and record.get("teacher") is not None:
        raise ValueError("'teacher' is not null in a run from scratch")
    if kind == "distill":
        fields.text(record, "teacher")
    for key in ("teacher_top1", "agreement", "kl") * (kind != "phase"):  # may be null
        fields.get(record, key)
    return kind


def read_origin(folder: Path) -> Origin:
    """Return the origin of an older result, as far as the configuration beside it records it.

    This reads only lines as a run writes them, because a YAML parser takes seconds for a file
    that was crafted to be slow.
    """
    try:
        text = read_bounded_text(folder / CONFIG, MOST_CONFIG)
    except (OSError, ValueError):
        return Origin()
    return Origin(
        _config_value(text, "dataset", "source"),
        _config_value(text, "dataset", "digest"),
        _config_value(text, "teacher", "digest"),
    )


def _config_value(text: str, group: str, key: str) -> str | None:
    block = re.search(rf"^{group}:\n((?:  .*\n)*)", text, re.MULTILINE)
    line = block and re.search(rf"^  {key}: (['\"]?)([\w.-]+)\1$", block[1], re.MULTILINE)
    return line[2] if line and line[2] != "null" else None


def _settings(record: fields.Record, precision: str | None) -> Settings:
    """Return the recorded settings of the run as text by dotted key, sorted.

    ``precision=auto`` is the ``precision`` that the run was computed in.
    """
    recorded = record.get(NAME)
    if not isinstance(recorded, dict):
        return ()
    flat = flatten(recorded)
    if flat.get("precision") == "auto" and precision is not None:
        flat["precision"] = precision
    return tuple(sorted((k, as_text(v)) for k, v in flat.items() if k not in NOT_SETTINGS))


def _difference(record: fields.Record, *, follows: bool) -> Settings:
    """Return a run's difference from today's recipe; ``follows`` is as in ``find_weighting``."""
    method, recorded = fields.text(record, "method"), fields.mapping(record, "difference")
    recipe = fields.integer({"recipe": 1, **record}, "recipe")
    if not 1 <= recipe <= RECIPE:
        raise ValueError(
            f"'recipe' is {shortened(recipe)}, but this version of sskd knows 1 to {RECIPE}"
        )
    if not all(key and key.isprintable() for key in recorded):
        raise ValueError("'difference' has a key that is not a name")
    # A network alone can have the method's name there, which the run has as ``method``.
    texts = {key: as_text(item) for key, item in recorded.items() if key != "method.name"}
    return tuple(sorted(name_weighting(method, recipe, texts, follows=follows).items()))


def _departures(recorded: Mapping[str, Any]) -> Settings:
    if not all(key and key.isprintable() for key in recorded):
        raise ValueError("'departures' has a key that is not a name")
    return tuple(sorted((key, as_text(value)) for key, value in recorded.items()))


def as_text(value: object) -> str:
    """Return a recorded value as text: a printable string itself, anything else as JSON."""
    printable = isinstance(value, str) and value.isprintable()
    return str(value) if printable else json.dumps(value)
