"""The workspace and the report in W&B: their panels, and the runs that these show."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from conftest import Compose
from faults import SMALL
from test_tracking import inspect, offline_runs

pytest.importorskip("wandb_workspaces", reason="the extra [dashboard] is not installed")

from sskd import CONF
from sskd.config import method_settings
from sskd.dashboard import panels
from sskd.dashboard.__main__ import main
from sskd.methods import METHODS
from sskd.methods.tasks import TASKS
from sskd.schedule import PhaseSettings
from sskd.train import train

Spec = dict[str, Any]
RUN_FIELDS = {"_step", "state", "jobType"}


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., tuple[Spec, Spec]]:
    """Return a function from the command's options to the workspace and the report."""

    def build(*options: str) -> tuple[Spec, Spec]:
        path = tmp_path / "specs.json"
        assert main([*options, "--out", str(path)]) == 0
        specs = json.loads(path.read_text())
        return specs["workspace"], specs["report"]

    return build


def nodes(spec: Any) -> Iterator[Spec]:
    """Yield every object in ``spec``, in order."""
    if isinstance(spec, dict):
        yield spec
        spec = list(spec.values())
    if isinstance(spec, list):
        for part in spec:
            yield from nodes(part)


def all_panels(spec: Spec) -> list[Spec]:
    return [node for node in nodes(spec) if "viewType" in node]


def sections(workspace: Spec) -> dict[str, list[Spec]]:
    found = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in found}


def grids(report: Spec) -> list[Spec]:
    return [node["metadata"] for node in nodes(report) if node.get("type") == "panel-grid"]


def filters(run_set: Spec) -> dict[str, list[str]]:
    """Return the values that each field of a run set may have."""
    found = run_set["filters"]["filters"]
    assert {each["op"] for each in found} == {"IN"}
    return {each["key"]["name"]: each["value"] for each in found}


def keys_of_runs(panel: Spec) -> set[str]:
    """Return the names of the metrics that a panel takes from the history and the summary."""
    config = panel["config"]
    axes = {config[axis].removeprefix("summary:") for axis in ("xAxis", "yAxis") if axis in config}
    return {*config.get("metrics", ()), *axes}


def keys_of_report(panel: Spec) -> set[str]:
    """Return the names of the tables and figures that a panel takes from the report's run."""
    tables = {node["val"] for node in nodes(panel["config"]) if node.get("nodeType") == "const"}
    return tables | set(panel["config"].get("mediaKeys", ()))


def logged(runs: Path) -> tuple[set[str], set[str]]:
    """Return the names of the metrics that runs have logged, and of the settings in W&B."""
    metrics: set[str] = set()
    settings: set[str] = set()
    for record in (record for path in offline_runs(runs) for record in inspect(path)):
        metrics |= set(record.get("history", {}).get("item", ()))
        metrics |= set(record.get("summary", {}).get("update", ()))
        for name, value in record.get("run", {}).get("config", {}).get("update", {}).items():
            inner = value if isinstance(value, dict) else {}
            settings |= {f"{name}.value", *(f"{name}.value.{key}" for key in inner)}
    return metrics, settings


def has_first_phase(method: str) -> bool:
    fields = method_settings(method).model_fields.values()
    return any(field.annotation is PhaseSettings for field in fields)


