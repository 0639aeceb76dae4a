"""What the dashboard shows, by subject: panels over the runs, and what the report has logged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from wandb_workspaces.reports import v2 as wr
from wandb_workspaces.reports.v2.interface import PanelTypes

from sskd.config import method_settings
from sskd.methods import METHODS
from sskd.schedule import PhaseSettings

Panels: TypeAlias = list[PanelTypes]
# What runs have in common whose mean and deviation are shown; None where the run table says so.
Grouping: TypeAlias = "wr.Config | None"

# Keys of what `python -m sskd.report --wandb` logs.
RESULTS, COST, FAILED = "tables/results", "tables/cost", "tables/failed"
GAINS = "plots/gain"

# The last stage of a method with a teacher, and of a network alone.
LAST_STAGES = ("distill", "train")

MAX_RUNS = 1000  # W&B shows the first 10 otherwise
_FULL = wr.Layout(w=24, h=12)


@dataclass(frozen=True)
class Subject:
    """One section.

    Attributes:
        title: its heading.
        text: what a reader should know before looking.
        of_report: panels of what the report has logged.
        of_runs: panels of runs that are grouped so.
        folded: whether a pair's panels are unfolded by a click.
    """

    title: str
    text: str
    of_report: Callable[[], Panels] = list
    of_runs: Callable[[Grouping], Panels] = lambda grouping: []
    folded: bool = True


def curve(title: str, keys: list[str], grouping: Grouping, x: str = "epoch") -> wr.LinePlot:
    """Return the mean of each group over its seeds, in a band of one standard deviation."""
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
    """Return a bar for the mean of each group, with its standard deviation."""
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
    """Return the table that was logged as ``key``, over the whole width."""
    return wr.WeavePanelSummaryTable(table_name=key, layout=_FULL)


def _result_tables() -> Panels:
    return [table(RESULTS)]


def _gain_plots() -> Panels:
    plots = wr.MediaBrowser(title="Gain in top-1", media_keys=[GAINS], num_columns=1, layout=_FULL)
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
        curve("Top-1 on the training batches (%)", of_last_stage("top1"), grouping),
        curve("Learning rate", of_last_stage("lr"), grouping),
    ]


def _losses(grouping: Grouping) -> Panels:
    panels: Panels = [curve("Loss, all weighted terms together", of_last_stage("loss"), grouping)]
    # CE and KD are in most methods, so they compare; the other terms are of one method each.
    terms = {
        "CE": of_last_stage("{}/ce"),
        "KD": ["distill/{}/kd"],
        "Own terms": [f"distill/{{}}/{term}" for term in own_terms()],
    }
    for title, keys in terms.items():
        for kind, told in (("loss", ""), ("weighted", ", weighted")):
            panels.append(curve(title + told, [key.format(kind) for key in keys], grouping))
    phases = [f"{phase}/loss" for phase in first_phases()]
    return [*panels, curve("Loss of the first phases", phases, grouping, x="Step")]


def _agreement(grouping: Grouping) -> Panels:
    return [
        bars("Student and teacher agree (% of test images)", "agreement", grouping),
        bars("KL divergence from the teacher (nats)", "kl", grouping),
        bars("Top-1 of the teacher (%)", "teacher_top1", grouping),
        wr.ScatterPlot(
            title="Top-1 at the last epoch over agreement", x="agreement", y="last/top1"
        ),
    ]


def _self_supervision(grouping: Grouping) -> Panels:
    return [
        curve("Contrastive top-1 of the student (%)", ["distill/contrastive_top1"], grouping),
        curve(
            "Contrastive top-1 of the teacher's head (%)",
            ["ss_head/contrastive_top1"],
            grouping,
            x="ss_head/epoch",
        ),
        curve("Transformed views kept for TF (%)", ["distill/kept_tf"], grouping),
        curve("Similarities kept for SS (%)", ["distill/kept_ss"], grouping),
    ]


def _cost(grouping: Grouping) -> Panels:
    return [
        bars("Images a second, over the run", "images_per_second", grouping),
        bars("Peak memory (MiB)", "peak_memory_mib", grouping),
        bars("Hours of training", "hours", grouping),
        curve("Images a second, by epoch", of_last_stage("images_per_second"), grouping),
    ]


def of_last_stage(figure: str) -> list[str]:
    """Return the keys of ``figure`` in the stage that is evaluated."""
    return [f"{stage}/{figure}" for stage in LAST_STAGES]


def own_terms() -> list[str]:
    """Return the loss terms of all methods, without CE and KD."""
    terms = dict.fromkeys(term for method in METHODS.values() for term in method.terms)
    return [term for term in terms if term not in ("ce", "kd")]


def first_phases() -> list[str]:
    """Return the names of the phases that methods have before the run's own epochs."""
    fields = [field for name in METHODS for field in method_settings(name).model_fields.items()]
    return [name for name, field in fields if field.annotation is PhaseSettings]


SUBJECTS = (
    Subject(
        "Results",
        "Top-1 on the test set in %, mean and sample standard deviation over n seeds, beside the"
        " published figure and the difference (ours - published).",
        of_report=_result_tables,
    ),
    Subject(
        "Gains",
        "What a method adds to the student trained alone, and to KD; under it the top-1 that a"
        " gain is the difference of (vanilla is the network alone).",
        of_report=_gain_plots,
        of_runs=_top1_bars,
        folded=False,
    ),
    Subject(
        "Curves",
        "Mean over seeds, in a band of one standard deviation.",
        of_runs=_accuracy_curves,
        folded=False,
    ),
    Subject(
        "Losses",
        "Each term as it is, which compares between runs of other weights, and times its weight,"
        " as it is trained on.",
        of_runs=_losses,
    ),
    Subject(
        "Agreement",
        "How near the student of the last epoch is to its teacher, on the test set.",
        of_runs=_agreement,
    ),
    Subject(
        "Self-supervision",
        "SSKD's contrastive task, and what selective transfer keeps of its two terms.",
        of_runs=_self_supervision,
    ),
    Subject(
        "Cost",
        "On a GPU memory is what PyTorch allocated there, on a CPU the whole process's.",
        of_report=_cost_table,
        of_runs=_cost,
    ),
    Subject(
        "Failures",
        "Cells that failed or are missing, and how far those came that failed.",
        of_report=_failed_table,
    ),
)
