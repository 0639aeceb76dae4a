"""The workspace and the report: which runs each of their parts shows."""

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
    first_phases,
    of_last_stage,
)
from sskd.report.published import Published, published_for

# Config keys in the form that W&B's own filters have.
DATASET, PAIR = ws.Config("dataset.value.name"), ws.Config("pair.value")
REPORTS = ws.And(ws.Metric("JobType").isin(["report"]))
COLUMNS = (
    *("run:state", "config:seed.value", "summary:last/top1", "summary:best/top1"),
    *("summary:agreement", "summary:hours", "tags:__ALL__"),
)
FAILED_STATES = ["failed", "crashed", "killed"]


@dataclass(frozen=True)
class Scope:
    """Which runs: those of ``dataset``, of the ``pairs`` (teacher, student) and their networks."""

    entity: str
    project: str
    dataset: str
    pairs: Sequence[tuple[str, str]]

    @property
    def names(self) -> list[str]:
        """What the runs' ``pair`` may be: a network alone has its own name there."""
        alone = dict.fromkeys(network for pair in self.pairs for network in pair)
        return [*map("-".join, self.pairs), *alone]


def build_workspace(scope: Scope) -> ws.Workspace:
    """Return a workspace with a section a subject, its runs grouped by pair and method."""
    return ws.Workspace(
        entity=scope.entity,
        project=scope.project,
        name=f"Distillation on {scope.dataset}",
        sections=[
            ws.Section(
                name=subject.title,
                panels=[*subject.of_report(), *subject.of_runs(None)],
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
    """Return a report: each subject's own words, then its panels pair by pair."""
    results, *others = SUBJECTS
    blocks = [wr.TableOfContents(), *_section(scope, results), *_published(scope)]
    for subject in others:
        blocks += _section(scope, subject)
    blocks += _failed_runs(scope)
    return wr.Report(
        entity=scope.entity,
        project=scope.project,
        title=f"Distillation on {scope.dataset}",
        description="Built by `python -m sskd.dashboard`; build it anew rather than editing it.",
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
    if panels := subject.of_report():
        blocks.append(_grid("Tables and plots", REPORTS, panels, hidden=True))
    for teacher, student in scope.pairs:
        name = f"{teacher}-{student}"
        if panels := subject.of_runs(wr.Config("variant")):
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
    keys = [*of_last_stage("loss"), *(f"{phase}/loss" for phase in first_phases())]
    loss = curve("Loss of the runs that failed", keys, None, x="Step")
    return [_grid("Failed runs", filters, [loss], hidden=False)]


def _grid(name: str, filters: ws.And, panels: Panels, *, hidden: bool) -> wr.PanelGrid:
    # Without a project of its own a run set is the report's, and needs no look-up to be built.
    runs = wr.Runset(name=name, filters=filters, pinned_columns=["run:displayName", *COLUMNS])
    return wr.PanelGrid(runsets=[runs], panels=panels, hide_run_sets=hidden)


def _published(scope: Scope) -> list[Any]:
    blocks: list[Any] = []
    for source in published_for(scope.dataset):
        for name, pairs in source.tables.items():
            shown = [pair for pair in pairs if pair in scope.pairs]
            if shown:
                blocks += [wr.H2(f"Published: {name}"), wr.MarkdownBlock(_markdown(source, shown))]
        blocks += [wr.P(note) for note in source.notes]
    return blocks


def _markdown(source: Published, pairs: Sequence[tuple[str, str]]) -> str:
    rows = dict.fromkeys(row for *_, row in source.top1)
    header = ["teacher<br>student", *("<br>".join(pair) for pair in pairs)]
    lines = [header, [":---"] + ["---:"] * len(pairs)]
    for row in rows:
        found = [source.top1.get((*pair, row)) for pair in pairs]
        lines.append([row, *("" if value is None else f"{value:.2f}" for value in found)])
    for rerun in source.reruns:
        texts = [rerun.text(pair) for pair in pairs]
        if any(texts):
            lines.append([f"{rerun.label}, re-run", *texts])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