def test_panels_show_only_keys_that_runs_log(
    composed: Compose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    built: Callable[..., tuple[Spec, Spec]],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with_first_phases = {name for name in METHODS if has_first_phase(name)}
    for method in sorted({"vanilla", "kd", "crd"} | with_first_phases):
        train(composed(*SMALL, f"method={method}", "schedule.epochs=1", "batch_size=40"))
    metrics, settings = logged(tmp_path / "runs")
    # The terms of the other methods are logged under the same names as that of CRD.
    places = {key.removesuffix("crd") for key in metrics if key.endswith("/crd")}
    assert places >= {"distill/loss/", "distill/weighted/"}
    metrics |= {place + term for place in places for term in panels.method_terms()}
    metrics.add("test/top5")  # of datasets with more classes
    # And so is the accuracy of SSKD's other tasks.
    metrics |= {key.replace("contrastive", task) for key in metrics for task in TASKS}
    for spec in built():
        shown = set().union(*map(keys_of_runs, all_panels(spec)))
        assert {"test/top1", "distill/weighted/crd", "flow/loss", "kl", "hours"} <= shown
        assert {
            "train/loss",
            "train/loss/ce",
            "train/top1",
        } <= shown  # from scratch
        assert shown - RUN_FIELDS - metrics == set()
        grouped = {panel["config"].get("groupBy") for panel in all_panels(spec)}
        fields = {node["key"]["name"] for node in nodes(spec) if node.get("key", {}).get("section")}
        by_table = {key["name"] for node in nodes(spec) for key in node.get("grouping", ())}
        assert (grouped | fields | by_table) - {None, "createdAt"} - RUN_FIELDS - settings == set()


def test_panels_show_all_that_the_report_logs(built: Callable[..., tuple[Spec, Spec]]) -> None:
    expected = {"tables/results", "tables/cost", "tables/failed"}
    expected |= {"plots/gain", "plots/study"}
    workspace, report = built()
    assert set().union(*map(keys_of_report, all_panels(workspace))) == expected
    shown = set()
    for grid in grids(report):
        of_report = set().union(*map(keys_of_report, all_panels(grid)))
        (run_set,) = grid["runSets"]
        assert bool(of_report) == (filters(run_set) == {"jobType": ["report"]})
        shown |= of_report
    assert shown == expected


def test_losses_and_first_phases_follow_the_methods() -> None:
    assert set(panels.first_phases()) == {
        *("boundary", "flow", "paraphraser", "ss_head", "teacher_classifiers")
    }
    assert {"tf", "ss", "crd", "fitnet"} <= set(panels.method_terms())
    assert not {"ce", "kd"} & set(panels.method_terms())


def test_workspace_begins_with_results_and_averages_seeds(
    built: Callable[..., tuple[Spec, Spec]],
) -> None:
    workspace, _ = built("--dataset", "cifar10", "--pairs", "vgg13-vgg8", "--entity", "us")
    assert (workspace["entity"], workspace["project"]) == ("us", "sskd")
    assert list(sections(workspace)) == [
        *("Results", "Gains", "Studies", "Curves", "Losses", "Agreement", "Self-supervision"),
        *("Cost", "Failures"),
    ]
    (run_set,) = workspace["spec"]["section"]["runSets"]
    assert filters(run_set) == {
        "dataset.value.name": ["cifar10"],
        "pair.value": ["vgg13-vgg8", "vgg13", "vgg8"],
        "jobType": ["report"],
    }
    connectors = [each.get("connector") for each in run_set["filters"]["filters"]]
    assert connectors == [None, "AND", "OR"]
    assert [key["name"] for key in run_set["grouping"]] == ["pair.value", "variant.value"]
    for panel in all_panels(workspace):
        # A grouping of the panel would average over runs that the run table separates.
        assert "groupBy" not in panel["config"]
        if panel["viewType"] in ("Run History Line Plot", "Bar Chart"):
            assert panel["config"]["groupAgg"] == "mean"
            assert panel["config"]["groupArea"] == "stddev"
            assert panel["config"]["limit"] > 11 * len(METHODS)  # all pairs at once


def test_the_report_has_panels_for_each_pair(built: Callable[..., tuple[Spec, Spec]]) -> None:
    _, report = built("--pairs", "wrn_40_2-wrn_16_2", "vgg13-vgg8")
    curves = [
        (filters(grid["runSets"][0]), panel["config"])
        for grid in grids(report)
        for panel in all_panels(grid)
        if panel["config"].get("metrics") == ["test/top1"]
    ]
    assert [runs for runs, _ in curves] == [
        {
            "dataset.value.name": ["cifar100"],
            "pair.value": [f"{teacher}-{student}", student],  # and the student trained from scratch
        }
        for teacher, student in (("wrn_40_2", "wrn_16_2"), ("vgg13", "vgg8"))
    ]
    for _, config in curves:
        assert config["groupBy"] == "variant.value"
        assert (config["groupAgg"], config["groupArea"]) == ("mean", "stddev")
        assert config["aggregate"]
        assert config["xAxis"] == "epoch"  # the steps of W&B include those of first phases


def test_the_report_shows_failed_runs_in_a_table(built: Callable[..., tuple[Spec, Spec]]) -> None:
    _, report = built("--pairs", "vgg13-vgg8")
    failed = grids(report)[-1]
    assert set(filters(failed["runSets"][0])["state"]) >= {"failed", "crashed"}
    assert failed["hideRunSets"] is False
    assert "run:state" in failed["runSets"][0]["runFeed"]["columnOrder"]


def test_the_report_has_the_published_values(
    built: Callable[..., tuple[Spec, Spec]],
) -> None:
    def published(*options: str) -> list[list[list[str]]]:
        _, report = built(*options)
        texts = [node["content"] for node in nodes(report) if node.get("type") == "markdown-block"]
        return [
            [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n")]
            for text in texts
        ]

    # Xu et al., ECCV 2020: SSKD's row of wrn_40_2 to wrn_16_2, and of vgg13 to vgg8.
    similar, benchmark, recipe = published("--pairs", "wrn_40_2-wrn_16_2", "vgg13-vgg8")
    assert similar[0] == ["teacher<br>student", "wrn_40_2<br>wrn_16_2", "vgg13<br>vgg8"]
    assert ["SSKD", "76.04", "75.33"] in similar
    assert ["student", "73.64", "70.68"] in similar
    # Beneath it, the values that Yang et al. measured for SSKD (three runs).
    assert similar.index(["SSKD", "76.04", "75.33"]) < similar.index(
        ["SSKD, HSAKD's authors (3), re-run", "76.16 ± 0.17", ""]
    )
    assert ["ReviewKD", "76.12", "74.85"] in benchmark
    assert ["SKD", "76.60", "75.75"] in recipe
    # Later methods without a value for the pair have no row.
    _, benchmark = published("--pairs", "ResNet50-vgg8")
    assert ["DKD", "75.34"] in benchmark
    assert not any(name == "ReviewKD" for name, _ in benchmark)
    assert published("--pairs", "resnet14-resnet8") == []
    assert published("--dataset", "digits") == []


def test_without_save_it_prints_what_was_built(capsys: Any) -> None:
    assert main(["--pairs", "vgg13-vgg8", "vgg13-MobileNetV2"]) == 0
    output, errors = capsys.readouterr()
    assert output.startswith("built a workspace of 31 panels and a report of ")
    assert output.endswith("in 9 sections; not saved: add --save, with a login (wandb login)\n")
    assert errors == ""


def test_without_a_login_nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    command = [sys.executable, "-m", "sskd.dashboard", "--pairs", "vgg13-vgg8", "--save"]
    found = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.startswith("error: built a workspace of 31 panels")
    assert found.stderr.endswith("not saved: log in first (wandb login)\n")
    assert (found.stdout, found.stderr.count("\n")) == ("", 1)


class Service:
    """A substitute for W&B's server, which keeps the saved views."""

    app_url = "https://wandb.test"

    def __init__(self, failure: Exception | None = None) -> None:
        self.views: list[Spec] = []
        self.projects: list[str] = []
        self.failure = failure

    def execute_graphql(self, query: str, variables: Spec) -> Spec:
        if self.failure:
            raise self.failure
        self.views.append(variables)
        project = {"name": variables["projectName"], "entityName": variables["entityName"]}
        view = {"id": f"id{len(self.views)}", "name": variables["name"], "project": project}
        return {"upsertView": {"view": view | {"spec": variables["spec"]}}}

    def api(self) -> SimpleNamespace:
        return SimpleNamespace(
            _service_api=self,
            default_entity="me",
            projects=lambda entity: [],
            create_project=lambda project, entity: self.projects.append(f"{entity}/{project}"),
        )


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()
    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    monkeypatch.setattr(wandb, "Api", service.api)
    return service


@pytest.mark.parametrize(("options", "entity"), [((), "me"), (("--entity", "us"), "us")])
def test_both_are_saved_and_their_addresses_printed(
    service: Service, capsys: Any, options: tuple[str, ...], entity: str
) -> None:
    assert main(["--project", "grid", "--pairs", "vgg13-vgg8", "--save", *options]) == 0
    assert service.projects == [f"{entity}/grid"]
    assert {view["type"] for view in service.views} == {"runs", "project-view"}
    assert {(view["entityName"], view["projectName"]) for view in service.views} == {
        (entity, "grid")
    }
    _, workspace, report = capsys.readouterr().out.splitlines()
    assert workspace.startswith(f"workspace: https://wandb.test/{entity}/grid?nw=")
    assert report.startswith(f"report: https://wandb.test/{entity}/grid/reports/Distillation-on-")


def test_a_refusal_of_the_server_is_one_line(service: Service, capsys: Any) -> None:
    service.failure = wandb.errors.CommError("permission denied\non this project")
    assert main(["--pairs", "vgg13-vgg8", "--save"]) == 1
    output, errors = capsys.readouterr()
    assert errors.splitlines()[-1].endswith("not saved: permission denied on this project")
    assert output == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pairs", "vgg13-vgg9"), "no network 'vgg9'; did you mean 'vgg"),
        (("--pairs", "vgg13"), "--pairs vgg13: not TEACHER-STUDENT"),
        (("--pairs", "vgg13-vgg8", "--out", "missing/folder.json"), "cannot be written"),
    ],
)
def test_a_mistake_in_an_option_is_one_line(
    capsys: Any, options: tuple[str, ...], message: str
) -> None:
    assert main(options) == 1
    output, errors = capsys.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    assert message in errors


def test_a_missing_library_is_an_error_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("sskd.dashboard.layout", "sskd.dashboard.panels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main([]) == 1
    assert capsys.readouterr().err == (
        "error: the dashboard needs wandb-workspaces: pip install '.[dashboard]'\n"
    )


@pytest.mark.parametrize(
    ("script", "name"),
    [("bin/sskd-dashboard", "sskd-dashboard"), ("-m", "python -m sskd.dashboard")],
)
def test_the_report_names_the_command_that_built_it(
    built: Callable[..., tuple[Spec, Spec]], monkeypatch: pytest.MonkeyPatch, script: str, name: str
) -> None:
    monkeypatch.setattr(sys, "argv", [script])
    _, report = built()
    assert report["description"] == f"Built by `{name}`; rebuild it instead of editing it."


def test_help_imports_no_large_library() -> None:
    code = (
        "import sys; from sskd.dashboard.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: print({'torch', 'wandb', 'wandb_workspaces'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.startswith("usage: python -m sskd.dashboard")
    assert found.stdout.endswith("set()\n")
