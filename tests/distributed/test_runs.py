"""Runs on two ranks: what they write, and how they are killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from faults import SMALL
from many_ranks import finish, start
from safetensors.torch import load_file
from starting import ROOT

from sskd.runs.names import LAST, METRICS, RESULT, WEIGHTS
from sskd.runs.status import read_status

STUDENT = "train_student.py"
# Every step ends with a checkpoint.
JOB = (*SMALL, "batch_size=8", "teacher.fraction=0.03", "method=crd", "checkpoint_minutes=1e-9")


def folder_of(runs: Path) -> Path:
    (path,) = runs.glob("digits/distill/*/crd/*")
    return path


def weights_of(runs: Path) -> dict[str, torch.Tensor]:
    return load_file(folder_of(runs) / WEIGHTS)


def result_of(runs: Path) -> Any:
    return json.loads((folder_of(runs) / RESULT).read_text())


@pytest.fixture(scope="module")
def undivided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the runs of a job that two ranks of the real torchrun trained without a stop."""
    runs = tmp_path_factory.mktemp("torchrun") / "runs"
    torchrun = Path(sys.executable).with_name("torchrun")
    words = (STUDENT, *JOB, "wandb.mode=offline", f"runs={runs}")
    # The real command, which the tests of the ranks imitate.
    done = subprocess.run(
        [str(torchrun), "--nproc_per_node=2", *words],
        cwd=ROOT,
        env=os.environ | {"WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("distill: epoch 3/3") == 1
    return runs


def test_the_first_rank_alone_writes(undivided: Path) -> None:
    folder = folder_of(undivided)
    assert result_of(undivided)["ranks"] == 2
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert len(list(undivided.glob("digits/scratch/*/*"))) == 1  # the teacher
    assert not list(undivided.rglob("*.tmp*"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_lost_a_rank_is_resumed_by_two_and_by_one(
    how: signal.Signals, undivided: Path, command: Command, tmp_path: Path
) -> None:
    runs = tmp_path / "two"
    shutil.copytree(undivided, runs)
    shutil.rmtree(folder_of(runs))
    ranks = start(2, STUDENT, *JOB, f"runs={runs}")
    while not list(runs.glob(f"digits/distill/*/crd/*/{LAST}")) and not ranks[0].poll():
        time.sleep(0.01)
    ranks[1].send_signal(how)
    statuses = [status for status, _, _ in finish(ranks)]
    if how == signal.SIGKILL:
        # The end of rank 1 is an error in a collective of rank 0, or a signal of torchrun ends it.
        assert statuses[0] in (1, 128 + signal.SIGTERM)
        assert statuses[1] == -signal.SIGKILL
    else:
        assert statuses == [128 + how] * 2
    saved = torch.load(folder_of(runs) / LAST, weights_only=True)
    assert saved["position"]["mid_epoch"]
    assert saved["position"]["epoch"] < 3
    # The end of a rank is no failure of the run, after which a sweep would not try it again.
    assert read_status(folder_of(runs)).state in ("running", "stopped")
    shutil.copytree(runs, command.runs)

    resumed = finish(start(2, STUDENT, *JOB, f"runs={runs}"))
    assert [status for status, _, _ in resumed] == [0, 0], resumed
    assert "resumes in" in resumed[0][1]
    assert not any(resumed[1][1:])
    expected = weights_of(undivided)
    assert all(torch.equal(value, expected[k]) for k, value in weights_of(runs).items())

    status, out, err = command(*JOB)
    assert status == 0, err
    assert "resumes in" in out
    assert result_of(command.runs)["ranks"] == 1


def test_a_sweep_continues_after_a_job_that_all_ranks_refuse(
    undivided: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(undivided, runs)
    words = [word for word in JOB if not word.startswith(("method=", "arch@student="))]
    words += ["arch@student=wrn_16_2", "method=fsp,kd", "schedule.epochs=1", "teacher.epochs=3"]
    first, second = finish(start(2, STUDENT, "-m", *words, f"runs={runs}"))
    status, out, err = first
    assert status == 1, err
    assert second == (0, "", "")
    assert "1 of 2 jobs have finished" in out
    assert err.count("needs the same channels") == 2  # when it happens, and at the end
    (folder,) = runs.glob("digits/distill/resnet14-wrn_16_2/kd/*")
    assert json.loads((folder / RESULT).read_text())["ranks"] == 2
