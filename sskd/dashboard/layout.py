"""Lay out the workspace and the report, and select the runs that each part shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wandb_workspaces import workspaces as ws
from wandb_workspaces.reports import v2 as wr

from sskd.dashboard.panels import (
    MAX_RUNS,
    SUBJECTS,
    Panels,
    Subject,
    curve,
    evaluated_phase_keys,
    first_phases,
)
from sskd.invocation.names import tool_command
from sskd.report.published import Published, all_published, column_lines, metrics_of

# Config keys in the form of W&B's filters.
DATASET, PAIR = ws.Config("dataset.value.name"), ws.Config("pair.value")
REPORTS = ws.And(ws.Metric("JobType").isin(["report"]))
COLUMNS = (
    *("run:state", "config:seed.value", "summary:last/top1", "summary:best/top1"),
    *("summary:agreement", "summary:hours", "tags:__ALL__"),
)
FAILED_STATES = ["failed", "crashed", "killed"]


@dataclass(frozen=True)
class Scope:
    """The runs to show: of ``dataset``, ``pairs`` (teacher, student) and their networks."""

    entity: str
    project: str
    dataset: str
    pairs: Sequence[tuple[str, str]]

    @property
    def names(self) -> list[str]:
        """The values of ``pair`` in a config: a network trained alone has its name there."""
        alone = dict.fromkeys(network for pair in self.pairs for network in pair)
        return [*map("-".join, self.pairs), *alone]


def build_workspace(scope: Scope) -> ws.Workspace:
    """Return a workspace: a section for each subject, with runs grouped by pair and method."""
    return ws.Workspace(
        entity=scope.entity,
        project=scope.project,
        name=f"Distillation on {scope.dataset}",
        sections=[
            ws.Section(
                name=subject.title,
                panels=[*subject.report_panels(), *subject.run_panels(None)],
                is_open=True,
            )
            for subject in SUBJECTS
        ],
        settings=ws.WorkspaceSettings(max_runs=MAX_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=ws.Or(ws.And(DATASET.isin([scope.dataset]), PAIR.isin(scope.names)), REPORTS),
            groupby=[ws.Config("pair"), ws.Config("variant")],
            pinned_columns=list(COLUMNS),
        ),
    )


def build_report(scope: Scope) -> wr.Report:
    """Return a report: the text of each subject, then its panels pair by pair."""
    results, *others = SUBJECTS
    blocks = [wr.TableOfContents(), *_section(scope, results), *_published(scope)]
    for subject in others:
        blocks += _section(scope, subject)
    blocks += _failed_runs(scope)
    return wr.Report(
        entity=scope.entity,
        project=scope.project,
        title=f"Distillation on {scope.dataset}",
        description=f"Built by `{tool_command('dashboard')}`; rebuild it instead of editing it.",
        blocks=blocks,
        width="fluid",
    )


def count_panels(spec: Any) -> int:
    """Return the number of panels in the specification of a workspace or a report."""
    if isinstance(spec, dict):
        return ("viewType" in spec) + sum(map(count_panels, spec.values()))
    return sum(map(count_panels, spec)) if isinstance(spec, list) else 0


def _section(scope: Scope, subject: Subject) -> list[Any]:
    blocks: list[Any] = [wr.H1(subject.title), wr.P(subject.text)]
    if panels := subject.report_panels():
        blocks.append(_grid("Tables and plots", REPORTS, panels, hidden=True))
    for teacher, student in scope.pairs:
        name = f"{teacher}-{student}"
        if panels := subject.run_panels(wr.Config("variant")):
            filters = ws.And(DATASET.isin([scope.dataset]), PAIR.isin([name, student]))
            grid = _grid(name, filters, panels, hidden=True)
            if subject.folded:
                blocks.append(wr.H2(name, collapsed_blocks=[grid]))
            else:
                blocks += [wr.H2(name), grid]
    return blocks


def _failed_runs(scope: Scope) -> list[Any]:
    failed = ws.Metric("State").isin(FAILED_STATES)
    filters = ws.And(DATASET.isin([scope.dataset]), PAIR.isin(scope.names), failed)
    keys = [*evaluated_phase_keys("loss"), *(f"{phase}/loss" for phase in first_phases())]
    loss = curve("Loss of the runs that failed", keys, None, x="Step")
    return [_grid("Failed runs", filters, [loss], hidden=False)]


def _grid(name: str, filters: ws.And, panels: Panels, *, hidden: bool) -> wr.PanelGrid:
    # A run set without a project uses the report's, and W&B need not be asked for it.
    runs = wr.Runset(name=name, filters=filters, pinned_columns=["run:displayName", *COLUMNS])
    return wr.PanelGrid(runsets=[runs], panels=panels, hide_run_sets=hidden)


def _published(scope: Scope) -> list[Any]:
    blocks: list[Any] = []
    for source in all_published(scope.dataset):
        for name, pairs in source.tables.items():
            shown = [pair for pair in pairs if pair in scope.pairs]
            if shown:
                blocks += [wr.H2(f"Published: {name}"), _values(source, scope.dataset, shown)]
        later = {row for *pair, row in source.later.top1 if tuple(pair) in scope.pairs}
        blocks += [wr.P(note) for note in (*source.notes, *source.later.notes(later))]
    return blocks


def _values(source: Published, dataset: str, pairs: Sequence[tuple[str, str]]) -> wr.MarkdownBlock:
    metrics = metrics_of(dataset)
    columns = [(pair, metric) for pair in pairs for metric in metrics]
    names = ("<br>".join(column_lines(*column, metrics)) for column in columns)
    lines = [["teacher<br>student", *names], [":---"] + ["---:"] * len(columns)]
    for row in source.all_rows:
        found = [source.value(pair, row, metric) for pair, metric in columns]
        if row in source.later.rows and not any(found):
            continue
        lines.append([row, *("" if value is None else f"{value:.2f}" for value in found)])
    for rerun in source.reruns:
        texts = [rerun.text(pair) if metric == "top1" else "" for pair, metric in columns]
        if any(texts):
            lines.append([f"{rerun.label}, re-run", *texts])
    return wr.MarkdownBlock("\n".join(f"| {' | '.join(line)} |" for line in lines))
