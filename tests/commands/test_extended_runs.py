"""Runs with extensions: what an edit of code or of a default changes, and their weighting."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import test_extensions
import yaml
from conftest import Command
from test_extensions import METHOD, YAML
from test_run import SMALL

from sskd.data import SOURCES
from sskd.invocation import extensions
from sskd.invocation.extensions import (
    VARIABLE,
    extension_digests,
    extension_names,
    load_extensions,
)
from sskd.methods import METHODS
from sskd.models import ARCHITECTURES
from sskd.report.report import read_report
from sskd.runs import recipe

mine, _no_extensions = test_extensions.mine, test_extensions._no_extensions  # the fixtures

# ---- changed code ----

QUICK = [*SMALL, "schedule.epochs=1", "dataset.fraction=0.05", "teacher.fraction=0.05"]
HEAD = """
from torch import nn

from sskd.methods import METHODS, LossOutput, Phase
from sskd.methods.kd import KD


class Head(KD):
    def __init__(self, networks, **shared):
        super().__init__(networks, **shared)
        self.head = nn.Linear(64, 2)

    def phases(self):
        weights = {"head": 1.0}
        yield Phase("head", self.head, self.head_loss, weights, teacher_only=True)
        yield from super().phases()

    def head_loss(self, batch):
        loss = self.head(self.teacher_features(batch).pooled).square().mean()
        return LossOutput({"head": loss}, {})


METHODS["headed"] = Head
"""


def forget() -> None:
    """Remove what the extensions have added, as if the process were new."""
    for table, group in ((METHODS, "method"), (ARCHITECTURES, "arch"), (SOURCES, "dataset")):
        for name in extension_names(group):
            del table[name]
    for kept in (extensions._loaded, extensions._added, extensions._digests):
        kept.clear()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_edited_phase_is_not_reused(command: Command, mine: Path) -> None:
    text = YAML.replace("sharpness: 2.0\n", "").replace("mine", "headed")
    (mine / "conf/method/headed.yaml").write_text(text)
    words = ("-cd", str(mine / "conf"), *QUICK, "method=headed", "arch@teacher=resnet8")
    losses = []
    for change, count in (("", 1), ("", 1), ("0 * ", 2)):
        (mine / "mine.py").write_text(HEAD.replace("loss = ", f"loss = {change}"))
        forget()
        status, _, err = command(*words, "force=true")
        assert status == 0, err
        assert len(list(command.runs.glob("digits/phases/resnet8/head/*/result.json"))) == count
        (metrics,) = command.runs.glob("digits/distill/*/headed/seed*/metrics.jsonl")
        losses.append(json.loads(metrics.read_text().splitlines()[0])["loss/head"])
    assert losses[0] == losses[1] > losses[2] == 0


def test_a_result_has_the_code_that_its_run_uses(command: Command, mine: Path) -> None:
    words = ("-cd", str(mine / "conf"), "-m", *QUICK, "method=mine,kd", "arch@teacher=resnet8")
    assert command(*words, "arch@student=small8,resnet8")[0] == 0
    method, network = (digest(mine / name) for name in ("mine.py", "small.py"))
    found = {
        (path.parts[-4], path.parts[-3]): json.loads(path.read_text())["extensions"]
        for path in command.runs.glob("digits/distill/*/*/*/result.json")
    }
    assert found == {
        ("resnet8-small8", "mine"): {"method=mine": method, "arch=small8": network},
        ("resnet8-small8", "kd"): {"arch=small8": network},
        ("resnet8-resnet8", "mine"): {"method=mine": method},
        ("resnet8-resnet8", "kd"): {},
    }


@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_changed_code_of_a_finished_run_is_reported(
    command: Command, mine: Path, monkeypatch: pytest.MonkeyPatch, sweep: list[str]
) -> None:
    words = ("-cd", str(mine / "conf"), *sweep, *QUICK, "arch@teacher=resnet8", "method=mine")
    assert command(*words)[0] == 0
    for path, count in ((mine / "small.py", 0), (mine / "mine.py", 1)):
        path.write_text(path.read_text() + "\n")
        forget()
        # Another spelling of the same files.
        names = [str(mine / ".." / "mine" / name) for name in ("small.py", "mine.py")]
        monkeypatch.setenv(VARIABLE, os.pathsep.join(names))
        status, _, err = command(*words)
        assert status == 0, err
        assert err.count("has changed") == count, err
    assert ": the code of method=mine has changed since this run was trained; force=" in err


def test_keys_of_older_results_are_ignored(
    command: Command, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("-cd", str(mine / "conf"), *QUICK, "arch@teacher=resnet8", "method=mine")
    assert command(*words)[0] == 0
    (path,) = command.runs.glob("digits/distill/*/mine/*/result.json")
    result = json.loads(path.read_text())
    result["extensions"] = {str(mine / "mine.py"): "0" * 64, "mine": 3}
    path.write_text(json.dumps(result))
    status, _, err = command(*words)
    assert (status, "has changed" in err) == (0, False)


PACKAGE = {
    "__init__.py": "from . import losses, nets, files\n",
    "losses.py": METHOD,
    "nets.py": (
        "from sskd.models import ARCHITECTURES\nfrom .layers import make, Net\n"
        "ARCHITECTURES['made'] = make\nARCHITECTURES['net'] = Net\n"
    ),
    "layers.py": "class Net: ...\ndef make(classes): ...\n",
    "files.py": (
        "from sskd.data import SOURCES\nfrom sskd.data.sources import Reader, no_digest\n"
        "def load(settings): ...\nSOURCES['files'] = Reader(load, no_digest)\n"
    ),
}


def test_the_digest_is_that_of_the_defining_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "package_of_mine"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(VARIABLE, folder.name)
    load_extensions()
    choices = [("method", "mine"), ("arch", "made"), ("arch", "net"), ("dataset", "files")]
    found = extension_digests([*choices, ("method", "kd"), ("arch", "nowhere")])
    assert found == {
        "method=mine": digest(folder / "losses.py"),
        "arch=made": digest(folder / "layers.py"),
        "arch=net": digest(folder / "layers.py"),
        "dataset=files": digest(folder / "files.py"),
    }


# ---- a weighting ----

WEIGHTED = {
    "written": (
        "name: NAME\ntemperature: 4.0\nweights: {ce: '${weighting.ce}', kd: '${weighting.kd}'}\n"
    ),
    "inherited": "defaults:\n  - fitnet\n  - _self_\nname: NAME\nweights: {fitnet: 5.0}\n",
}
PLAIN = """
from sskd.methods import METHODS
from sskd.methods.BASE import CLASS


