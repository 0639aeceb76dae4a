"""What W&B receives, read back from an offline run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import wandb
from conftest import Compose, plan_of
from crashes import CrashError, at_step, crash
from faults import SMALL
from PIL import Image
from starting import run

import sskd.tracking.session
import sskd.tracking.tracker
from sskd.config import Config
from sskd.errors import UserError
from sskd.runs.run import Run
from sskd.runs.status import read_status
from sskd.runs.weightings import RECIPE
from sskd.tracking.session import choose_mode, run_id
from sskd.tracking.tracker import Tracker
from sskd.train import train
from sskd.training.signals import Interrupted


def inspect(path: Path, *options: str) -> list[dict[str, Any]]:
    """Return the JSON objects that ``wandb leet inspect`` prints of an offline run."""
    found = run("-m", "wandb", "leet", "inspect", "--json", *options, str(path))
    assert found.returncode == 0, found.stderr
    text = found.stdout.strip()
    return [json.loads(text)] if options else [json.loads(line) for line in text.splitlines()]


def offline_runs(runs: Path) -> list[Path]:
    return sorted(runs.rglob("offline-run-*/*.wandb"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")


def history(path: Path) -> list[dict[str, Any]]:
    """Return the logged steps in order, each with its metrics by name."""
    return [record["history"]["item"] for record in inspect(path) if record["type"] == "history"]


@pytest.mark.usefixtures("offline")
def test_a_run_without_a_login_is_complete_on_disk(
    composed: Compose, tmp_path: Path, capsys: Any
) -> None:
    arguments = [item for item in SMALL if not item.startswith("arch@student")]
    config = composed(*arguments, "method=sskd", "arch@student=resnet8", "wandb.tags=[table]")
    result = train(config)
    assert "no login" in capsys.readouterr().out
    paths = offline_runs(tmp_path / "runs")
    assert len(paths) == 2  # the teacher's and the student's
    student = next(path for path in paths if "/distill/" in str(path))
    (about,) = (r["run"] for r in inspect(student) if r["type"] == "run")
    assert about["run_group"] == "resnet14-resnet8/sskd"
    assert about["job_type"] == "student"
    assert about["tags"] == ["digits", "table"]
    folder = student.parents[2]
    assert about["display_name"] == str(folder.relative_to(tmp_path / "runs"))
    assert about["run_id"] == (folder / "wandb_id").read_text()

    (summary,) = inspect(student, "--summary")
    assert summary["config"]["method"]["weights"] == {"ce": 0.1, "kd": 0.9, "tf": 2.7, "ss": 10}
    shown = summary["summary"]
    assert shown["last/top1"] == pytest.approx(result.top1.last)
    assert shown["best/top1"] == pytest.approx(result.top1.best)
    assert shown["agreement"] == pytest.approx(result.agreement)
    assert shown["hours"] == pytest.approx((result.seconds or 0) / 3600)
    assert shown["peak_memory_mib"] == pytest.approx(result.peak_memory_mib)
    assert shown["views"]["_type"] == "image-file"

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    steps = [step for step in history(student) if step["_step"] > 0]
    assert [step["_step"] for step in steps] == [1, 2, 3, 4]
    assert steps[0]["ss_head/loss/contrast"] == pytest.approx(lines[0]["loss/contrast"])
    for step, line in zip(steps[1:], lines[1:], strict=True):
        for name in ("loss", "loss/tf", "weighted/tf", "lr", "images_per_second", "top1"):
            assert step[f"distill/{name}"] == pytest.approx(line[name]), name
        assert step["test/top1"] == pytest.approx(line["test/top1"])
    assert list(student.parent.rglob("*.png"))


def reported(config: Config, digest: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what W&B receives of a run of ``config``, and the configuration on disk."""
    plan = plan_of(config, digest)
    run = Run(plan.folder, plan.full_config)
    with run.open(), Tracker(run, plan):
        pass
    (path,) = offline_runs(run.folder)
    (about,) = (record["run"] for record in inspect(path) if record["type"] == "run")
    return about, dict(run.config)


