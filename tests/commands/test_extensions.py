"""Extensions: files and modules that add methods, networks and datasets."""

from __future__ import annotations

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
from sskd.invocation.extensions import VARIABLE, extension_names, load_extensions
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
    assert "luminet, mine, mlld" in out
