"""The suite as an installed package, in a folder that is not the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from starting import ROOT, run

pytest.importorskip("setuptools", minversion="77")
BUILD = """
import sys

from setuptools import build_meta

print(build_meta.build_wheel(sys.argv[1]))
"""
# What a console script does; Hydra has to look for plugins again in a forked process.
CONSOLE_SCRIPT = """
import sys
from importlib.metadata import Distribution
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton

Singleton._instances.pop(Plugins, None)
sys.path.insert(0, sys.argv[1])
(info,) = Path(sys.argv[1]).glob("*.dist-info")
sys.argv = sys.argv[2:]
entry = Distribution.at(info).entry_points[sys.argv[0]]
sys.exit(entry.load()())
"""
SMALL = ("arch@student=resnet8", "dataset.fraction=0.03", "schedule.epochs=1", "method=vanilla")

Command = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files of the wheel, as ``pip install --target`` writes them."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in ("conf", "hydra_plugins", "sskd", "sweeps", "pyproject.toml", "README.md"):
        (source / name).symlink_to(ROOT / name)
    (source / "LICENSE").write_bytes((ROOT / "LICENSE").read_bytes())
    built = run("-c", BUILD, str(folder), cwd=source)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def console_script(installed: Path, tmp_path: Path) -> Command:
    """Return a function that runs a console script of the wheel in an empty folder."""
    environment = os.environ | {"PYTHONPATH": str(installed)}

    def start(*words: str) -> CompletedProcess[str]:
        return run("-c", CONSOLE_SCRIPT, str(installed), *words, cwd=tmp_path, env=environment)

    return start


def test_the_wheel_has_every_file_of_the_suite(installed: Path) -> None:
    def files(root: Path, *folders: str) -> set[str]:
        paths = (path for folder in folders for path in (root / folder).rglob("*.*"))
        kept = (path for path in paths if path.suffix != ".pyc" and path.is_file())
        return {str(path.relative_to(root)) for path in kept}

    expected = files(ROOT, "sskd", "hydra_plugins")
    expected |= {f"sskd/{name}" for name in files(ROOT, "conf", "sweeps")}
    assert files(installed, "sskd", "hydra_plugins") == expected


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_help_of_a_console_script_loads_no_torch(
    installed: Path, tmp_path: Path, role: str
) -> None:
    """A real process, since the forked ones have torch."""
    code = (
        f"import sys; sys.argv = ['/bin/sskd-{role}', '--help']\n"
        f"from sskd.commands.{role} import command\n"
        "try: command()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert found.stdout.count(f"\n  sskd-{role} ") >= 6
    assert "method: ab, at, " in found.stdout
    assert "The table of results: sskd-report" in found.stdout
    assert "python" not in found.stdout


def test_a_packaged_sweep_runs_and_is_reported(console_script: Command, tmp_path: Path) -> None:
    swept = console_script("sskd-student", "-cd", "sweeps", "-cn", "smoke", *SMALL)
    assert swept.returncode == 0, swept.stderr
    (result,) = tmp_path.glob("smoke/digits/scratch/resnet8/*/result.json")
    assert json.loads(result.read_text())["commit"] is None
    status = json.loads(result.with_name("status.json").read_text())
    words = status["command"].split()
    assert words[:2] == ["sskd-student", "-cd"]
    assert Path(words[2]).parts[-3:] == ("site", "sskd", "sweeps")

    shown = console_script("sskd-report", "smoke")
    assert shown.returncode == 0, shown.stderr
    assert "resnet8" in shown.stdout


def test_a_message_names_the_console_script(console_script: Command) -> None:
    missing = console_script("sskd-student", "dataset=digits", "method=kd")
    assert missing.returncode == 1
    assert "train it with `sskd-teacher arch=wrn_40_2 dataset=digits" in missing.stderr
    empty = console_script("sskd-report")
    assert "train a network with 'sskd-teacher dataset=digits" in empty.stderr


@pytest.mark.parametrize(
    "name",
    [
        *("sskd-evaluate", "sskd-dashboard", "sskd-report", "sskd-checks"),
        *("sskd-transfer", "sskd-similarity", "sskd-export"),
    ],
)
def test_the_tools_are_console_scripts(console_script: Command, name: str) -> None:
    shown = console_script(name, "--help")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"usage: {name} ")


def test_evaluate_finds_the_configuration(console_script: Command, tmp_path: Path) -> None:
    trained = console_script("sskd-teacher", "dataset=digits", "arch=resnet8", *SMALL[1:3])
    assert trained.returncode == 0, trained.stderr
    (result,) = tmp_path.glob("runs/digits/scratch/resnet8/*/result.json")
    measured = console_script("sskd-evaluate", str(result.parent), "--repeats", "0")
    assert measured.returncode == 0, measured.stderr
    assert "resnet8, digits test set: top-1 " in measured.stdout