class Own(CLASS): ...


METHODS["NAME"] = Own
"""


def follower(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> str:
    """Write a method whose weights follow ``weighting``; return its name."""
    name = f"own_{kind}"
    base = ("fitnet", "FitNet") if kind == "inherited" else ("kd", "KD")
    text = PLAIN.replace("BASE", base[0]).replace("CLASS", base[1]).replace("NAME", name)
    (folder / "own.py").write_text(text)
    monkeypatch.setenv(VARIABLE, str(folder / "own.py"))
    (folder / f"conf/method/{name}.yaml").write_text(WEIGHTED[kind].replace("NAME", name))
    return name


@pytest.mark.parametrize("kind", WEIGHTED)
@pytest.mark.parametrize("way", ["config-dir", "searchpath"])
def test_an_extension_can_follow_a_weighting(
    command: Command, mine: Path, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    name = follower(mine, monkeypatch, kind)
    path = f"hydra.searchpath=[file://{mine / 'conf'}]"
    words = [path] if way == "searchpath" else ["--config-dir", str(mine / "conf")]
    missing = ("dataset=cifar100", "dataset.download=false", "dataset.root=/nonexistent")
    status, out, err = command(*words, *missing, f"method={name}", "weighting=common")
    assert status == 1
    assert "cifar-100" in err
    assert "no effect" not in out


def test_an_extension_with_weights_of_its_own(command: Command, mine: Path) -> None:
    missing = ("dataset=cifar100", "dataset.download=false", "dataset.root=/nonexistent")
    words = ("-cd", str(mine / "conf"), *missing, "method=mine", "weighting=common")
    assert "weighting=common: has no effect on method=mine, which has weights" in command(*words)[1]


def test_its_weighting_is_shown_in_the_table(
    command: Command, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = follower(mine, monkeypatch, "written")
    chosen = "weighting=sskd,common,crd_benchmark"
    words = ("-cd", str(mine / "conf"), "-m", *QUICK, "arch@teacher=resnet8")
    assert command(*words, f"method={name}", chosen)[0] == 0
    tables = read_report(command.runs, fail).tables("last")
    rows = {entry.row for table in tables for entry in table.entries}
    label = f"{name.upper()} (teacher.fraction=0.05"
    assert rows - {"teacher", "resnet8"} == {
        f"{label})",
        f"{label}, weighting=common)",
        f"{label}, weighting=crd_benchmark)",
    }


def fail(message: str) -> None:
    raise AssertionError(message)


# ---- a changed default ----


def test_a_changed_default_trains_no_run_again(
    command: Command, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine / "mine.py").write_text(METHOD.replace('"mine"', '"changing"'))
    path = mine / "conf/method/changing.yaml"
    words = ("-cd", str(mine / "conf"), *QUICK, "arch@teacher=resnet8", "method=changing")

    def results(default: float, *more: str) -> tuple[int, str, list[float]]:
        text = YAML.replace("name: mine", "name: changing")
        path.write_text(text.replace("sharpness: 2.0", f"sharpness: {default}"))
        recipe.defaults_of.cache_clear()
        recipe.frozen_defaults.cache_clear()
        recipe._compose.cache_clear()
        status, out, err = command(*words, *more)
        found = command.runs.glob("digits/distill/*/changing/*/config.yaml")
        sharpness = [yaml.safe_load(each.read_text())["method"]["sharpness"] for each in found]
        return status, out + err, sorted(sharpness)

    assert results(2.0)[::2] == (0, [2.0])
    assert results(2.0, "method.sharpness=3.0")[::2] == (0, [2.0, 3.0])
    for default, more in (
        (3.0, ["method.sharpness=2.0"]),
        (3.0, []),
        (4.0, ["method.sharpness=3"]),
    ):
        status, shown, found = results(default, *more)
        assert (status, found) == (0, [2.0, 3.0]), shown
        assert "already finished" in shown
    status, shown, found = results(4.0)
    assert (status, found) == (1, [2.0, 3.0])
    assert "holds a run of another configuration: method.sharpness (2.0 there, 4.0 here)" in shown
    assert results(4.0, "method.sharpness=5.0")[::2] == (0, [2.0, 3.0, 5.0])
