"""Keep apart what has one name but is not the same: data, numbers of epochs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace

from sskd.report.origin import FIXED, SHOWN, Origin
from sskd.report.published import published_for
from sskd.report.result import ROW_KEYS, Result, Settings

EPOCHS = "epochs"
EPOCHS_SETTING = "schedule.epochs"
Warn = Callable[[str], None]
# A dataset's name, a key, and which of its runs have one value of that setting.
Scope = tuple[str, str, tuple[object, ...]]


def tell_apart(results: Sequence[Result], warn: Warn) -> list[Result]:
    """Return ``results``, renamed if one name covers runs that must not be averaged.

    The name of a dataset that is of several sources or digests gets these, and the setting of runs
    that trained for other numbers of epochs, or by another value of a default that was changed in
    ``conf``, gets that number or value. ``warn`` gets a line for each.
    """
    return _by_settings(_by_epochs(_by_data(results, warn), warn), warn)


def _by_data(results: Sequence[Result], warn: Warn) -> list[Result]:
    recorded: dict[str, set[Origin]] = {}
    for run in results:
        recorded.setdefault(run.dataset, set()).add(run.origin.data)
    datasets = [(run.dataset, _data(run, recorded[run.dataset])) for run in results]
    counts = Counter(datasets)
    labels: dict[tuple[str, Origin], str] = {}
    for name in recorded:
        own = _labels(name, [data for dataset, data in counts if dataset == name])
        labels |= {(name, data): label for data, label in own.items()}
        if len(own) > 1:
            found = ", ".join(f"'{label}' ({counts[name, data]})" for data, label in own.items())
            warn(f"the name '{name}' stands for {len(own)} datasets, shown apart: {found}")
        elif counts[name, Origin()] > 1:
            warn(f"runs of '{name}' do not record their data; they are averaged as if it were one")
    return [
        replace(run, dataset=labels[dataset])
        for run, dataset in zip(results, datasets, strict=True)
    ]


def _data(run: Result, recorded: Iterable[Origin]) -> Origin:
    """Return the data of ``run``: if unknown, a fixed source's of its name, unless others differ.

    ``recorded`` is the data of all runs on what has that name.
    """
    data = run.origin.data
    fixed = Origin(run.dataset) if run.dataset in FIXED else Origin()
    if data == Origin() and all(other in (data, fixed) for other in recorded):
        return fixed
    return data


def _labels(name: str, datasets: Sequence[Origin]) -> dict[Origin, str]:
    """Return the name that each of ``datasets``, all of them called ``name``, has in tables."""
    if len(datasets) == 1 and name not in FIXED:
        return dict.fromkeys(datasets, name)
    texts = {data: data.data_text(SHOWN) for data in datasets}
    if len(set(texts.values())) < len(texts):
        texts = {data: data.data_text() for data in datasets}
    plain = Origin(name)
    return {data: name if data == plain else f"{name} ({text})" for data, text in texts.items()}


def _by_epochs(results: Sequence[Result], warn: Warn) -> list[Result]:
    """Add the number of epochs to the settings of one name that have several.

    That is so if a default was changed in ``conf``: the difference from it does not say so. The
    number of the published experiment is not added, so that its figures stay beside those runs.
    """
    found: dict[tuple[str, Settings], set[int]] = {}
    for run in results:
        if run.epochs is not None:
            found.setdefault((run.dataset, run.setting), set()).add(run.epochs)
    several = {key: sorted(epochs) for key, epochs in found.items() if len(epochs) > 1}
    for (dataset, setting), epochs in several.items():
        told = ", ".join(f"{key}={value}" for key, value in setting) or "the recipe"
        numbers = " or ".join(map(str, epochs))
        warn(f"runs of '{dataset}' by {told} have {numbers} epochs, shown apart")
    return [
        replace(run, difference=tuple(sorted((*run.difference, (EPOCHS, str(run.epochs))))))
        if (run.dataset, run.setting) in several and not _is_usual(run)
        else run
        for run in results
    ]


def _by_settings(results: Sequence[Result], warn: Warn) -> list[Result]:
    """Add the settings to the difference of runs of one name that differ in them."""
    found: dict[Scope, set[str]] = {}
    for run in results:
        for key, value in run.settings:
            if key != EPOCHS_SETTING:  # which is looked at already
                found.setdefault(_scope(run, key), set()).add(value)
    several = {scope: sorted(values) for scope, values in found.items() if len(values) > 1}
    for (dataset, key, _), values in several.items():
        warn(f"runs of '{dataset}' by one name have {key}={' or '.join(values)}, shown apart")
    return [_with_settings(run, several) for run in results]


def _scope(run: Result, key: str) -> Scope:
    """Return what has one value of the setting ``key``: a row's, or those of one student."""
    row = (run.teacher, run.method, run.variant) if key.startswith(ROW_KEYS) else ()
    return run.dataset, key, (run.student, run.setting, *row)


def _with_settings(run: Result, several: Container[Scope]) -> Result:
    added = {key: value for key, value in run.settings if _scope(run, key) in several}
    return replace(run, difference=tuple(sorted((added | dict(run.difference)).items())))


def _is_usual(run: Result) -> bool:
    """Return whether ``run`` trained as long as a published experiment, or has no number."""
    published = {source.epochs for source in published_for(run.dataset)}
    return run.epochs is None or run.epochs in published
