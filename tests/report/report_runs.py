"""Write folders of runs for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sskd.report.tables import Cell, Table

RESULT: dict[str, Any] = {
    "kind": "distill",
    "dataset": "cifar100",
    "teacher": "resnet56",
    "student": "resnet20",
    "method": "kd",
    "seed": 0,
    "difference": {},
    "top1": {"last": 70.0, "best": 71.0, "best_epoch": 3},
    "holdout_top1": None,
    "teacher_top1": 73.0,
    "agreement": 80.0,
    "kl": 0.5,
    "seconds": 7200.0,
    "images_per_second": 1000.0,
    "parameters": 278324,
    "commit": "0123456789",
    "recipe": 2,
}


def put_run(root: Path, name: str, top1: list[float] | None = None, **changes: Any) -> Path:
    """Write a finished run with the test accuracies ``top1`` by epoch, and return its folder."""
    curve = [10.0, 50.0, 70.0] if top1 is None else top1
    reached = {"top1": {"last": curve[-1], "best": max(curve), "best_epoch": 1}}
    result = RESULT | reached | changes
    folder = root / name
    put_metrics(folder, [epoch_line("distill", i, top1) for i, top1 in enumerate(curve, start=1)])
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def put_alone(root: Path, name: str, top1: list[float], **changes: Any) -> Path:
    """Write a finished run of resnet20, trained from scratch."""
    alone = {"kind": "scratch", "teacher": None, "method": "vanilla", "teacher_top1": None}
    return put_run(root, name, top1, **(alone | changes))


def epoch_line(stage: str, epoch: int, top1: float | None = None, **metrics: Any) -> dict[str, Any]:
    """Return a line of ``metrics.jsonl``; the epoch ends ``epoch`` minutes after 3 o'clock."""
    accuracy = {} if top1 is None else {"test/top1": top1}
    return {
        "stage": stage,
        "epoch": epoch,
        "lr": 0.05,
        "loss": 5.0 / epoch,
        "loss/ce": 3.0 / epoch,
        "loss/kd": 2.0 / epoch,
        "weighted/ce": 0.3 / epoch,
        "weighted/kd": 1.8 / epoch,
        "images_per_second": 1234.0,
        "seconds": 40.0,
        "date": f"2026-11-25T03:{epoch:02d}:00+00:00",
        **accuracy,
        **metrics,
    }


def put_metrics(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Write ``metrics.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def put_status(folder: Path, state: str, **details: Any) -> Path:
    """Write ``status.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps({"state": state, **details}))
    return folder


def texts(table: Table) -> tuple[tuple[str, ...], ...]:
    """Return the rows of ``table`` as text, without the header."""
    return table.texts[1:]


def text_table(title: str, header: Sequence[str], *rows: Sequence[str], **fields: Any) -> Table:
    """Return a table whose cells are text."""
    cells = tuple(tuple(Cell(text) for text in row) for row in rows)
    return Table(title, tuple(header), cells, labels=1, **fields)


def never(text: str) -> None:
    """Fail: the ``warn`` of a call that must not warn."""
    raise AssertionError(text)
