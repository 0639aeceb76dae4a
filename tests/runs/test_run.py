"""A run from its configuration to its result: folders, resuming, seeds, reuse."""

from __future__ import annotations

import errno
import json
import os
import random
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import outcome
from conftest import Compose, SmallTeacher, with_rate
from damage import change_value
from faults import SMALL
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import sskd.files
import sskd.models.checkpoints
import sskd.runs.checkpoint_file
import sskd.runs.status
import sskd.teachers.assembly
import sskd.tracking.tracker
import sskd.training.preview
import sskd.training.trainer
from sskd.config import Config
from sskd.data import Images, eval_batches, load_images
from sskd.errors import UserError
from sskd.methods import METHODS, build_method
from sskd.models import build_model, load_weights, weights_digest
from sskd.runs.checkpoint_file import load_checkpoint, save_checkpoint
from sskd.runs.checkpoints import Checkpoints
from sskd.runs.folder import run_folder
from sskd.runs.metrics_log import MetricsLog
from sskd.runs.plan import TeacherWeights
from sskd.runs.recipe import diff_from_recipe, teacher_config, training_command
from sskd.runs.run import Run
from sskd.runs.status import SWEEP_VARIABLE, forced_in_this_sweep, read_status
from sskd.teachers.assembly import assemble
from sskd.teachers.find import run_location
from sskd.teachers.phases import phase_settings
from sskd.train import train
from sskd.training.progress import Progress
from sskd.training.signals import Interrupted, StopSignals
from sskd.training.state import PhaseCheckpoint

CHANGES = 25
TEACHER_STEPS = 3  # 40 images in a batch of the recipe's 64, three times


class CrashError(Exception):
    """Stands for whatever ends a process without a word."""


def at_step(
    monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]
) -> Callable[[], int]:
    """Do ``action`` after the ``number``-th training step from now; return a counter of steps."""
    original, count = Progress.advance, 0

    def advance(self: Progress, images: int) -> None:
        nonlocal count
        original(self, images)
        count += 1
        if count == number:
            action()

    monkeypatch.setattr(Progress, "advance", advance)
    return lambda: count


def crash() -> None:
    raise CrashError


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_anywhere_ends_like_an_undisturbed_one(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str,
    small_teacher: SmallTeacher,
) -> None:  # fmt: skip
    """KD's teacher is stopped too; it is the same run with every other method."""
    if method not in ("vanilla", "kd"):
        small_teacher.put(tmp_path / "whole", tmp_path / "broken")
    whole = composed(*SMALL, f"method={method}", f"runs={tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        steps = at_step(patch, -1, crash)
        train(whole)
    expected = outcome(tmp_path / "whole")
    assert len(expected) >= 4
    (weights,) = tmp_path.glob("whole/digits/*/*resnet8/**/model.safetensors")
    assert set(load_file(weights)) == set(build_model("resnet8", 10).state_dict())

    # A checkpoint after every step, and a crash every few steps, in every stage.
    broken = composed(
        *SMALL, f"method={method}", f"runs={tmp_path / 'broken'}", "checkpoint_minutes=1e-9"
    )
    crashes = 0
    while True:
        with monkeypatch.context() as patch:
            at_step(patch, 4, crash)
            try:
                train(broken)
                break
            except CrashError:
                crashes += 1
    assert crashes >= steps() // 4
    assert outcome(tmp_path / "broken") == expected


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_stops(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    train(composed(*SMALL, "method=vanilla", f"runs={tmp_path / 'whole'}"))
    stopped = composed(*SMALL, "method=vanilla", f"runs={tmp_path / 'stopped'}")
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signum))
        with pytest.raises(Interrupted) as stop:
            train(stopped)
    assert stop.value.signum == signum
    (saved,) = (tmp_path / "stopped").rglob("last.pt")
    assert torch.load(saved, weights_only=True)["loader"]["position"] == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(stopped)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_a_seed_gives_the_same_result_again_and_another_seed_another(
    composed: Compose, tmp_path: Path
) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train(composed(*SMALL, "method=vanilla", f"runs={tmp_path / name}", f"seed={seed}"))
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")
    (first,), (other,) = ((tmp_path / n).rglob("model.safetensors") for n in ("one", "three"))
    assert not torch.equal(load_file(first)["fc.weight"], load_file(other)["fc.weight"])


