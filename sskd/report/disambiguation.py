"""Rename results that share a name but must not be averaged, and drop copies of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace

from sskd.report.published import SOURCES, published_for
from sskd.report.results import (
    FIXED_SOURCES,
    ROW_KEYS,
    SHORT_DIGEST,
    FinishedRun,
    Origin,
    Settings,
    Warn,
)
from sskd.runs.names import RESULT

EPOCHS = "epochs"
EPOCHS_SETTING = "schedule.epochs"
# A dataset's name, a setting's key, and what the runs have in common that should share its value.
Scope = tuple[str, str, tuple[object, ...]]


def distinct_results(results: Sequence[FinishedRun], warn: Warn) -> list[FinishedRun]:
    """Return ``results`` without copies, renamed if one name covers different experiments.

    - Datasets of one name but of several sources or digests get these in their names.
    - Runs of one setting but of several numbers of epochs get that number in their difference.
    - Runs of one name but of several values of another setting get that value. A default that was
      changed in ``conf`` is the reason: the difference from it does not show the change.
    - Of several results of one configuration and seed the first is kept. A copied folder would
      make the deviation over seeds look smaller than it is.

    Each change is reported through ``warn`` in one line.
    """
    renamed = _by_settings(_by_epochs(_by_data(results, warn), warn), warn)
    return list(_without_copies(renamed, warn))


def _by_data(results: Sequence[FinishedRun], warn: Warn) -> list[FinishedRun]:
    recorded: dict[str, set[Origin]] = {}
    for run in results:
        recorded.setdefault(run.dataset, set()).add(run.origin.data)
    datasets = [(run.dataset, _data(run, recorded[run.dataset])) for run in results]
    counts = Counter(datasets)
    labels: dict[tuple[str, Origin], str] = {}
    for name in recorded:
        by_data = _labels(name, [data for dataset, data in counts if dataset == name])
        labels |= {(name, data): label for data, label in by_data.items()}
        if len(by_data) > 1:
            shown = ", ".join(
                f"'{label}' ({counts[name, data]})" for data, label in by_data.items()
            )
            warn(
                f"{len(by_data)} datasets have the name '{name}' and are shown separately: {shown}"
            )
        elif counts[name, Origin()] > 1:
            warn(f"runs of '{name}' do not record their data; they are averaged as one dataset")
    return [
        replace(run, dataset=labels[dataset])
        for run, dataset in zip(results, datasets, strict=True)
    ]


def _data(run: FinishedRun, recorded: Iterable[Origin]) -> Origin:
    """Return the origin of the run's data.

    If it is not recorded and the dataset is named after a fixed source, it is that source, unless
    ``recorded``, the data of all runs with that name, has another.
    """
    data = run.origin.data
    fixed = Origin(run.dataset) if run.dataset in FIXED_SOURCES else Origin()
    if data == Origin() and all(other in (data, fixed) for other in recorded):
        return fixed
    return data


def _labels(name: str, datasets: Sequence[Origin]) -> dict[Origin, str]:
    """Return a distinct label for each of ``datasets``, all of which are called ``name``."""
    # The published values of a dataset are not shown beside other data of its name.
    is_own = name not in SOURCES or datasets[0].source == name
    if len(datasets) == 1 and name not in FIXED_SOURCES and is_own:
        return dict.fromkeys(datasets, name)
    texts = {data: data.data_text(SHORT_DIGEST) for data in datasets}
    if len(set(texts.values())) < len(texts):
        texts = {data: data.data_text() for data in datasets}
    source = Origin(name)
    return {data: name if data == source else f"{name} ({text})" for data, text in texts.items()}


def _by_epochs(results: Sequence[FinishedRun], warn: Warn) -> list[FinishedRun]:
    """Add the number of epochs to the difference if runs of one setting have several.

    The published experiment's number is not added, so that its values stay beside those runs. A
    number that the method itself replaces does not count.
    """
    found: dict[tuple[str, Settings], set[int]] = {}
    for run in results:
        if run.epochs is not None and not _replaces_epochs(run):
            found.setdefault((run.dataset, run.setting), set()).add(run.epochs)
    several = {key: sorted(epochs) for key, epochs in found.items() if len(epochs) > 1}
    for (dataset, setting), epochs in several.items():
        shown = ", ".join(f"{key}={value}" for key, value in setting) or "the recipe"
        numbers = " or ".join(map(str, epochs))
        warn(f"runs of '{dataset}' with {shown} have {numbers} epochs; they are shown separately")
    return [
        replace(run, difference=tuple(sorted((*run.difference, (EPOCHS, str(run.epochs))))))
        if (run.dataset, run.setting) in several
        and not (_has_published_epochs(run) or _replaces_epochs(run))
        else run
        for run in results
    ]


def _replaces_epochs(run: FinishedRun) -> bool:
    return EPOCHS_SETTING in dict(run.departures)


def _has_published_epochs(run: FinishedRun) -> bool:
    """Return whether the run has a published number of epochs, or none is recorded."""
    published = {source.epochs for source in published_for(run.dataset)}
    return run.epochs is None or run.epochs in published


def _by_settings(results: Sequence[FinishedRun], warn: Warn) -> list[FinishedRun]:
    """Add to the difference the settings in which runs of one name differ."""
    found: dict[Scope, set[str]] = {}
    for run in results:
        for key, value in run.settings:
            if key != EPOCHS_SETTING:  # handled by _by_epochs
                found.setdefault(_scope(run, key), set()).add(value)
    several = {scope: sorted(values) for scope, values in found.items() if len(values) > 1}
    for (dataset, key, _), values in several.items():
        shown = " or ".join(values)
        warn(f"runs of '{dataset}' that share a name have {key}={shown}; they are shown separately")
    return [_with_settings(run, several) for run in results]


def _scope(run: FinishedRun, key: str) -> Scope:
    """Return the scope in which ``key`` should have one value: a row, or a student's table."""
    row = (run.teacher, run.method, run.variant) if key.startswith(ROW_KEYS) else ()
    return run.dataset, key, (run.student, run.setting, *row)


def _with_settings(run: FinishedRun, several: Container[Scope]) -> FinishedRun:
    added = {key: value for key, value in run.settings if _scope(run, key) in several}
    return replace(run, difference=tuple(sorted((added | dict(run.difference)).items())))


def _without_copies(results: Iterable[FinishedRun], warn: Warn) -> Iterator[FinishedRun]:
    kept: dict[tuple[object, ...], list[FinishedRun]] = {}
    for run in results:
        same = kept.setdefault(
            (run.kind, run.dataset, run.teacher, run.student, run.method, run.seed, run.difference),
            [],
        )
        first = next((other for other in same if _may_share_teacher(run, other)), None)
        if first is None:
            same.append(run)
            yield run
            continue
        differs = (
            "" if run.last == first.last else f" (last top-1 {first.last:.2f}, here {run.last:.2f})"
        )
        warn(
            f"{run.folder / RESULT}: has the same configuration and seed as {first.folder / RESULT}"
            f"{differs}; left out"
        )


def _may_share_teacher(run: FinishedRun, other: FinishedRun) -> bool:
    """Return whether both runs had, as far as recorded, the same teacher."""
    teachers = {run.origin.teacher, other.origin.teacher} - {None}
    return len(teachers) < 2
