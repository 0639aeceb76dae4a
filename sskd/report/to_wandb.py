"""Log the report to W&B: its tables, its figures, and its files as an artifact."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import wandb

from sskd.output import say
from sskd.report.files import write_files
from sskd.report.groups import Entry
from sskd.report.published import display_name, row_label
from sskd.report.report import Report
from sskd.report.results import Warn
from sskd.tracking.session import open_run, sync_later

# The fields of ``sskd.report.groups.Entry`` that identify a cell.
PLACE = ("dataset", "setting", "table", "teacher", "student", "row", "metric")
RESULTS = (
    *PLACE,
    *("last", "last std", "best", "best std", "n", "published", "last - published"),
    "best - published",
)
COST = (
    *("dataset", "pair", "row", "seed", "passes"),
    *("images a second", "peak memory (MiB)", "hours"),
    *("agreement", "kl"),
)
FAILED = ("state", "cell", "reason", "since", "host")


def log_report(report: Report, project: str, entity: str | None, warn: Warn) -> None:
    """Log ``report`` to the W&B run ``tables``, one run for each folder of runs.

    Tables of the results, the cost, and the failed and missing runs are under ``tables/``, the
    figures of each kind under ``plots/``, and the files of ``write_files`` in the artifact
    ``tables``.
    """
    run = open_run("auto", report.runs, "tables", project=project, entity=entity, job_type="report")
    try:
        with run:
            _log(run, report, warn)
    except TimeoutError:
        say(sync_later(run))


def _log(run: wandb.Run, report: Report, warn: Warn) -> None:
    run.log({f"tables/{name}": table for name, table in _tables(report).items()})
    artifact = wandb.Artifact("tables", type="report")
    with tempfile.TemporaryDirectory() as folder:
        written = write_files(report, f"{folder}/tables", "last", warn)
        run.log({f"plots/{kind}": images for kind, images in _images(written).items()})
        artifact.add_dir(folder)
        run.log_artifact(artifact)


def _tables(report: Report) -> dict[str, wandb.Table]:
    return {
        "results": _table(RESULTS, _results(report)),
        "cost": _table(COST, _cost(report)),
        "failed": _table(FAILED, _unfinished(report)),
    }


def _table(columns: tuple[str, ...], rows: Iterator[list[Any]]) -> wandb.Table:
    # A column can have None in one row and a number in the next.
    return wandb.Table(columns=list(columns), data=list(rows), allow_mixed_types=True)


def _results(report: Report) -> Iterator[list[Any]]:
    """Yield a row for each cell of the tables, at the last and at the best epoch.

    A top-5 can be recorded for the last epoch alone. A cell can have a published value at only one
    of the two epochs, because the teacher is as accurate as the published one only there.
    """
    last, best = (
        [entry for table in report.tables(epoch) for entry in table.entries]
        for epoch in ("last", "best")
    )
    at_best = {_place(entry): entry for entry in best}
    for entry in last:
        other = at_best.get(_place(entry))
        mean_and_std = (other.mean, other.std) if other else (None, None)
        published = (each.published for each in (entry, other) if each)
        known = next((value for value in published if value is not None), None)
        values = [entry.mean, entry.std, *mean_and_std, entry.n, known]
        yield [*_place(entry), *values, entry.difference, other.difference if other else None]


def _place(entry: Entry) -> tuple[str, ...]:
    return tuple(getattr(entry, name) for name in PLACE)


def _cost(report: Report) -> Iterator[list[Any]]:
    for run in report.results:
        pair = f"{run.teacher}-{run.student}" if run.teacher else run.student
        row = row_label((display_name(run.method), run.variant))
        place = [run.dataset, pair, row, run.seed]
        cost = [run.passes, run.images_per_second, run.peak_memory_mib, run.seconds / 3600]
        yield [*place, *cost, run.agreement, run.kl]


def _unfinished(report: Report) -> Iterator[list[Any]]:
    """Yield a row for each unfinished job and each missing cell."""
    for job in report.unfinished():
        since = job.since and job.since.isoformat()
        yield [job.state, job.name, job.error, since, job.host]
    for cell in report.missing():
        place = (cell.dataset, cell.setting, cell.table)
        name = f"{cell.teacher}-{cell.student} · {cell.row}"
        yield ["missing", " · ".join((*place, name)), None, None, None]


def _images(written: Iterable[Path]) -> dict[str, list[wandb.Image]]:
    """Return the report's figures as images, by kind: gain, study, curves, losses."""
    images: dict[str, list[wandb.Image]] = {}
    for path in written:
        if path.suffix == ".png":
            name = path.stem.removeprefix("tables-")
            image = wandb.Image(str(path), caption=name)
            images.setdefault(name.partition("-")[0], []).append(image)
    return images
