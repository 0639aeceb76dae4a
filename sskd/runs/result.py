"""``result.json``: what a finished run, or a finished shared phase, reached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self, TypeVar

from sskd.runs import fields

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Result(ABC):
    """A result that can be written to ``result.json`` and read again.

    ``run`` names the run by the settings that decide its result (``sskd.runs.identity.identity``).
    It is None until ``Run.finish`` writes the result, and in results of the first version.
    """

    run: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values; ``run`` comes last, and only if it is known."""
        values = asdict(self)
        run = values.pop("run")
        return values if run is None else values | {"run": run}

    @classmethod
    @abstractmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the result with these fields; raise ValueError if one has a wrong type."""


@dataclass(frozen=True)
class Top1:
    """Top-1 accuracies on the test set in percent, and the epoch of the best one, from 1."""

    last: float | None = None
    best: float | None = None
    best_epoch: int | None = None


@dataclass(frozen=True)
class Top5:
    """Top-5 accuracies on the test set in percent.

    ``best`` is that of the epoch with the best top-1, which need not have the best top-5.
    """

    last: float | None = None
    best: float | None = None


@dataclass(frozen=True)
class HoldoutTop1:
    """Top-1 accuracies on held-out images in percent, and the test accuracy of the best epoch."""

    last: float | None = None
    best: float | None = None
    best_epoch: int | None = None
    test_top1_at_best: float | None = None


@dataclass(frozen=True)
class WeightsDigests:
    """SHA-256 of the student's weights after the last epoch and at its best one.

    ``heads`` is that of the modules that it was trained with for its own students.
    """

    last: str | None = None
    best: str | None = None
    heads: str | None = None


@dataclass(frozen=True)
class RunResult(Result):
    """What a finished run reached; None for what its version did not record.

    Accuracies and ``agreement`` are percentages, ``kl`` is in nats, ``peak_memory_mib`` in MiB.
    ``kind`` is ``scratch`` or ``distill``. ``difference`` holds the settings that differ from
    version ``recipe`` of the recipe, by dotted key. ``follows_weighting`` is true if the method has
    the weights of ``weighting`` by default. ``epoch`` and ``accuracy`` are those of the last epoch,
    under the names that published checkpoints have. ``precision`` is that of the device, never
    ``auto``, here and in ``difference``; ``tf32`` is true if convolutions used TF32. ``extensions``
    has the SHA-256 of the user's code, by choices such as ``method=dist``. ``passes`` is the number
    of views of each image on which the student was trained. ``top5`` and ``teacher_top5`` are None
    for a dataset with few classes (``sskd.training.evaluation.top5_accuracy``). ``departures`` are
    settings of the recipe that the method itself replaces, by dotted key. ``ranks`` is the number
    of processes that trained together at the end.
    """

    kind: str | None = None
    dataset: str | None = None
    dataset_source: str | None = None
    dataset_digest: str | None = None
    teacher: str | None = None
    student: str | None = None
    method: str | None = None
    seed: int | None = None
    recipe: int | None = None
    follows_weighting: bool | None = None
    difference: Mapping[str, Any] = field(default_factory=dict)
    top1: Top1 = Top1()
    top5: Top5 | None = None
    holdout_top1: HoldoutTop1 | None = None
    teacher_digest: str | None = None
    teacher_epoch: str | None = None
    teacher_top1: float | None = None
    teacher_top5: float | None = None
    agreement: float | None = None
    kl: float | None = None
    epoch: int | None = None
    accuracy: float | None = None
    seconds: float | None = None
    images_per_second: float | None = None
    parameters: int | None = None
    digest: WeightsDigests = WeightsDigests()
    precision: str | None = None
    tf32: bool | None = None
    compile: str | None = None
    precomputed: bool | None = None
    passes: int | None = None
    ranks: int | None = None
    departures: Mapping[str, Any] = field(default_factory=dict)
    extensions: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    threads: int | None = None
    peak_memory_mib: float | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None
    date: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the result with these fields; raise ValueError if one has a wrong type."""
        found: dict[str, Any] = {name: fields.text_or_none(values, name) for name in _TEXTS}
        found |= {name: fields.integer_or_none(values, name) for name in _INTEGERS}
        found |= {name: _percent(values, name) for name in _PERCENTAGES}
        found |= {name: fields.number_or_none(values, name) for name in _NUMBERS}
        return cls(
            **found,
            # Rounding can make the divergence of two equal distributions slightly negative.
            kl=fields.number_or_none(values, "kl", low=-1e-3),
            difference=fields.mapping_or_none(values, "difference") or {},
            versions=fields.mapping_or_none(values, "versions") or {},
            extensions=fields.mapping_or_none(values, "extensions") or {},
            departures=fields.mapping_or_none(values, "departures") or {},
            commit=fields.one_line(values.get("commit")),
            follows_weighting=fields.flag_or_none(values, "follows_weighting"),
            tf32=fields.flag_or_none(values, "tf32"),
            precomputed=fields.flag_or_none(values, "precomputed"),
            top1=_nested(values, "top1", _top1) or Top1(),
            top5=_nested(values, "top5", _top5),
            holdout_top1=_nested(values, "holdout_top1", _holdout_top1),
            digest=_nested(values, "digest", _digests) or WeightsDigests(),
            run=fields.mapping(values, "run") if "run" in values else None,
        )


