"""Fixtures of all tests: real configurations, small data, and folders of real files."""

from __future__ import annotations

import atexit
import copy
import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import bf16_convolutions
import composing
import few_digits
import pytest
import starting
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import nn

import sskd.train
import train_student
from sskd import CONF
from sskd.checks.samples import random_images
from sskd.commands.process import run_command
from sskd.config import Config, read_config
from sskd.data import SOURCES, Images
from sskd.output import complain_once
from sskd.runs.identity import full_config
from sskd.runs.plan import RunPlan, TeacherWeights
from sskd.runs.status import SWEEP_VARIABLE
from sskd.teachers.find import missing_teacher, run_location

Compose = Callable[..., Config]

bf16_convolutions.install()
composing.install()
few_digits.install()
# More compiler processes would each import torch, while all cores run tests.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


@pytest.hookimpl(optionalhook=True)  # the plugin may be disabled
def pytest_xdist_auto_num_workers() -> int:
    """Return one process more than there are cores: some tests wait for a server or a clock."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Let each process compile a part of the test modules, and read what the others compiled.

    All processes import all test modules, in which pytest rewrites the assertions.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", False)
        worker = getattr(session.config, "workerinput", None)
        if worker and session.config.args_source is pytest.Config.ArgsSource.TESTPATHS:
            names = sorted(path.stem for path in Path(__file__).parent.glob("**/test_*.py"))
            first = int(worker["workerid"].removeprefix("gw")) * len(names)
            first //= worker["workercount"]
            for name in names[first:] + names[:first]:
                with suppress(Exception, pytest.skip.Exception):  # its collection reports it
                    import_module(name)
        return (yield)


def pytest_collection_finish() -> None:
    """Hide the modules and tests from the garbage collector, which would scan them many times."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # otherwise C++ modules report leaks at exit


@pytest.fixture(autouse=True)
def _isolate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Disable W&B and hide its login; reset the state that Hydra and sweeps leave in a process."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv(SWEEP_VARIABLE, "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    complain_once.cache_clear()
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None  # it holds this test's working directory


@pytest.fixture
def composed(tmp_path: Path) -> Compose:
    """Return a function that composes and checks the real configuration."""

    def compose_config(*overrides: str, primary: str = "student") -> Config:
        config = copy.deepcopy(compose_once(primary, *overrides))
        if not any(override.startswith("runs=") for override in overrides):
            config.runs = str(tmp_path / "runs")
        return read_config(config)

    return compose_config


@cache  # Hydra takes a tenth of a second, and many tests compose the same overrides
def compose_once(primary: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(primary, list(overrides))


@pytest.fixture(autouse=True)
def _no_sync(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk in the process of the tests, where no power failure is tested.

    The processes that tests start do sync; test_faults.py tests it.
    """
    if request.module.__name__ != "test_files":
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def all_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process read all 356 test images of the digits, of which other tests have 30."""
    monkeypatch.setitem(SOURCES, "digits", few_digits.ALL)


@pytest.fixture
def pytorchs_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the layers compute in bf16 by the kernels of PyTorch, which are slow on most CPUs."""
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", bf16_convolutions.PYTORCHS)


def plan_of(config: Config, digest: str | None = None) -> RunPlan:
    """Return the plan of a run whose teacher is a file with this ``digest``, if there is one."""
    teacher = None if digest is None else TeacherWeights(Path("teacher.pth"), digest)
    folder, difference = run_location(config, teacher)
    return RunPlan(
        config=config,
        folder=folder,
        difference=difference,
        teacher=teacher,
        full_config=full_config(config, digest),
    )


def with_rate(config: Config, rate: float) -> Config:
    """Return ``config`` with a learning rate, which may be larger than the largest allowed one."""
    optimizer = config.optimizer.model_copy(update={"lr": rate})
    return config.model_copy(update={"optimizer": optimizer})


@pytest.fixture
def few_images() -> Images:
    """Return 40 training and 20 test images of noise in 5 classes, 32x32."""
    return random_images(40, 20)


def folder_named_by(variable: str, content: str) -> Path:
    """Return the folder that an environment variable names; skip the test if it is not set."""
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set: it names a folder that holds {content}")
    return Path(os.environ[variable])


@pytest.fixture
def cifar100_root() -> Path:
    """Return the folder that holds cifar-100-python."""
    return folder_named_by("SSKD_DATA", "cifar-100-python")


@pytest.fixture
def teachers_root() -> Path:
    """Return the folder that holds resnet56_cifar100.pth."""
    return folder_named_by("SSKD_TEACHERS", "resnet56_cifar100.pth")


class Command:
    """Runs a training command in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: Any, runs: Path) -> None:
        self._monkeypatch, self._capsys, self.runs = monkeypatch, capsys, runs

    def __call__(self, *arguments: str, script: Any = train_student) -> tuple[int, str, str]:
        argv = [str(script.__file__), *arguments, f"runs={self.runs}"]
        self._monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # an earlier command may have set it
        self._monkeypatch.setattr(sys, "argv", argv)
        self._monkeypatch.chdir(CONF.parent)
        try:
            status = run_command(script.main)
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = self._capsys.readouterr()
        return status, captured.out, captured.err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Command:
    return Command(monkeypatch, capsys, tmp_path / "runs")


class KeptRuns:
    """Folders of runs that are made once for the tests of all processes, and copied."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, name: str, make: Callable[[Path], object], *folders: Path) -> None:
        """Copy what ``make`` writes to the folder that it is given; make it if it is not there."""
        kept = self._root / name
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                part = self._root / f"{name}.part"
                shutil.rmtree(part, ignore_errors=True)  # left by a test that failed
                make(part)
                part.rename(kept)
        for runs in folders:
            shutil.copytree(kept, runs)


class SmallTeacher:
    """The teacher of ``faults.SMALL``, trained once for the tests that are not about it.

    Otherwise they would spend half of their time on their teachers.
    """

    def __init__(self, kept: KeptRuns) -> None:
        self._kept = kept

    def put(self, *folders: Path) -> None:
        """Copy its finished run into folders of runs; call it before a patch of the training."""
        self._kept.put("teacher", self._train, *folders)

    def _train(self, runs: Path) -> None:
        from faults import SMALL

        words = (f"runs={runs}", *SMALL, "method=kd")
        config = missing_teacher(read_config(compose_once("student", *words)))
        assert config is not None
        sskd.train.train(config)


@pytest.fixture(scope="session")
def shared_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all processes of this session share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if hasattr(request.config, "workerinput") else folder


@pytest.fixture(scope="session", autouse=True)
def _one_fork_server(shared_folder: Path) -> None:
    starting.share_server(shared_folder)


@pytest.fixture(scope="session")
def kept_runs(shared_folder: Path) -> KeptRuns:
    root = shared_folder / "kept"
    root.mkdir(exist_ok=True)
    return KeptRuns(root)


@pytest.fixture(scope="session")
def small_teacher(kept_runs: KeptRuns) -> SmallTeacher:
    return SmallTeacher(kept_runs)


@pytest.fixture(scope="session")
def undisturbed(shared_folder: Path) -> Any:
    from breaking import Undisturbed

    root = shared_folder / "undisturbed"
    root.mkdir(exist_ok=True)
    return Undisturbed(root)