@pytest.mark.usefixtures("offline")
def test_only_seeds_share_a_group_and_a_variant(composed: Compose) -> None:
    def names(*overrides: str, digest: str | None = None) -> tuple[str, str, str]:
        about, _ = reported(composed("arch@teacher=vgg13", *overrides), digest)
        config = about["config"]["update"]
        return about["run_group"], config["pair"], config["variant"]

    vgg8 = "arch@student=vgg8"
    plain = names(vgg8, "method=kd")
    assert plain == ("vgg13-vgg8/kd", "vgg13-vgg8", "kd")
    assert names(vgg8, "method=kd", "seed=1") == plain
    warmer = names(vgg8, "method=kd", "method.temperature=2")
    assert warmer == (*plain[:2], "kd (method.temperature=2.0)")
    elsewhere = names(vgg8, "method=kd", "teacher.checkpoint=FILE", digest="0123456789abcdef")
    assert elsewhere == (*plain[:2], "kd (teacher.digest='01234567')")
    assert names(vgg8, "method=vanilla") == ("vgg8/vanilla", "vgg8", "vanilla")


def variant(config: Config) -> tuple[str, str]:
    """Return the variant and the digest of the data that W&B receives, without starting W&B."""
    plan = plan_of(config)
    return sskd.tracking.tracker._variant(plan), plan.data_digest or ""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["weighting=crd_benchmark"], "at (weighting=crd_benchmark)"),
        (["weighting=common", "teacher.epoch=last"], "at (teacher.epoch=last, weighting=common)"),
        (["method.weights.ce=1", "method.weights.kd=1"], "at (weighting=common)"),
        (["method.weights.kd=0"], "at (method.weights.ce=0.1, method.weights.kd=0.0)"),
        (["method.weights.kd=0.5"], "at (method.weights.ce=0.1, method.weights.kd=0.5)"),
        (["weighting=sskd"], "at (weighting=sskd)"),
        ([], "at (weighting=sskd)"),
        (["method=ab"], "ab (weighting=sskd)"),
        (["method=nst", "seed=3"], "nst (weighting=sskd)"),
        (["method.weights.ce=1"], "at (method.weights.ce=1.0, method.weights.kd=0.9)"),
        (["method=kd"], "kd"),
        (["method=sskd"], "sskd"),
    ],
)
def test_the_variant_names_the_weighting(
    composed: Compose, overrides: list[str], expected: str
) -> None:
    config = composed("arch@teacher=vgg13", "arch@student=vgg8", "method=at", *overrides)
    assert variant(config)[0] == expected


def test_datasets_of_the_same_name_are_two_variants(composed: Compose, tmp_path: Path) -> None:
    variants = set()
    for number in range(2):
        root = tmp_path / str(number) / "mine"
        for part in ("train", "test"):
            image = root / part / "one" / "a.png"
            image.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32 + number)).save(image)
        data = ("dataset=folder", f"dataset.root={root}")
        found, digest = variant(composed(*data, "method=vanilla"))
        assert found.replace("'", "") == f"vanilla (dataset.digest={digest[:8]})"
        variants.add(found)
    assert len(variants) == 2


@pytest.mark.usefixtures("offline")
def test_wandb_receives_three_values_beside_config_yaml(composed: Compose) -> None:
    about, on_disk = reported(composed("method=vanilla"))
    assert about["config"]["update"].keys() - on_disk.keys() == {
        *("_wandb", "pair", "variant", "recipe"),
    }
    assert about["config"]["update"]["recipe"] == RECIPE


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("stopped", [True, False])
def test_only_a_stopped_run_is_marked_as_preempting(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM) if stopped else crash())
    with pytest.raises(Interrupted if stopped else CrashError):
        train(composed(*SMALL, "method=vanilla"))
    (path,) = offline_runs(tmp_path / "runs")
    ends = [record for record in inspect(path) if record["type"] in ("preempting", "exit")]
    assert [end["type"] for end in ends] == (["preempting"] if stopped else []) + ["exit"]
    assert ends[-1]["exit"]["exit_code"] == 1


@pytest.mark.usefixtures("offline")
def test_a_resumed_run_keeps_its_id(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*SMALL, "method=vanilla", "checkpoint_minutes=1e-9")
    with monkeypatch.context() as patch:
        at_step(patch, 7, crash)
        with pytest.raises(CrashError):
            train(config)
    train(config)
    assert len({path.stem for path in offline_runs(tmp_path / "runs")}) == 1
    train(composed(*SMALL, "method=vanilla", "force=true"))
    assert len({path.stem for path in offline_runs(tmp_path / "runs")}) == 2