_TEXTS = (
    *("kind", "dataset", "dataset_source", "dataset_digest", "teacher", "student", "method"),
    *("teacher_digest", "teacher_epoch", "precision", "compile", "device", "date"),
)
_INTEGERS = ("seed", "recipe", "epoch", "parameters", "threads", "passes", "ranks")
_PERCENTAGES = ("teacher_top1", "teacher_top5", "agreement", "accuracy")
_NUMBERS = ("seconds", "images_per_second", "peak_memory_mib")


def _percent(record: fields.Record, key: str) -> float | None:
    return fields.number_or_none(record, key, high=100)


def _nested(record: fields.Record, key: str, read: Callable[[fields.Record], T]) -> T | None:
    """Return what ``read`` makes of the nested object ``key``; None if it is null or missing."""
    nested = fields.mapping_or_none(record, key)
    try:
        return None if nested is None else read(nested)
    except ValueError as error:
        raise ValueError(f"'{key}': {error}") from None


def _top1(record: fields.Record) -> Top1:
    best_epoch = fields.integer_or_none(record, "best_epoch")
    return Top1(_percent(record, "last"), _percent(record, "best"), best_epoch)


def _top5(record: fields.Record) -> Top5:
    return Top5(_percent(record, "last"), _percent(record, "best"))


def _holdout_top1(record: fields.Record) -> HoldoutTop1:
    return HoldoutTop1(
        last=_percent(record, "last"),
        best=_percent(record, "best"),
        best_epoch=fields.integer_or_none(record, "best_epoch"),
        test_top1_at_best=_percent(record, "test_top1_at_best"),
    )


def _digests(record: fields.Record) -> WeightsDigests:
    return WeightsDigests(*(fields.text_or_none(record, key) for key in ("last", "best", "heads")))


@dataclass(frozen=True)
class SharedResult(Result):
    """The result of a shared phase: the SHA-256 of its content, and its seconds.

    ``stage`` is the phase's name, under the key of every version.
    """

    kind: str = "phase"
    stage: str | None = None
    seconds: float | None = None
    digest: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the result with these fields; raise ValueError if one has a wrong type."""
        return cls(
            kind=fields.text_or_none(values, "kind") or "phase",
            stage=fields.text_or_none(values, "stage"),
            seconds=fields.number_or_none(values, "seconds"),
            digest=fields.text_or_none(values, "digest"),
            run=fields.mapping(values, "run") if "run" in values else None,
        )
