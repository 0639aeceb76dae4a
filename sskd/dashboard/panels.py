"""The panels of each subject: metrics of the runs, and what the report has logged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from wandb_workspaces.reports import v2 as wr
from wandb_workspaces.reports.v2.interface import PanelTypes

from sskd.config import method_settings
from sskd.methods import METHODS
from sskd.methods.tasks import TASKS
from sskd.schedule import PhaseSettings

Panels: TypeAlias = list[PanelTypes]
# The config key by which a panel averages runs; None: by the grouping of the run table.
Grouping: TypeAlias = "wr.Config | None"

# Keys that `python -m sskd.report --wandb` logs.
RESULTS, COST, FAILED = "tables/results", "tables/cost", "tables/failed"
GAINS, STUDIES = "plots/gain", "plots/study"

MAX_RUNS = 1000  # W&B shows the first 10 otherwise
_FULL = wr.Layout(w=24, h=12)


@dataclass(frozen=True)
class Subject:
    """One section.

    Attributes:
        title: its heading.
        text: an introduction to its panels.
        report_panels: returns the panels of what the report has logged.
        run_panels: returns the panels of the runs, for a grouping.
        folded: whether the panels of a pair are collapsed until a click.
    """

    title: str
    text: str
    report_panels: Callable[[], Panels] = list
    run_panels: Callable[[Grouping], Panels] = lambda grouping: []
    folded: bool = True


def curve(title: str, keys: list[str], grouping: Grouping, x: str = "epoch") -> wr.LinePlot:
    """Return a plot of the mean of each group over seeds, in a band of one standard deviation."""
    return wr.LinePlot(
        title=title,
        x=x,
        y=list(keys),
        groupby=grouping,
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        max_runs_to_show=MAX_RUNS,
    )


def bars(title: str, key: str, grouping: Grouping) -> wr.BarPlot:
    """Return a plot with a bar for the mean of each group and its standard deviation."""
    return wr.BarPlot(
        title=title,
        metrics=[key],
        groupby=grouping,
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        max_runs_to_show=MAX_RUNS,
        max_bars_to_show=MAX_RUNS,
    )


def table(key: str) -> wr.WeavePanelSummaryTable:
    """Return the table that was logged as ``key``, in full width."""
    return wr.WeavePanelSummaryTable(table_name=key, layout=_FULL)


def _result_tables() -> Panels:
    return [table(RESULTS)]


def _gain_plots() -> Panels:
    plots = wr.MediaBrowser(title="Gain in top-1", media_keys=[GAINS], num_columns=1, layout=_FULL)
    return [plots]


def _study_plots() -> Panels:
    plots = wr.MediaBrowser(title="Studies", media_keys=[STUDIES], num_columns=2, layout=_FULL)
    return [plots]


def _failed_table() -> Panels:
    return [table(FAILED)]


def _cost_table() -> Panels:
    return [table(COST)]


def _top1_bars(grouping: Grouping) -> Panels:
    return [
        bars("Top-1 at the last epoch (%)", "last/top1", grouping),
        bars("Top-1 at the best epoch on the test set (%)", "best/top1", grouping),
    ]


def _accuracy_curves(grouping: Grouping) -> Panels:
    return [
        curve("Top-1 on the test set (%)", ["test/top1"], grouping),
        # Runs on datasets with few classes have no top-5.
        curve("Top-5 on the test set (%)", ["test/top5"], grouping),
        curve("Top-1 on the training batches (%)", evaluated_phase_keys("top1"), grouping),
        curve("Learning rate", evaluated_phase_keys("lr"), grouping),
    ]


def _losses(grouping: Grouping) -> Panels:
    panels: Panels = [
        curve("Loss: sum of the weighted terms", evaluated_phase_keys("loss"), grouping)
    ]
    # Most methods have CE and KD, so these can be compared; the other terms are of one method each.
    terms = {
        "CE": evaluated_phase_keys("{}/ce"),
        "KD": ["distill/{}/kd"],
        "Terms of single methods": [f"distill/{{}}/{term}" for term in method_terms()],
    }
    for title, keys in terms.items():
        for kind, suffix in (("loss", ""), ("weighted", ", weighted")):
            panels.append(curve(title + suffix, [key.format(kind) for key in keys], grouping))
    phases = [f"{phase}/loss" for phase in first_phases()]
    return [*panels, curve("Loss of the first phases", phases, grouping, x="Step")]


def _agreement(grouping: Grouping) -> Panels:
    return [
        bars("Agreement of student and teacher (% of test images)", "agreement", grouping),
        bars("KL divergence from the teacher (nats)", "kl", grouping),
        bars("Top-1 of the teacher (%)", "teacher_top1", grouping),
        wr.ScatterPlot(title="Top-1 at the last epoch by agreement", x="agreement", y="last/top1"),
    ]


def _self_supervision(grouping: Grouping) -> Panels:
    return [
        curve(
            "Top-1 of the self-supervised task, student (%)",
            [f"distill/{task}_top1" for task in TASKS],
            grouping,
        ),
        curve(
            "Top-1 of the self-supervised task, teacher's head (%)",
            [f"ss_head/{task}_top1" for task in TASKS],
            grouping,
            x="ss_head/epoch",
        ),
        curve("Transformed views kept for TF (%)", ["distill/kept_tf"], grouping),
        curve("Scores of the task kept for SS (%)", ["distill/kept_ss"], grouping),
    ]


def _cost(grouping: Grouping) -> Panels:
    return [
        bars("Images per second, mean over the run", "images_per_second", grouping),
        bars("Peak memory (MiB)", "peak_memory_mib", grouping),
        bars("Hours of training", "hours", grouping),
        curve("Images per second, by epoch", evaluated_phase_keys("images_per_second"), grouping),
    ]


def evaluated_phase_keys(metric: str) -> list[str]:
    """Return the keys of ``metric`` in the phases that are evaluated, of all methods."""
    phases = {method.evaluated_phase for method in METHODS.values()}
    return [f"{phase}/{metric}" for phase in sorted(phases)]


def method_terms() -> list[str]:
    """Return the loss terms of all methods, without CE and KD."""
    terms = dict.fromkeys(term for method in METHODS.values() for term in method.terms)
    return [term for term in terms if term not in ("ce", "kd")]


def first_phases() -> list[str]:
    """Return the names of the phases that precede the evaluated phase of a method."""
    return [
        name
        for method, kind in METHODS.items()
        for name, field in method_settings(method).model_fields.items()
        if field.annotation is PhaseSettings and name != kind.evaluated_phase
    ]


SUBJECTS = (
    Subject(
        "Results",
        "Top-1 on the test set in %: mean and sample standard deviation over n seeds, the published"
        " value, and the difference (measured - published).",
        report_panels=_result_tables,
    ),
    Subject(
        "Gains",
        "What a method gains over the student trained alone and over KD, and beneath it the top-1"
        " values of which a gain is the difference (vanilla is the network alone).",
        report_panels=_gain_plots,
        run_panels=_top1_bars,
        folded=False,
    ),
    Subject(
        "Studies",
        "Top-1 by the value of one setting, such as the share of the images, for each method.",
        report_panels=_study_plots,
    ),
    Subject(
        "Curves",
        "Means over seeds, in a band of one standard deviation.",
        run_panels=_accuracy_curves,
        folded=False,
    ),
    Subject(
        "Losses",
        "Each term unweighted, to compare runs with different weights, and times its weight, as in"
        " the sum that is minimised.",
        run_panels=_losses,
    ),
    Subject(
        "Agreement",
        "How closely the student of the last epoch agrees with its teacher on the test set.",
        run_panels=_agreement,
    ),
    Subject(
        "Self-supervision",
        "The accuracy of SSKD's self-supervised task, and the share of the views (TF) and of the"
        " scores (SS) that selective transfer keeps.",
        run_panels=_self_supervision,
    ),
    Subject(
        "Cost",
        "Peak memory: on a GPU what PyTorch allocated, on a CPU the memory of the whole process.",
        report_panels=_cost_table,
        run_panels=_cost,
    ),
    Subject(
        "Failures",
        "Jobs that failed and cells that are missing, and how far the failed runs got.",
        report_panels=_failed_table,
    ),
)
