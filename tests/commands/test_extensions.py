"""Extensions: files and modules that add methods, networks and datasets."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from starting import run
from test_run import SMALL

from sskd.data import SOURCES
from sskd.errors import UserError
from sskd.invocation import extensions
from sskd.invocation.extensions import (
    VARIABLE,
    extension_digests,
    extension_names,
    load_extensions,
)
from sskd.methods import METHODS
from sskd.models import ARCHITECTURES
from sskd.runs.status import read_status

METHOD = """
from sskd.methods import METHODS
from sskd.methods.kd import KD
from sskd.settings import Positive


class Mine(KD):
    def __init__(self, *networks, sharpness: Positive, **shared):
        super().__init__(*networks, **shared)
        self.temperature = self.temperature / sharpness


METHODS["mine"] = Mine
"""
NETWORK = """
from functools import partial

from sskd.models import ARCHITECTURES

ARCHITECTURES["small8"] = partial(ARCHITECTURES["resnet8"])
"""
YAML = "name: mine\nweights: {ce: 1.0, kd: 1.0}\ntemperature: 4.0\nsharpness: 2.0\n"
WITHOUT_TEACHER = [word for word in SMALL if not word.startswith("teacher.train")]


@pytest.fixture(autouse=True)
def _no_extensions() -> Iterator[None]:
    """Leave the suite's dicts as they were."""
    tables: list[dict[str, Any]] = [METHODS, ARCHITECTURES, SOURCES]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    for kept in (extensions._loaded, extensions._added, extensions._digests):
        kept.clear()