@pytest.mark.parametrize(("method", "phase"), [("sskd", "ss_head"), ("ft", "paraphraser")])
def test_a_first_phase_is_computed_once_and_shifts_nothing(
    composed: Compose, tmp_path: Path, method: str, phase: str, capsys: Any,
    small_teacher: SmallTeacher,
) -> None:  # fmt: skip
    small_teacher.put(tmp_path / "alone", tmp_path / "second")
    alone, second = f"runs={tmp_path / 'alone'}", f"runs={tmp_path / 'second'}"
    train(composed(*SMALL, f"method={method}", alone))
    train(composed(*SMALL, f"method={method}", second, "arch@student=wrn_16_1"))
    capsys.readouterr()
    train(composed(*SMALL, f"method={method}", second))
    assert f"{phase}/seed0" in capsys.readouterr().out.split(": reused")[0]
    assert len(list((tmp_path / "second").rglob("phases/*/*/*/result.json"))) == 1
    expected = outcome(tmp_path / "alone")
    found = {
        name: value for name, value in outcome(tmp_path / "second").items() if name in expected
    }
    assert found == expected


@pytest.mark.parametrize(
    ("method", "phase", "term"),
    [("ab", "boundary", "ab"), ("ft", "paraphraser", "reconstruction"), ("fsp", "flow", "fsp")],
)
def test_a_first_phase_is_told_under_its_own_name(
    composed: Compose, tmp_path: Path, method: str, phase: str, term: str,
    small_teacher: SmallTeacher,
) -> None:  # fmt: skip
    small_teacher.put(tmp_path / "runs")
    more = ("dataset.fraction=0.05", "batch_size=16")  # else each loss is mostly chance
    train(composed(*SMALL, *more, f"method={method}", f"method.{phase}.epochs=0.67"))
    (path,) = tmp_path.glob(f"runs/digits/distill/*/{method}/*/metrics.jsonl")
    lines = [json.loads(line) for line in path.open()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [
        (phase, 1), (phase, 2), ("distill", 1), ("distill", 2), ("distill", 3),
    ]  # fmt: skip
    first, second = lines[:2]
    assert second[f"loss/{term}"] < first[f"loss/{term}"]
    assert first["loss"] == pytest.approx(first[f"loss/{term}"], rel=1e-6)
    assert not any(key.startswith("test/") for key in first)


def test_a_shared_phase_is_told_apart_by_all_that_it_depends_on(
    composed: Compose, few_images: Images
) -> None:
    def settings(*overrides: str) -> dict[str, Any]:
        usual = ("method=ft", "dataset=digits", "arch@teacher=resnet14", "arch@student=resnet8")
        config = composed(*usual, *overrides)
        stage, _ = assemble(config, few_images).phases()
        return phase_settings(stage, config, TeacherWeights(Path("teacher.pt"), "digest"))

    usual = settings()
    for change in ("arch@student=wrn_16_1", "method.weights.ft=1", "method.temperature=2"):
        assert settings(change) == usual, change
    for change in ("method.rate=0.25", "method.paraphraser.lr=0.02", "arch@student=vgg8", "seed=1",
                   "method.paraphraser.epochs=0.5", "batch_size=32", "precision=bf16",
                   "optimizer.momentum=0", "dataset.fraction=0.5"):  # fmt: skip
        assert settings(change) != usual, change


def test_banks_are_as_large_as_the_part_of_the_data(composed: Compose, tmp_path: Path) -> None:
    """Of 40 images, of which some have wrong labels: each has been met, so each row is a unit."""
    train(composed(*SMALL, "method=crd", "dataset.label_noise=0.3"))
    (path,) = tmp_path.glob("runs/digits/distill/*/crd/*/last.pt")
    module = torch.load(path, weights_only=True)["module"]
    for bank in ("student_memory.bank", "teacher_memory.bank"):
        assert module[bank].shape == (40, 128)
        torch.testing.assert_close(module[bank].norm(dim=1), torch.ones(40))


def test_the_method_is_made_with_the_teacher_that_was_found(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def build(settings: Any, student: nn.Module, teacher: nn.Module | None, data: Images) -> Any:
        seen.append(weights_digest(teacher) if teacher else None)
        return build_method(settings, student, teacher, data)

    monkeypatch.setattr(sskd.teachers.assembly, "build_method", build)
    train(composed(*SMALL, "method=kd"))
    (path,) = tmp_path.glob("runs/digits/scratch/resnet14/*/result.json")
    assert seen[-1] == json.loads(path.read_text())["digest"]["best"]


def test_a_run_from_before_a_rate_of_its_own_is_still_this_run(
    composed: Compose, tmp_path: Path
) -> None:
    config = composed(*SMALL, "method=kd")
    result = train(config)
    (folder,) = tmp_path.glob("runs/digits/distill/*/kd/*")
    kept = (folder / "config.yaml").read_text()
    text = "".join(line for line in kept.splitlines(True) if "paraphraser_lr" not in line)
    assert text != kept
    (folder / "config.yaml").write_text(text)
    assert train(config) == result
    assert folder_of(composed(*SMALL, "method=kd", "student.paraphraser_lr=0.5")) == folder_of(
        config
    )


def test_a_students_metrics_begin_with_its_first_phase(composed: Compose, tmp_path: Path) -> None:
    config = composed(*SMALL, "method=sskd")
    train(config)
    (path,) = (tmp_path / "runs/digits/distill").rglob("metrics.jsonl")
    lines = [json.loads(line) for line in path.open()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [
        ("ss_head", 1), ("distill", 1), ("distill", 2), ("distill", 3),
    ]  # fmt: skip
    for line in lines[1:]:
        weighted = {"ce": 0.1, "kd": 0.9, "tf": 2.7, "ss": 10.0}
        for term, weight in weighted.items():
            assert line[f"weighted/{term}"] == pytest.approx(
                weight * line[f"loss/{term}"], rel=1e-5
            )
        total = sum(line[f"weighted/{term}"] for term in weighted)
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_the_result_tells_what_can_be_measured_again(composed: Compose, tmp_path: Path) -> None:
    config = composed(*SMALL, "method=kd", "dataset.holdout=0.2")
    result = train(config)
    (folder,) = (path.parent for path in (tmp_path / "runs/digits/distill").rglob("result.json"))
    images = load_images(config.dataset)
    student, teacher = build_model("resnet8", 10), build_model("resnet14", 10)
    load_weights(student, folder / "model.safetensors")
    (best,) = (tmp_path / "runs/digits/scratch/resnet14").rglob("best.pt")
    load_weights(teacher, best)
    right = same = 0
    divergence = 0.0
    with torch.no_grad():
        for x, y in eval_batches(images.test, images.mean, images.std, 1):
            s = student.eval()(x).logits[0].double().softmax(0)
            t = teacher.eval()(x).logits[0].double().softmax(0)
            right += int(s.argmax() == y[0])
            same += int(s.argmax() == t.argmax())
            divergence += (t * (t / s).log()).sum().item()
    count = len(images.test)
    assert result.top1.last == pytest.approx(100 * right / count)
    assert result.agreement == pytest.approx(100 * same / count)
    assert result.kl == pytest.approx(divergence / count, rel=1e-3)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert result.top1.best == max(line["test/top1"] for line in metrics)
    assert result.holdout_top1 is not None
    assert result.holdout_top1.best == max(line["holdout/top1"] for line in metrics)
    assert result.parameters == sum(p.numel() for p in student.parameters())


def test_a_finished_run_is_passed_by(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed(*SMALL, "method=vanilla")
    first = train(config)
    steps = at_step(monkeypatch, -1, crash)
    assert train(config) == first
    assert steps() == 0


def test_force_starts_afresh_and_keeps_the_old_run(composed: Compose, tmp_path: Path) -> None:
    config = composed(*SMALL, "method=vanilla")
    train(config)
    before = outcome(tmp_path / "runs")
    train(composed(*SMALL, "method=vanilla", "force=true"))
    train(composed(*SMALL, "method=vanilla", "force=true"))
    after = outcome(tmp_path / "runs")
    assert len(after) == 3 * len(before)
    assert sorted({path.split("/")[-2][-2:] for path in after if ".old" in path}) == ["-1", "-2"]


def test_a_run_is_begun_afresh_once_by_each_sweep(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of two sweeps that come back in turns do not put each other's progress aside."""
    config = composed(*SMALL, "method=vanilla", "force=true", "schedule.epochs=1")
    folder, _ = run_location(config)
    for count, sweep in ((0, "one"), (1, "two"), (1, "one"), (1, "two")):
        monkeypatch.setenv(SWEEP_VARIABLE, sweep)
        train(config)
        assert len(list(folder.parent.glob(".old/*"))) == count

    def stale(*_: Any, **__: Any) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(sskd.runs.status, "read_bounded_text", stale)
    with pytest.raises(OSError, match="Stale"):
        forced_in_this_sweep(folder)


def test_a_signal_after_the_result_leaves_a_run_finished(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while W&B's server is waited for."""

    def stop(*_: Any) -> None:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(sskd.tracking.tracker.Tracker, "__exit__", stop)
    with pytest.raises(Interrupted):
        train(composed(*SMALL, "method=vanilla", "schedule.epochs=1"))
    (folder,) = (path.parent for path in (tmp_path / "runs").rglob("result.json"))
    assert read_status(folder)["state"] == "finished"


def test_a_file_that_goes_while_a_run_opens_is_no_pipe(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of another process that tried to take the same folder."""
    listed = Path.iterdir

    def and_one_more(path: Path) -> Any:
        yield path / ".lease.break.1.2"
        yield from listed(path)

    monkeypatch.setattr(Path, "iterdir", and_one_more)
    train(composed(*SMALL, "method=vanilla", "schedule.epochs=1"))


def test_a_folder_of_another_configuration_is_refused_by_key(
    composed: Compose, tmp_path: Path
) -> None:
    config = composed(*SMALL, "method=vanilla")
    train(config)
    (path,) = (tmp_path / "runs").rglob("config.yaml")
    path.write_text(path.read_text().replace("momentum: 0.9", "momentum: 0.8"))
    with pytest.raises(UserError, match=r"optimizer\.momentum \(0\.8 there, 0\.9 here\)"):
        train(config)


def test_a_retrained_teacher_makes_another_student(composed: Compose, tmp_path: Path) -> None:
    train(composed(*SMALL, "method=kd"))
    (path,) = (tmp_path / "runs/digits/scratch/resnet14").rglob("result.json")
    result = json.loads(path.read_text())
    result["digest"]["best"] = "0" * 64
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"teacher\.digest"):
        train(composed(*SMALL, "method=kd"))


def test_runs_below_the_home_folder(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(composed(*SMALL, "method=vanilla", "runs='~/mine'"))  # HOME is the test's own folder
    assert len(list((tmp_path / "mine").rglob("result.json"))) == 1
    assert not (tmp_path / "~").exists()


def test_a_second_interrupt_does_not_wait() -> None:
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_only_one_process_works_on_a_run(composed: Compose, tmp_path: Path) -> None:
    config = composed(*SMALL, "method=vanilla")
    folder = run_folder(config, diff_from_recipe(config))
    with (
        Run(folder, config.model_dump()).open(),
        pytest.raises(UserError, match="another process"),
    ):
        Run(folder, config.model_dump()).open()


def test_a_loss_that_is_not_finite_stops_the_run(composed: Compose, tmp_path: Path) -> None:
    config = with_rate(composed(*SMALL, "method=vanilla"), 1e30)
    with pytest.raises(UserError, match=r"phase train, epoch \d: the term 'ce' is not finite"):
        train(config)
    assert not list((tmp_path / "runs").rglob("result.json"))


def test_a_crash_at_any_write_loses_nothing(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crash before the n-th write or line, then at the n+1-th of the next start, and so on."""
    arguments = [*SMALL, "schedule.epochs=2", "method=sskd"]
    train(composed(*arguments, f"runs={tmp_path / 'whole'}"))
    left = 0

    def count(write: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise CrashError
            return write(*given, **named)

        return counted

    for module in (
        sskd.files,
        sskd.runs.checkpoint_file,
        sskd.training.preview,
        sskd.models.checkpoints,
    ):
        monkeypatch.setattr(module, "write_atomically", count(sskd.files.write_atomically))
    monkeypatch.setattr(MetricsLog, "log", count(MetricsLog.log))
    broken = composed(*arguments, f"runs={tmp_path / 'broken'}")
    crashes = 0
    while True:
        left = crashes + 1
        try:
            train(broken)
            break
        except CrashError:
            crashes += 1
    assert crashes > 10
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_a_line_whose_checkpoint_was_lost_is_not_told_twice(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(composed(*SMALL, "method=vanilla", f"runs={tmp_path / 'whole'}"))
    broken = composed(*SMALL, "method=vanilla", f"runs={tmp_path / 'broken'}")
    original = Checkpoints.save
    with monkeypatch.context() as patch:
        calls = iter([original, lambda *_: crash()])
        patch.setattr(Checkpoints, "save", lambda self, state: next(calls)(self, state))
        with pytest.raises(CrashError):
            train(broken)
    (path,) = (tmp_path / "broken").rglob("metrics.jsonl")
    assert len(path.read_text().splitlines()) == 2  # the checkpoint knows of one
    train(broken)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_a_lost_best_epoch_is_made_up_for(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies between the checkpoint that tells of a best epoch and its weights."""
    config = composed(*SMALL, "method=vanilla")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_best", lambda *_: crash())
        with pytest.raises(CrashError):
            train(config)
    (last,) = (tmp_path / "runs").rglob("last.pt")
    assert not (last.parent / "best.pt").exists()
    first_epoch = torch.load(last, weights_only=True)["model"]
    with monkeypatch.context() as patch:
        at_step(patch, 1, crash)
        with pytest.raises(CrashError):
            train(config)
    best = torch.load(last.parent / "best.pt", weights_only=True)
    assert best["epoch"] == 1
    assert all(torch.equal(best["model"][name], value) for name, value in first_epoch.items())


Stopped = Callable[..., tuple[Config, Path]]


@pytest.fixture
def stopped(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_teacher: SmallTeacher
) -> Stopped:
    """Return a function that stops SSKD in the second epoch of its head phase, a shared run."""

    def stop(*words: str) -> tuple[Config, Path]:
        small_teacher.put(tmp_path / "runs")
        config = composed(*SMALL, "method=sskd", "method.ss_head.epochs=0.7", *words)
        with monkeypatch.context() as patch:
            at_step(patch, 5 + 2, crash)
            with pytest.raises(CrashError):
                train(config)
        folders = (tmp_path / "runs").glob("digits/phases/*/*/*/last.pt")
        (folder,) = (path.parent for path in folders)
        return config, folder

    return stop


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "foreign", "removed"])
def test_where_the_last_checkpoint_is_damaged_the_one_before_it_serves(
    composed: Compose, tmp_path: Path, capsys: Any, damage: str, stopped: Stopped,
    small_teacher: SmallTeacher,
) -> None:  # fmt: skip
    small_teacher.put(tmp_path / "whole")
    train(
        composed(*SMALL, "method=sskd", "method.ss_head.epochs=0.7", f"runs={tmp_path / 'whole'}")
    )
    config, folder = stopped("checkpoint_minutes=1e-9")
    last, whole = folder / "last.pt", (folder / "last.pt").read_bytes()
    middle = len(whole) // 2
    if damage == "removed":  # between the two renames
        last.unlink()
    elif damage == "foreign":
        torch.save({"some": "thing"}, last)
    else:
        changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        last.write_bytes({"cut": whole[:-500], "changed": changed, "empty": b""}[damage])
    capsys.readouterr()
    train(config)
    told = capsys.readouterr().err
    warned = f"warning: {folder}: last.pt is corrupt: " in told
    assert warned == (damage != "removed")
    if damage == "changed":
        assert "the checksum of " in told or "cannot be read" in told
    assert not list((tmp_path / "runs").rglob("previous.pt"))  # nothing goes on from it any more
    assert outcome(tmp_path / "runs") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["both", "metrics", "a line short"])
def test_a_damaged_run_is_named_with_the_folder_to_remove(stopped: Stopped, damage: str) -> None:
    """Also where it is the first phase that is damaged, which force=true would not reach."""
    config, folder = stopped("checkpoint_minutes=1e-9")
    metrics = folder / "metrics.jsonl"
    if damage == "both":
        for name in ("last.pt", "previous.pt"):
            (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    elif damage == "metrics":
        metrics.write_text(metrics.read_text().replace("0.", "1."))
    else:
        metrics.write_text("")
    name = "last.pt" if damage == "both" else "metrics.jsonl"
    with pytest.raises(UserError, match=rf"{folder}: {name} is corrupt: .*; restore the file"):
        train(config)
    shutil.rmtree(folder)
    train(config)


def test_a_best_epoch_whose_weights_are_damaged_costs_no_result(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(PhaseCheckpoint, "save_if_best", lambda self: damage_best(self.run.folder))
    with pytest.raises(UserError, match=r"no digest of the best epoch's weights; .*teacher\.epoch"):
        train(composed(*SMALL, "method=kd"))
    assert "the best, are lost: best.pt is corrupt: it cannot" in capsys.readouterr().err
    (path,) = (tmp_path / "runs").rglob("result.json")
    digest = json.loads(path.read_text())["digest"]
    assert digest["best"] is None
    assert train(composed(*SMALL, "method=kd", "teacher.epoch=last")).teacher_top1


@pytest.mark.parametrize(
    ("content", "how"),
    [({"epoch": 2, "model": {}}, "it is of epoch 2"), ({"epoch": 3}, "it has no weights")],
)
def test_another_epochs_weights_are_not_taken_for_the_best(
    tmp_path: Path, capsys: Any, content: dict[str, Any], how: str
) -> None:
    save_checkpoint(tmp_path / "best.pt", content)
    assert Run(tmp_path, {}).checkpoints.load_best(3) is None
    assert f"of epoch 3, the best, are lost: best.pt is corrupt: {how}" in capsys.readouterr().err


def damage_best(folder: Path) -> None:
    (folder / "best.pt").write_bytes(b"PK")


def test_a_shared_phase_that_is_damaged_is_named(composed: Compose, tmp_path: Path) -> None:
    train(composed(*SMALL, "method=sskd"))
    (path,) = (tmp_path / "runs").glob("digits/phases/*/*/*/model.safetensors")
    whole = path.read_bytes()
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:100]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path}: is corrupt; delete the folder"):
            train(composed(*SMALL, "method=sskd", "method.weights.tf=1"))
    path.write_bytes(whole)
    for text in ("{", "[1]\n", '{"stage": 3}\n'):
        path.with_name("metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match=rf"{path.parent}: metrics.jsonl is corrupt: .*; del"):
            train(composed(*SMALL, "method=sskd", "method.weights.tf=1"))


@pytest.mark.parametrize(
    "content",
    [
        {"position": {"era": 1}},
        {"position": {"epoch": "a"}},
        {"position": 3},
        {"module": {}},
        {"loader": {"position": 10**6}},
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    stopped: Stopped, content: dict[str, Any]
) -> None:
    config, folder = stopped("checkpoint_minutes=1e-9")
    state = load_checkpoint(folder / "last.pt")
    assert state["position"]["mid_epoch"]
    if "loader" in content:
        content = {"loader": {**state["loader"], **content["loader"]}}
    save_checkpoint(folder / "last.pt", {**state, **content})
    with pytest.raises(UserError, match=rf"{folder}: its checkpoint is not one of this run"):
        train(config)


def test_a_checkpoint_changed_anywhere_is_refused_in_a_line_or_goes_on(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By somebody who seals it again; what it says may be nonsense, but runs into nothing."""
    config = composed(*SMALL, "method=kd", "checkpoint_minutes=1e-9")
    with monkeypatch.context() as patch:
        at_step(patch, TEACHER_STEPS + 7, crash)
        with pytest.raises(CrashError):
            train(config)
    (folder,) = (path.parent for path in (tmp_path / "runs").rglob("previous.pt"))
    shutil.copytree(folder, tmp_path / "whole")
    state, told = load_checkpoint(folder / "last.pt"), ""
    for number in range(CHANGES):
        chance = random.Random(number)
        key = chance.choice(list(state))
        save_checkpoint(folder / "last.pt", {**state, key: change_value(state[key], chance)})
        try:
            train(config)
        except UserError as error:
            told += f"{error}\n"
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "whole", folder)
    assert 0 < told.count("\n") < CHANGES
    assert all(line.isprintable() for line in told.splitlines())


@pytest.mark.parametrize("stage", [[1], {"a": 1}, 3, "elsewhere"])
def test_a_checkpoint_of_no_stage_is_damaged(stopped: Stopped, capsys: Any, stage: Any) -> None:
    config, folder = stopped("checkpoint_minutes=1e-9")
    save_checkpoint(folder / "last.pt", {**load_checkpoint(folder / "last.pt"), "stage": stage})
    train(config)
    assert f"warning: {folder}: last.pt is corrupt: it belongs to phase" in capsys.readouterr().err
    assert load_checkpoint(folder / "damaged.pt")["stage"] == stage


def test_a_run_keeps_its_files_in_its_own_folder(stopped: Stopped, tmp_path: Path) -> None:
    config, folder = stopped()
    elsewhere = tmp_path / "elsewhere"
    (folder / "metrics.jsonl").rename(elsewhere)
    (folder / "metrics.jsonl").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"metrics\.jsonl: is a symbolic link"):
        train(config)
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is a pipe or a device"):
        train(config)


@pytest.mark.parametrize("above", [0, 1, 2, 3])
def test_a_link_below_the_folder_of_runs_is_not_followed(
    composed: Compose, tmp_path: Path, above: int
) -> None:
    config = composed(*SMALL, "method=vanilla")
    folder, _ = run_location(config)
    link = [folder, *folder.parents][above]
    link.parent.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".last.pt.1.part").write_text("precious")
    link.symlink_to(elsewhere)
    with pytest.raises(UserError, match=rf"{link}: is a symbolic link, which may point outside of"):
        train(config)
    assert [path.name for path in elsewhere.iterdir()] == [".last.pt.1.part"]


def test_the_folder_of_runs_may_be_a_link(composed: Compose, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "elsewhere")
    train(composed(*SMALL, "method=vanilla"))
    assert list((tmp_path / "elsewhere").rglob("result.json"))
    (tmp_path / "elsewhere/digits/scratch/resnet8/.old").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"\.old: is a symbolic link"):
        train(composed(*SMALL, "method=vanilla", "force=true"))


@pytest.mark.parametrize(
    ("lr", "lost"),
    [
        (1e300, "weights are not finite"),
        (1e38, r"test set: the logits of image 0 of .* are not finite, and those of \d+"),
    ],
)
def test_what_an_epochs_last_step_loses_is_told(
    composed: Compose, tmp_path: Path, lr: float, lost: str
) -> None:
    """There is no loss after it that would show it."""
    words = ("batch_size=1000", "schedule.epochs=1")
    with pytest.raises(UserError, match=rf"phase train, epoch 1: {lost}.*; try"):
        train(with_rate(composed(*SMALL, "method=vanilla", *words), lr))
    assert not list((tmp_path / "runs").rglob("last.pt"))


def test_a_checkpoint_of_another_device_goes_on_from_an_epochs_end_only(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*SMALL, "method=vanilla", "checkpoint_minutes=1e-9")
    for step, in_mid_epoch in ((7, True), (2, False)):
        with monkeypatch.context() as patch:
            at_step(patch, step, crash)
            with pytest.raises(CrashError):
                train(config)
        (path,) = (tmp_path / "runs").rglob("last.pt")
        state = torch.load(path, weights_only=True)
        moved = {"device": "cuda", "position": {**state["position"], "mid_epoch": in_mid_epoch}}
        torch.save(state | moved, path)
        if in_mid_epoch:
            with pytest.raises(UserError, match=r"mid-epoch.*'cuda' cannot go on on 'cpu'"):
                train(config)
            torch.save(state, path)
    assert train(config).epoch == 3


def photos(root: Path, shade: int, count: int = 4) -> Path:
    for part in ("train", "test"):
        for label in ("dark", "light"):
            folder = root / "photos" / part / label
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                colour = (shade, 200 * (label == "light"), number)
                Image.new("RGB", (32, 32), colour).save(folder / f"{number}.bmp")
    return root / "photos"


def test_two_folders_of_images_never_share_a_run(composed: Compose, tmp_path: Path) -> None:
    arguments = ["schedule.epochs=1", "arch@student=resnet8", "arch@teacher=resnet14"]

    def config(root: Path, *more: str) -> Config:
        return composed(*arguments, "dataset=folder", f"dataset.root={root}", *more)

    one, other = photos(tmp_path / "a", 0), photos(tmp_path / "b", 255, count=5)
    train(config(one, "method=vanilla"))
    train(config(one, "method=vanilla", "arch@student=resnet14"))
    assert (tmp_path / "runs/photos/scratch/resnet8").is_dir()
    with pytest.raises(UserError, match=r"dataset\.digest"):
        train(config(other, "method=vanilla"))
    with pytest.raises(UserError, match=r"teacher of another configuration: dataset\.digest"):
        train(config(other, "method=kd"))
    train(config(other, "method=vanilla", "dataset.name=other_photos"))
    train(config(one, "method=kd"))


def test_force_moves_nothing_away_before_all_is_well(composed: Compose, tmp_path: Path) -> None:
    arguments = ["dataset=folder", "arch@student=resnet8", "schedule.epochs=1", "method=vanilla"]
    root = photos(tmp_path, 0)
    train(composed(*arguments, f"dataset.root={root}"))
    before = outcome(tmp_path / "runs")
    shutil.rmtree(root / "test")
    with pytest.raises(UserError, match="there is no folder"):
        train(composed(*arguments, f"dataset.root={root}", "force=true"))
    assert outcome(tmp_path / "runs") == before


@pytest.mark.parametrize("method", ["sskd", "crd", "ft"])
def test_bf16_trains_and_resumes(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    arguments = [*SMALL, f"method={method}", "precision=bf16"]
    result = train(composed(*arguments, f"runs={tmp_path / 'whole'}"))
    assert result.precision == "bf16"
    with monkeypatch.context() as patch:
        at_step(patch, TEACHER_STEPS + 5 + 7, crash)
        with pytest.raises(CrashError):
            train(composed(*arguments, f"runs={tmp_path / 'broken'}"))
    train(composed(*arguments, f"runs={tmp_path / 'broken'}"))
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    (path,) = (tmp_path / "whole/digits/distill").rglob("model.safetensors")
    assert load_file(path)["fc.weight"].dtype == torch.float32


def test_a_run_of_automatic_precision_is_one_of_that_precision(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, "method=sskd", "precision=auto"]
    for capabilities, precision in (({"avx512_bf16": True}, "bf16"), ({}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c, raising=False)
        config, named = composed(*words), composed(*words, f"precision={precision}")
        assert config.precision == precision
        assert train(config).precision == precision
        assert run_location(config) == run_location(
            named
        )  # the teacher, of the same precision, included
        assert train(named).precision == precision


def test_a_half_precision_teacher_is_that_of_its_float32_weights(
    composed: Compose, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    state = build_model("resnet14", 10).state_dict()
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    torch.save({"model": half}, tmp_path / "half.pth")
    small = [item for item in SMALL if not item.startswith("teacher.train")]
    train(composed(*small, "method=kd", f"teacher.checkpoint={tmp_path / 'half.pth'}"))


def test_runs_that_cannot_be_written_are_named(composed: Compose, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/runs.*cannot be written.*runs=FOLDER"):
        train(composed(*SMALL, "method=vanilla", f"runs={tmp_path / 'file' / 'runs'}"))


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("dataset.holdout=0.1", "precision=bf16"),
        ("teacher.seed=3", "teacher.epochs=7"),
        ("schedule=smoke", "teacher.label_noise=0.2"),
        ("dataset=cifar100", "arch@teacher=vgg13"),
        ("teacher.base_lr=0.1", "dataset.root='it is 50% (a,b), é'"),
        ("dataset=folder", "dataset.root='2024'", "dataset.name='7'"),
        ("dataset.fraction=0.5", "teacher.fraction=1.0", "dataset.seed=2"),
    ],
)
def test_a_missing_teacher_is_told_with_the_command_that_trains_it(
    composed: Compose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: tuple[str, ...],
) -> None:
    photos(tmp_path, 0).rename(tmp_path / "2024")  # data that are missing would be reported first
    monkeypatch.chdir(tmp_path)
    small = [item for item in SMALL if not item.startswith("teacher.train")]
    config = composed(*small, *changes, "method=kd")
    with pytest.raises(UserError, match="no finished run of the teacher") as error:
        train(config)
    command = str(error.value).split("`")[1]
    program, script, *overrides = shlex.split(command)
    assert (program, script) == ("python", "train_teacher.py")
    told = composed(*overrides, primary="teacher")
    wanted = teacher_config(config)
    assert run_folder(told, diff_from_recipe(told)) == run_folder(wanted, diff_from_recipe(wanted))
    assert training_command(told) == command


def test_the_student_alone_is_the_same_run_from_either_command(composed: Compose) -> None:
    one = composed("method=vanilla", "arch@student=vgg8", "schedule=short")
    other = composed("arch=vgg8", "schedule=short", primary="teacher")
    assert one.model_dump() == other.model_dump()


def folder_of(config: Config) -> str:
    return str(run_folder(config, diff_from_recipe(config)).relative_to(config.runs))


def test_folders_are_named_after_what_they_hold(composed: Compose) -> None:
    sskd_run = folder_of(composed("pair=vgg13-vgg8", "seed=2"))
    assert sskd_run == "cifar100/distill/vgg13-vgg8/sskd/seed2"
    assert folder_of(composed("arch=vgg8", primary="teacher")) == "cifar100/scratch/vgg8/seed0"
    # what does not decide the result leaves no trace
    same = composed("pair=vgg13-vgg8", "seed=2", "device=cuda:1", "wandb.mode=disabled")
    assert folder_of(same) == sskd_run
    others = {
        folder_of(composed("pair=vgg13-vgg8", "seed=2", change))
        for change in ("optimizer.lr=0.1", "optimizer.lr=0.2", "method.weights.tf=3.0",
                       "schedule=short", "dataset.fraction=0.5", "teacher.epoch=last",
                       "optimizer=adamw", "batch_size=128", "precision=bf16")
    }  # fmt: skip
    assert len(others | {sskd_run}) == 10
    assert all(name.startswith(f"{sskd_run}-") for name in others)


def test_a_pair_is_two_architectures_and_the_command_line_beats_it(composed: Compose) -> None:
    pair = composed("pair=vgg13-MobileNetV2")
    assert (pair.teacher and pair.teacher.name, pair.student.name) == ("vgg13", "MobileNetV2")
    assert pair.optimizer.lr == 0.01
    assert composed("pair=vgg13-MobileNetV2", "arch@student=vgg8").student.name == "vgg8"
