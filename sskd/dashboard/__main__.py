"""The command ``python -m sskd.dashboard``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sskd import CONF
from sskd.commands.process import run_tool
from sskd.errors import UserError, did_you_mean
from sskd.files import write_text
from sskd.invocation.extensions import extension_names, load_extensions
from sskd.invocation.names import tool_command, tool_parser
from sskd.output import say

DESCRIPTION = """\
Build a Weights & Biases workspace and report of all runs of a project: tables of
results, gains, studies, accuracy curves by pair, losses, agreement with the teacher,
cost and failures. The tables and the plots of gains and studies are those that
'{report} --wandb' has logged.
"""
EXAMPLES = """\
examples:
  {command}                     report what would be saved
  {command} --save              save both and print their addresses
  {command} --pairs vgg13-vgg8 --save
  {command} --out FILE.json     write what would be saved to a file
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's) and return its exit status."""
    return run_tool(lambda: _dashboard(_parser().parse_args(argv)))


def _dashboard(arguments: argparse.Namespace) -> None:
    load_extensions()
    # These imports take seconds, so --help must not need them.
    try:
        from sskd.dashboard.layout import Scope, build_report, build_workspace, count_panels
    except ModuleNotFoundError as error:
        if error.name != "wandb_workspaces":
            raise
        message = "the dashboard needs wandb-workspaces: pip install '.[dashboard]'"
        raise UserError(message) from None
    pairs = [_parse_pair(text) for text in arguments.pairs or _presets()]
    scope = Scope(arguments.entity or "", arguments.project, arguments.dataset, pairs)
    workspace, report = build_workspace(scope), build_report(scope)
    specs = {"workspace": _spec(workspace), "report": _spec(report)}
    counts = (f"a {name} of {count_panels(spec)} panels" for name, spec in specs.items())
    built = f"built {' and '.join(counts)}, in {len(workspace.sections)} sections"
    if arguments.out is not None:
        _write(Path(arguments.out), specs)
    if arguments.save:
        _save(workspace, report, arguments.entity, built)
    else:
        say(f"{built}; not saved: add --save, with a login (wandb login)")


def _presets() -> list[str]:
    return sorted(path.stem for path in (CONF / "pair").glob("*.yaml"))


def _parse_pair(text: str) -> tuple[str, str]:
    suite = (path.stem for path in (CONF / "arch").glob("*.yaml"))
    known = sorted([*suite, *extension_names("arch")])
    teacher, _, student = text.partition("-")
    for name in (teacher, student):
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"--pairs {text}: not TEACHER-STUDENT: no network '{name}'{hint}")
    return teacher, student


def _spec(built: Any) -> dict[str, Any]:
    """Return the JSON that is sent to W&B; the library's property for it fails for reports."""
    spec: dict[str, Any] = built._to_model().model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    return spec


def _write(path: Path, specs: dict[str, Any]) -> None:
    try:
        write_text(path, json.dumps(specs, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from None


def _save(workspace: Any, report: Any, entity: str | None, built: str) -> None:
    import wandb

    try:
        if not wandb.login(prompt=False):
            raise UserError(f"{built}; not saved: log in first (wandb login)")
        workspace.entity = report.entity = entity or wandb.Api().default_entity
        report.save()  # first, because it creates the project if there is none
        workspace.save()
    except (wandb.Error, OSError, ValueError) as error:
        raise UserError(f"{built}; not saved: {' '.join(str(error).split())}") from None
    say(f"{built}\nworkspace: {workspace.url}\nreport: {report.url}")


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser("dashboard", DESCRIPTION.format(report=tool_command("report")), EXAMPLES)
    parser.add_argument("--entity", help="user or team in W&B (default: from the login)")
    parser.add_argument("--project", default="sskd", help="project in W&B (default: sskd)")
    parser.add_argument(
        "--dataset", default="cifar100", help="dataset of the runs (default: cifar100)"
    )
    parser.add_argument(
        "--pairs",
        nargs="+",
        metavar="TEACHER-STUDENT",
        help="pairs of networks to show (default: the presets of conf/pair)",
    )
    parser.add_argument("--save", action="store_true", help="save a new workspace and report")
    parser.add_argument("--out", metavar="FILE", help="write the specifications as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