@pytest.mark.usefixtures("offline")
def test_a_run_that_stopped_with_wandb_resumes_complete(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM sends SIGTERM to all processes of a job, also to the one of W&B."""

    def stop_all() -> None:
        subprocess.run(["pkill", "-P", str(os.getpid()), "wandb-core"], check=True)
        os.kill(os.getpid(), signal.SIGTERM)

    config = composed(*SMALL, "method=vanilla")
    steps_an_epoch = 5  # 40 images in batches of 9
    with monkeypatch.context() as patch:
        at_step(patch, 2 * steps_an_epoch, stop_all)  # before the metrics of the second epoch
        with pytest.raises(Interrupted):
            train(config)
    (metrics,) = (tmp_path / "runs").rglob("metrics.jsonl")
    assert len(metrics.read_text().splitlines()) == 2
    train(config)
    resumed = offline_runs(tmp_path / "runs")[-1]
    assert [step["_step"] for step in history(resumed)] == [0, 1, 2, 3]


def test_ids_belong_to_their_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = run_id(tmp_path / "a", "cifar100/scratch/vgg8/seed0")
    assert first == run_id(tmp_path / "a", "cifar100/scratch/vgg8/seed0")
    assert first != run_id(tmp_path / "b", "cifar100/scratch/vgg8/seed0")


@pytest.mark.parametrize("content", [b"../../elsewhere", b"", b"\xff", b"0123456789abcdef\n/x"])
def test_a_malformed_id_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wandb_id").write_bytes(content)
    created = run_id(tmp_path, "cifar100/scratch/vgg8/seed0")
    assert re.fullmatch("[0-9a-f]{16}", created)
    assert (tmp_path / "wandb_id").read_text() == created


def test_the_mode_is_from_settings_environment_or_login(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts: list[bool] = []
    answers: list[bool] = []

    def login(prompt: bool, verify: bool = True) -> bool:
        prompts.append(prompt)
        return answers[-1]

    monkeypatch.setattr(wandb, "login", login)
    monkeypatch.setattr(sskd.tracking.session, "_require_answer", lambda url: None)
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert choose_mode("auto") == "dryrun"
    assert choose_mode("disabled") == "disabled"
    for logged_in, mode in ((True, "online"), (False, "offline")):
        answers.append(logged_in)
        monkeypatch.setenv("WANDB_MODE", "online")
        assert choose_mode("auto") == mode
        assert choose_mode("online") == mode
        monkeypatch.delenv("WANDB_MODE")
        assert choose_mode("auto") == mode
    assert prompts
    assert not any(prompts)  # W&B must never prompt the user


def test_with_an_invalid_key_the_run_is_offline(tmp_path: Path) -> None:
    environment = os.environ | {"WANDB_API_KEY": "abc", "WANDB_MODE": "online"}
    words = ("arch=resnet8", "dataset=digits", "dataset.fraction=0.05", "schedule.epochs=1")
    found = run("train_teacher.py", *words, f"runs={tmp_path / 'runs'}", env=environment)
    assert found.returncode == 0, found.stderr
    assert "W&B cannot be used online (WANDB_API_KEY invalid" in found.stdout
    assert found.stderr == ""
    assert len(offline_runs(tmp_path / "runs")) == 1


def test_without_a_connection_the_run_is_offline(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    original = wandb.init

    def unreachable(**arguments: Any) -> Any:
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("no route to host")
        return original(**arguments)

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setattr(wandb, "login", lambda prompt, verify=True: True)
    monkeypatch.setattr(sskd.tracking.session, "_require_answer", lambda url: None)
    train(composed(*SMALL, "method=vanilla", "wandb.mode=online"))
    assert "W&B cannot be used online (no route to host)" in capsys.readouterr().out
    assert len(offline_runs(tmp_path / "runs")) == 1


def test_a_failure_of_wandb_does_not_fail_the_run(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The process of W&B dies and cannot be started again."""
    monkeypatch.delenv("WANDB_MODE")
    open_run = sskd.tracking.tracker.open_run

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("closed")

    def open_once(mode: str, *arguments: Any, **keywords: Any) -> wandb.Run:
        run = open_run(mode, *arguments, **keywords)
        monkeypatch.setattr(run, "log", fail)
        monkeypatch.setattr(sskd.tracking.tracker, "open_run", fail)
        return run

    monkeypatch.setattr(sskd.tracking.tracker, "open_run", open_once)
    train(composed(*SMALL, "method=vanilla"))
    output = capsys.readouterr().out
    assert output.count("W&B has stopped (ConnectionResetError)") == 2
    assert "W&B: this run could not be saved for a later upload" in output
    (folder,) = (path.parent for path in (tmp_path / "runs").rglob("result.json"))
    assert read_status(folder).state == "finished"


def test_a_timeout_that_is_not_a_number_is_reported(composed: Compose, monkeypatch: Any) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "soon")
    with pytest.raises(UserError, match="WANDB_FINISH_TIMEOUT=soon: should be a number of sec"):
        train(composed(*SMALL, "method=vanilla"))
