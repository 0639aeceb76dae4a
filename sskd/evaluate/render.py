"""The tables of an evaluation, as plain text and as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sskd.evaluate.calibration import BINS, Calibration
from sskd.evaluate.corruptions import SEVERITIES, Robustness
from sskd.evaluate.cost import Cost, Latency
from sskd.evaluate.evaluation import ClassAccuracy, Evaluation, Scaling
from sskd.report.render import render_markdown, render_text
from sskd.report.tables import Cell, Table

MOST_CLASSES = 5  # that the tables show, of the worst and of the best
MOST_CONFUSIONS = 10
TEXT_WIDTH = 100
_COUNTED = (
    "FLOPs as PyTorch's counter counts them: of convolutions and matrix products, 2 for a"
    " multiplication and an addition; BatchNorm, activations, pooling and shortcuts are left out."
)


def first_line(evaluation: Evaluation) -> str:
    """Return the line with the accuracy, which other programs may read."""
    stated = evaluation.stated_top1_percent
    note = "" if stated is None else f" (the file states {stated:.2f})"
    return (
        f"{evaluation.file}: {evaluation.network}, {evaluation.dataset} test set: top-1 "
        f"{evaluation.top1_percent:.2f}{note}"
    )


def as_text(evaluation: Evaluation) -> str:
    """Return the first line and the tables, without a line end."""
    tables = (render_text(table, TEXT_WIDTH) for table in _tables(evaluation))
    return "\n".join([first_line(evaluation), "", *tables]).rstrip()


def summary_as_text(evaluations: Sequence[Evaluation]) -> str:
    """Return a table with a line for each network, without a line end."""
    return render_text(_summary(evaluations), TEXT_WIDTH).rstrip()


def as_markdown(evaluations: Sequence[Evaluation], plots: Sequence[Sequence[str]]) -> str:
    """Return a page with all tables; ``plots`` are the files of the plots of each network."""
    parts = ["# Evaluation\n", render_markdown(_summary(evaluations))]
    for number, (evaluation, files) in enumerate(zip(evaluations, plots, strict=True), 1):
        label = f"{number}: " if len(evaluations) > 1 else ""
        parts += [render_markdown(table) for table in _tables(evaluation, label)]
        parts += [f"![{file.rpartition('-')[2].split('.')[0]}]({file})\n" for file in files]
    return "\n".join(parts)


def _table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], *notes: str, labels: int = 1
) -> Table:
    return Table(
        title=title,
        header=tuple(header),
        rows=tuple(tuple(map(Cell, row)) for row in rows),
        labels=labels,
        align=">",
        notes=notes,
    )


def _tables(evaluation: Evaluation, label: str = "") -> list[Table]:
    """Return the tables of one network, whose titles begin with ``label``."""
    images = f"{evaluation.test_images:,} test images"
    tables = [
        _accuracy_table(evaluation, f"{label}Accuracy on {images}"),
        _calibration_table(evaluation.calibration, f"{label}Calibration"),
        _class_table(evaluation.classes, f"{label}Accuracy by class"),
        _confusion_table(evaluation, f"{label}Most frequent confusions"),
        _cost_table(evaluation.cost, f"{label}Cost"),
    ]
    if evaluation.corruptions:
        tables.append(
            _corruption_table(evaluation.corruptions, f"{label}Top-1 on corrupted images")
        )
    return tables


def _accuracy_table(evaluation: Evaluation, title: str) -> Table:
    low, high = evaluation.top1_interval_percent
    rows = [
        ("top-1, %", f"{evaluation.top1_percent:.2f}"),
        ("its 95 % interval", f"{low:.2f} to {high:.2f}"),
        ("top-5, %", _number(evaluation.top5_percent, 2)),
    ]
    note = "The interval covers the sampling of the test images (Wilson), not the training seed."
    return _table(title, ("measure", "value"), rows, note)


def _calibration_table(scaling: Scaling, title: str) -> Table:
    header = ("logits", "images", "T", "NLL, nats", f"ECE, % ({BINS} bins)")

    def row(name: str, temperature: float, found: Calibration) -> tuple[str, ...]:
        cells = f"{temperature:.3f}", f"{found.nll_nats:.3f}", f"{found.ece_percent:.2f}"
        return name, f"{scaling.images:,}", *cells

    rows = [row("as trained", 1, scaling.before)]
    notes = [scaling.note] if scaling.note else []
    if scaling.temperature is not None and scaling.after:
        rows.append(row("divided by T", scaling.temperature, scaling.after))
        notes.append(f"T minimises the NLL of {scaling.fitted_images:,} {scaling.fitted_on}.")
    return _table(title, header, rows, *notes)


def _class_table(classes: Sequence[ClassAccuracy], title: str) -> Table:
    rows, left_out = worst_and_best(classes, MOST_CLASSES)
    cells = [(each.name, f"{each.images:,}", _number(each.top1_percent, 1)) for each in rows]
    notes = [f"The {left_out} classes in between are left out."] if left_out else []
    return _table(title, ("class", "images", "top-1, %"), cells, *notes)


def worst_and_best(classes: Sequence[ClassAccuracy], most: int) -> tuple[list[ClassAccuracy], int]:
    """Return the ``most`` worst and best classes, the worst first, and how many are left out.

    Classes without images are left out too, but not counted.
    """
    order = sorted(
        (each for each in classes if each.top1_percent is not None),
        key=lambda each: each.top1_percent or 0,
    )
    if len(order) <= 2 * most:
        return order, 0
    return order[:most] + order[-most:], len(order) - 2 * most


def _confusion_table(evaluation: Evaluation, title: str) -> Table:
    errors = round(evaluation.test_images * (1 - evaluation.top1_percent / 100))
    shown = evaluation.confusions[:MOST_CONFUSIONS]
    rows = [
        (each.label, each.predicted, f"{each.images:,}", f"{each.percent_of_class:.1f}")
        for each in shown
    ]
    total = sum(each.images for each in shown)
    note = f"They are {total:,} of {errors:,} errors."
    return _table(title, ("label", "prediction", "images", "% of label"), rows, note, labels=2)


def _cost_table(cost: Cost, title: str) -> Table:
    size = cost.image_size_pixels
    rows = [
        ("parameters", f"{cost.parameters:,}"),
        (f"FLOPs of a {size}x{size} image", f"{cost.flops:,}"),
        ("multiply-adds", f"{cost.multiply_adds:,}"),
    ]
    for each in cost.latency:
        rows.append((f"latency at batch {each.batch_size}, ms", _spread(each)))
        rows.append((f"images/s at batch {each.batch_size}", f"{each.images_per_second:,.0f}"))
    machine = cost.machine
    notes = [_COUNTED]
    if cost.latency:
        threads = f"{machine.threads} thread{'s' * (machine.threads > 1)}"
        passes = " and ".join(str(each.repeats) for each in cost.latency)
        notes.append(
            f"Latency: median and quartiles of {passes} forward passes in float32, without"
            f" compilation; {machine.device}, {threads}, torch {machine.torch}."
        )
    return _table(title, ("measure", "value"), rows, *notes)


def _spread(latency: Latency) -> str:
    low, high = f"{latency.quartile1_ms:.2f}", f"{latency.quartile3_ms:.2f}"
    return f"{latency.median_ms:.2f} ({low} to {high})"


def _corruption_table(robustness: Robustness, title: str) -> Table:
    severities = [f"severity {number}" for number in range(1, SEVERITIES + 1)]
    rows = [
        (name, *(f"{value:.2f}" for value in values), f"{sum(values) / len(values):.2f}")
        for name, values in robustness.top1_percent.items()
    ]
    columns = zip(*robustness.top1_percent.values(), strict=True)
    means = [f"{sum(column) / len(column):.2f}" for column in columns]
    rows.append(("mean", *means, f"{robustness.mean_top1_percent:.2f}"))
    return _table(title, ("corruption", *severities, "mean"), rows, "Top-1 in %.")


def _summary(evaluations: Sequence[Evaluation]) -> Table:
    header = [
        *("file", "network", "dataset", "top-1 %", "top-5 %", "NLL", "ECE %", "T"),
        *("NLL, scaled", "ECE %, scaled", "parameters", "MFLOPs"),
    ]
    batches = [each.batch_size for each in evaluations[0].cost.latency]
    header += [f"ms at batch {size}" for size in batches]
    has_corruptions = any(each.corruptions for each in evaluations)
    rows = [_summary_row(each, with_corruptions=has_corruptions) for each in evaluations]
    header += ["corrupted, top-1 %"] * has_corruptions
    return _table("Summary", header, rows)


def _summary_row(evaluation: Evaluation, *, with_corruptions: bool) -> list[str]:
    scaling, cost = evaluation.calibration, evaluation.cost
    after = scaling.after
    row = [
        *(evaluation.file, evaluation.network, evaluation.dataset),
        *(f"{evaluation.top1_percent:.2f}", _number(evaluation.top5_percent, 2)),
        *(f"{scaling.before.nll_nats:.3f}", f"{scaling.before.ece_percent:.2f}"),
        _number(scaling.temperature, 3),
        *((f"{after.nll_nats:.3f}", f"{after.ece_percent:.2f}") if after else ("", "")),
        *(f"{cost.parameters:,}", f"{cost.flops / 1e6:.1f}"),
        *(f"{each.median_ms:.2f}" for each in cost.latency),
    ]
    if with_corruptions:
        found = evaluation.corruptions
        row.append(f"{found.mean_top1_percent:.2f}" if found else "")
    return row


def _number(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"