def forget() -> None:
    """Remove what the extensions have added, as if the process were new."""
    for table, group in ((METHODS, "method"), (ARCHITECTURES, "arch"), (SOURCES, "dataset")):
        for name in extension_names(group):
            del table[name]
    for kept in (extensions._loaded, extensions._added, extensions._digests):
        kept.clear()


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a method and a network, which the environment names."""
    folder = tmp_path / "mine"
    for group in ("method", "arch"):
        (folder / "conf" / group).mkdir(parents=True)
    (folder / "mine.py").write_text(METHOD)
    (folder / "small.py").write_text(NETWORK)
    (folder / "conf/method/mine.yaml").write_text(YAML)
    (folder / "conf/arch/small8.yaml").write_text("name: small8\nbase_lr: 0.05\n")
    names = [str(folder / name) for name in ("mine.py", "small.py")]
    monkeypatch.setenv(VARIABLE, os.pathsep.join(names))
    return folder


def extension(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> Path:
    path = tmp_path / "extension.py"
    path.write_text(text)
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def test_a_sweep_trains_with_a_method_of_ones_own(command: Command, mine: Path) -> None:
    words = (*SMALL, "schedule.epochs=1", "method=mine,kd", "arch@teacher=small8")
    status, _, err = command("-cd", str(mine / "conf"), "-m", *words)
    assert status == 0, err
    (result,) = command.runs.glob("digits/distill/small8-resnet8/mine/*/result.json")
    assert str(read_status(result.parent).command).startswith(
        f"python train_student.py -cd {mine / 'conf'} -cn student hydra.mode=RUN "
    )
    # All settings are those of its YAML file, so that the folder's name has no hash.
    assert result.parent.name == next(iter(command.runs.glob("digits/distill/*/kd/*"))).name


def test_worker_processes_load_the_extensions(mine: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = (*SMALL, "schedule.epochs=1", "method=mine", "seed=0,1", f"runs={tmp_path / 'runs'}")
    search_path = f"hydra.searchpath=[file://{mine / 'conf'}]"
    finished = run("train_student.py", "-m", *words, search_path, "hydra/launcher=processes")
    assert finished.returncode == 0, finished.stderr
    results = list(tmp_path.glob("runs/digits/distill/*/mine/*/result.json"))
    assert sorted(path.parent.name.partition("-")[0] for path in results) == ["seed0", "seed1"]
    difference = json.loads(results[0].read_text())["difference"]
    assert not [key for key in difference if key.startswith("method.")]
    command = read_status(results[0].parent).command
    assert f'hydra.searchpath=["file://{mine}/conf"]' in str(command)


def test_a_missing_teacher_is_trained_with_its_folder(command: Command, mine: Path) -> None:
    words = (*WITHOUT_TEACHER, "arch@teacher=small8", "method=mine")
    status, _, err = command("-cd", str(mine / "conf"), *words)
    assert status == 1
    assert f"`python train_teacher.py -cd {mine / 'conf'} arch=small8 " in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.sharpness=-1"], "method.sharpness: should be greater than 0"),
        (["method.sharpnes=1"], "did you mean 'method.sharpness'?"),
        (["+method.sharpnes=1"], "did you mean 'method.sharpness'?"),
        (["method=mime"], "did you mean 'mine'?"),
    ],
)
def test_its_settings_are_checked(
    command: Command, mine: Path, words: list[str], message: str
) -> None:
    chosen = [] if words == ["method=mime"] else ["method=mine"]
    status, _, err = command("-cd", str(mine / "conf"), "dataset=digits", *chosen, *words)
    assert (status, err.count("\n")) == (1, 1)
    assert message in err


def test_a_method_without_its_folder_is_one_line(command: Command, mine: Path) -> None:
    status, _, err = command("dataset=digits", "method=mine")
    assert (status, err.count("\n")) == (1, 1)
    assert "method=mine: has no method/mine.yaml; name the folder" in err
    assert "--config-dir FOLDER" in err


@pytest.mark.parametrize("more", [[], ["method.sharpnes=1"]])
def test_a_method_without_its_code_is_one_line(
    command: Command, mine: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.delenv(VARIABLE)
    words = ("-cd", str(mine / "conf"), "dataset=digits", "method=mine", *more)
    status, _, err = command(*words)
    assert (status, err.count("\n")) == (1, 1)
    assert "no method 'mine'" in err
    assert "SSKD_EXTENSIONS=FILE.py adds one" in err


BROKEN = {
    "an error": ("import os\n\n1 / 0\n", ":3: cannot be imported (ZeroDivisionError: division"),
    "a slip": ("def f(:\n", ":1: cannot be imported (SyntaxError: "),
    "a missing module": ("import nowhere\n", ":1: cannot be imported (ModuleNotFoundError: No"),
    "an exit": ("import sys\nsys.exit(3)\n", ":2: cannot be imported (SystemExit: 3)"),
    "a taken name": (
        "from sskd.methods import METHODS\nMETHODS['kd'] = METHODS['at']\n",
        ": the method 'kd' exists; choose another name",
    ),
    "a lost name": (
        "from sskd.data import SOURCES\ndel SOURCES['digits']\n",
        ": the dataset 'digits' exists; choose another name",
    ),
    "a path as a name": (
        "from sskd.models import ARCHITECTURES\nARCHITECTURES['a/b'] = int\n",
        ": arch 'a/b': a name has letters, digits and '_', and begins with a letter",
    ),
    "no method": (
        "from sskd.methods import METHODS\nMETHODS['mine'] = dict\n",
        ": method 'mine' should be a subclass of sskd.methods.Method",
    ),
    "no reader": (
        "from sskd.data import SOURCES\nSOURCES['mine'] = print\n",
        ": dataset 'mine' should be an sskd.data.sources.Reader",
    ),
}


@pytest.mark.parametrize("sweep", [[], ["-m"]])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_extension_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, sweep: list[str]
) -> None:
    text, message = BROKEN[kind]
    path = extension(monkeypatch, tmp_path, text)
    before = [list(METHODS), list(ARCHITECTURES), list(SOURCES)]
    status, _, err = command(*sweep, "dataset=digits", "method=vanilla")
    assert (status, err.count("\n")) == (1, 1), err
    assert err.startswith(f"error: {path}{message}")
    assert [list(METHODS), list(ARCHITECTURES), list(SOURCES)] == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/mine.py", "nowhere/mine.py: there is no such file"),
        ("nowhere_at_all", "nowhere_at_all: cannot be imported (ModuleNotFoundError: "),
    ],
)
def test_a_missing_extension_is_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(UserError) as caught:
        load_extensions()
    assert message in str(caught.value)


def test_two_extensions_cannot_share_a_name(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = mine / "copy.py"
    copy.write_text(METHOD)
    monkeypatch.setenv(VARIABLE, f"{mine / 'mine.py'}{os.pathsep}{copy}")
    with pytest.raises(UserError, match=r"copy\.py: the method 'mine' exists"):
        load_extensions()
    assert extension_names("method") == ["mine"]


def test_an_extension_is_imported_once(mine: Path) -> None:
    load_extensions()
    first = METHODS["mine"]
    load_extensions()
    assert METHODS["mine"] is first
    assert (extension_names("method"), extension_names("arch")) == (["mine"], ["small8"])


def test_a_configuration_cannot_name_an_extension(
    command: Command, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE)
    for word in (f"+extensions=[{mine / 'mine.py'}]", f"+hydra.extensions=[{mine / 'mine.py'}]"):
        assert command("dataset=digits", "method=vanilla", "seed=-1", word)[0] == 1
    word = f"+hydra.job.env_set.{VARIABLE}={mine / 'mine.py'}"
    status, _, err = command("dataset=digits", "method=vanilla", word)
    assert (status, err.count("\n")) == (1, 1)
    assert f"hydra.job.env_set.{VARIABLE}: a configuration cannot load code" in err
    assert "mine" not in METHODS


def test_help_imports_no_extension(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: Command
) -> None:
    extension(monkeypatch, tmp_path, "1 / 0")
    status, out, _ = command("--help")
    assert status == 0
    assert "method: ab, at, " in out


def test_help_shows_the_options_of_the_folder(mine: Path, command: Command) -> None:
    _, out, _ = command("-cd", str(mine / "conf"), "--help")
    assert "kd, mine, nst" in out


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
