"""A run's identity: the settings that decide its result."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sskd.config import Config
from sskd.data import SOURCES, DatasetSettings

# Settings that may change between two starts of a run without changing its result.
_IRRELEVANT_TO_RESULT = (
    ("wandb",),
    ("device",),
    ("compile",),
    ("graph",),
    ("runs",),
    ("force",),
    ("checkpoint_minutes",),
    ("checkpoint_seconds",),
    ("dataset", "root"),
    ("dataset", "download"),
    ("dataset", "packed"),
    ("dataset", "workers"),
    ("dataset", "in_memory_gib"),
    ("teacher", "train"),
    ("teacher", "precompute"),
    ("teacher", "checkpoint"),
    # They only set defaults of method settings, which are part of the identity.
    ("teacher", "paraphraser_lr"),
    ("student", "paraphraser_lr"),
)


def identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration's plain ``values`` that decides the result of its run."""
    return _without(values, *_IRRELEVANT_TO_RESULT, *_idle(values))


def decides_result(key: str) -> bool:
    """Return whether a setting, such as ``dataset.root``, can be a part of a run's identity."""
    words = tuple(key.split("."))
    return not any(words[: len(path)] == path for path in _IRRELEVANT_TO_RESULT)


def identity_with_idle(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``identity`` as early versions computed it: with the teacher's idle settings."""
    return _without(values, *_IRRELEVANT_TO_RESULT)


def without_digests(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` without the digests of the data and of the teacher."""
    return _without(values, ("dataset", "digest"), ("teacher", "digest"))


def _without(values: Mapping[str, Any], *paths: tuple[str, ...]) -> dict[str, Any]:
    decisive = copy.deepcopy(dict(values))
    for *parents, last in paths:
        node = decisive
        for parent in parents:
            node = node.get(parent) or {}
            if not isinstance(node, dict):  # in a corrupt file
                node = {}
        node.pop(last, None)
    return decisive


def _idle(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the teacher's settings that have no effect, given the other ``values``.

    With a checkpoint, only the architecture and the digest count. Without one, a setting that
    repeats its default has no effect.
    """
    teacher, schedule = values.get("teacher"), values.get("schedule")
    if not isinstance(teacher, dict):
        return []
    if teacher.get("checkpoint") is not None:
        return [("teacher", key) for key in teacher if key not in ("name", "digest")]
    epochs = schedule.get("epochs") if isinstance(schedule, dict) else None
    defaults = {
        "epochs": epochs,
        "precision": values.get("precision"),
        "batch_size": None,
        "milestones": None,
    }
    return [("teacher", key) for key, value in defaults.items() if teacher.get(key) == value]


_kept_digests: dict[str, str | None] | None = None


@contextmanager
def digests_kept() -> Iterator[None]:
    """Compute the digest of each dataset once inside the ``with`` block.

    A sweep asks for it once for each job, and 20,000 images take a tenth of a second. A job
    computes it again when it starts.
    """
    global _kept_digests
    _kept_digests = {}
    try:
        yield
    finally:
        _kept_digests = None


def _digest(settings: DatasetSettings) -> str | None:
    compute = SOURCES[settings.source].digest
    if _kept_digests is None:
        return compute(settings)
    key = settings.model_dump_json()
    if key not in _kept_digests:
        _kept_digests[key] = compute(settings)
    return _kept_digests[key]


def full_config(
    config: Config,
    teacher_digest: str | None = None,
    data_digest: str | None = None,
    *,
    defaults: bool = True,
) -> dict[str, Any]:
    """Return ``config`` as ``config.yaml`` keeps it: with the digests of the data and the teacher.

    Args:
        teacher_digest: of the teacher's weights; None if they are not known.
        data_digest: of the data that was loaded; None computes it from the files.
        defaults: include the settings that have their default in Python. Without them, a hash of
            the values stays the same when a later version adds a setting.
    """
    values = config.model_dump(exclude_defaults=not defaults)
    digest = data_digest or _digest(config.dataset)
    if digest is not None:
        values["dataset"]["digest"] = digest
    if teacher_digest is not None:
        values["teacher"]["digest"] = teacher_digest
    return values
