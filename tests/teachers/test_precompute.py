"""A teacher's outputs from a file: its own, found again, and never taken where they are damaged."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from breaking import Undisturbed, outcome, survives
from conftest import Compose, random_images
from faults import SMALL, Attempt
from torch import Tensor

import sskd.teachers.outputs
import sskd.teachers.precompute
import sskd.train
from sskd.config import Config
from sskd.data import Images, Loader
from sskd.errors import BusyError, UserError
from sskd.methods import METHODS, Method
from sskd.models import Features
from sskd.runs.checkpoint_file import load_checkpoint, save_checkpoint
from sskd.runs.plan import RunPlan, TeacherWeights
from sskd.teachers.assembly import assemble
from sskd.teachers.outputs import can_precompute
from sskd.teachers.precompute import PHASE, load_teacher_outputs
from sskd.training.acceleration import fold_teacher
from sskd.training.signals import Interrupted
from sskd.training.step import set_trainable

TEACHERS = [
    "resnet14", "resnet32x4", "wrn_40_2", "vgg13", "ResNet50", "MobileNetV2", "ShuffleV1",
    "ShuffleV2",
]  # fmt: skip
FITTING = sorted(
    name for name, kind in METHODS.items() if kind.needs_teacher and can_precompute(kind)
)
DIGEST = TeacherWeights(Path("nowhere"), "0" * 64)


def made(config: Config, images: Images) -> Method:
    """Return the method with a teacher whose BatchNorms have seen images."""
    method = assemble(config, images)
    loader = Loader(images.train, images.mean, images.std, len(images.train), method.views)
    method.teacher.train()
    with torch.no_grad():
        for _ in range(3):
            loader.begin_epoch(0)
            method.teacher(loader.next_batch().x)
    fold_teacher(method, torch.device("cpu"))
    return method


class Spy:
    """Features that remember which of them were read."""

    def __init__(self, features: Features, read: set[str]) -> None:
        self._features, self._read = features, read

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return getattr(self._features, name)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_reads_of_its_teacher_what_it_declares(composed: Compose, name: str) -> None:
    if not METHODS[name].needs_teacher:
        pytest.skip("it has no teacher")
    images = random_images(8, 4)
    pair = ("arch@teacher=resnet14", "arch@student=resnet8")
    method = assemble(composed(f"method={name}", *pair), images)
    read: set[str] = set()

    def spied(batch: Any) -> Any:
        return Spy(method.teacher(batch.x), read)

    method.precomputed = spied
    for stage in method.phases():
        set_trainable(stage, method)
        loader = Loader(images.train, images.mean, images.std, 8, stage.views)
        stage.loss(loader.next_batch())
    assert read == set(method.teacher_outputs)


def test_the_methods_that_look_at_vectors_alone() -> None:
    assert FITTING == ["ab", "cc", "crd", "fsp", "kd", "pkt", "rkd", "sskd"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_rows_are_what_the_teacher_computes(
    composed: Compose, teacher: str, precision: str
) -> None:
    images = random_images(1, 4)
    pair = (f"arch@teacher={teacher}", "arch@student=resnet8")
    config = composed("method=rkd", *pair, f"precision={precision}", "dataset=digits")
    method = made(config, images)
    load_teacher_outputs(method, images, planned(config))
    found = method.precomputed
    assert found is not None
    method.precomputed = None
    loader = Loader(images.train, images.mean, images.std, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for seed in range(3):
            loader.begin_epoch(seed)
            batch = loader.next_batch()
            own, kept = method.teacher_features(batch), found(batch)
            # Other images in the batch round otherwise: by a bit or two of the type.
            close = 1e-4 if precision == "fp32" else 0.05
            for name in ("logits", "pooled"):
                wanted, given = getattr(own, name), getattr(kept, name)
                assert given.dtype == wanted.dtype
                torch.testing.assert_close(given, wanted, rtol=close, atol=close)
            assert [kept.stem, kept.stages, kept.preacts] == [None] * 3


@pytest.mark.parametrize("name", FITTING)
def test_losses_are_those_of_the_teacher_itself(composed: Compose, name: str) -> None:
    images = random_images(8, 4)
    pair = ("arch@teacher=resnet14", "arch@student=resnet8")
    config = composed(f"method={name}", *pair, "dataset=digits")
    method = made(config, images)
    load_teacher_outputs(method, images, planned(config))
    looked_up = method.precomputed
    stages = list(method.phases())
    asked: list[object] = []
    method.teacher.register_forward_pre_hook(lambda *given: asked.append(given))
    for stage in stages:
        set_trainable(stage, method)
        loader = Loader(images.train, images.mean, images.std, 8, stage.views)
        batch = loader.next_batch()
        state = {key: value.clone() for key, value in method.state_dict().items()}
        losses = []
        for source in (None, looked_up):
            asked.clear()
            method.precomputed = source
            torch.manual_seed(1)  # CRD draws its negatives
            losses.append(stage.loss(batch).terms)
            method.load_state_dict(state)
        assert losses[0].keys() == losses[1].keys()
        for term, value in losses[0].items():
            torch.testing.assert_close(losses[1][term], value, rtol=1e-4, atol=1e-5)
    assert not asked, "the last stage, looked up, needs no teacher"


def planned(config: Config) -> RunPlan:
    """Return the plan of a run with a teacher of any weights."""
    return RunPlan(config, Path(config.runs, "run"), {}, DIGEST, {})


def cell(runs: Path, *more: str) -> list[str]:
    """Return the words of a run on ten images, one of each class."""
    small = (*SMALL, "arch@teacher=resnet8", "dataset.fraction=0.007")
    return [f"runs={runs}", *small, "teacher.precompute=true", *more]


def kd(runs: Path, *more: str) -> list[str]:
    return cell(runs, "method=kd", "schedule.epochs=1", "teacher.epochs=1", *more)


def outputs(runs: Path) -> Path:
    (path,) = runs.rglob("outputs.bin")
    return path


def losses(runs: Path) -> list[dict[str, float]]:
    """Return the losses of each epoch of the student."""
    (path,) = runs.glob("digits/distill/*/*/*/metrics.jsonl")
    lines = [json.loads(line) for line in path.open()]
    return [{k: v for k, v in line.items() if k.startswith("loss")} for line in lines]


@pytest.mark.parametrize("name", ["ab", "crd", "sskd"])
def test_a_run_learns_what_it_does_without(composed: Compose, tmp_path: Path, name: str) -> None:
    words = cell(tmp_path, f"method={name}", "schedule.epochs=1")
    for runs, chosen in (("with", "true"), ("without", "false")):
        own = [f"runs={tmp_path / runs}", f"teacher.precompute={chosen}"]
        sskd.train.train(composed(*words, *own))
    (ours,), (theirs,) = losses(tmp_path / "with")[-1:], losses(tmp_path / "without")[-1:]
    assert ours == pytest.approx(theirs, rel=1e-3)
    folders = [
        {path.parent.relative_to(runs) for path in runs.rglob("result.json")}
        for runs in (tmp_path / "with", tmp_path / "without")
    ]
    assert {path.parts[3] for path in folders[0] - folders[1]} == {PHASE}


def test_the_next_run_of_the_teacher_finds_them(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = kd(tmp_path)
    sskd.train.train(composed(*words))
    assert f"{PHASE}: computes" in capsys.readouterr().out
    before = outputs(tmp_path).read_bytes()
    monkeypatch.setattr(sskd.teachers.precompute, "_fill", None)
    for other in ("seed=1", "method.temperature=2", "arch@student=resnet20", "batch_size=8"):
        sskd.train.train(composed(*words, other))
        assert f"{outputs(tmp_path).parent}: reused" in capsys.readouterr().out
    assert outputs(tmp_path).read_bytes() == before


def test_what_they_depend_on_makes_others(composed: Compose, tmp_path: Path) -> None:
    words = kd(tmp_path)
    others = (
        (),
        ("method=rkd",),
        ("precision=bf16",),
        ("dataset.fraction=0.015",),
        ("dataset.seed=1",),
        ("dataset.mean=[0.5,0.5,0.5]",),
        ("teacher.seed=1",),
    )
    for number, other in enumerate(others, 1):
        sskd.train.train(composed(*words, *other))
        assert len(list(tmp_path.rglob("outputs.bin"))) == number, other


def test_a_method_that_reads_maps_asks_the_teacher(
    composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = cell(tmp_path, "method=fitnet", "schedule.epochs=1", "teacher.epochs=1")
    sskd.train.train(composed(*words))
    assert (
        "teacher.precompute: method=fitnet reads more of the teacher than its logits and its "
        "pooled feature, so that the teacher is asked in every step\n"
    ) in capsys.readouterr().out
    assert not list(tmp_path.rglob("outputs.bin"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "gone": Path.unlink,
}


def test_a_damaged_file_is_named(composed: Compose, tmp_path: Path) -> None:
    words = kd(tmp_path)
    sskd.train.train(composed(*words))
    path = outputs(tmp_path)
    content = path.read_bytes()
    for damage in DAMAGES.values():
        damage(path)
        with pytest.raises(UserError) as told:
            sskd.train.train(composed(*words, "seed=1"))
        assert str(told.value) == (
            f"{path}: is corrupt; delete the folder {path.parent} and rerun the same command"
        )
        path.write_bytes(content)
    shutil.rmtree(path.parent)
    sskd.train.train(composed(*words, "seed=1"))
    assert outputs(tmp_path).read_bytes() == content


def test_a_small_disk_is_told_before_anything_is_computed(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    words = cell(tmp_path, "method=sskd", "schedule.epochs=1", "teacher.epochs=1")
    with pytest.raises(
        UserError,
        match=r"bin: the teacher's outputs need 0\.00179 GiB more, but only 0\.0009",
    ):
        sskd.train.train(composed(*words))


@pytest.mark.parametrize("told", ["CUDA out of memory.", "MPS backend out of memory"])
def test_a_device_that_is_too_small_is_told(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError(told)

    monkeypatch.setattr(sskd.teachers.outputs, "map_rows", full)
    with pytest.raises(UserError, match=r"outputs, 0\.\d+ GiB, do not fit into the memory of cpu"):
        sskd.train.train(
            composed(*cell(tmp_path, "method=kd", "schedule.epochs=1", "dataset.fraction=0.02"))
        )


def test_labels_make_no_others(composed: Compose, tmp_path: Path) -> None:
    words = kd(tmp_path)
    for noise in (0.0, 0.3, 0.5):
        sskd.train.train(composed(*words, f"dataset.label_noise={noise}"))
    assert outputs(tmp_path)


def test_held_out_images_have_none(composed: Compose, tmp_path: Path) -> None:
    words = kd(tmp_path)
    sskd.train.train(composed(*words, "dataset.fraction=0.05", "dataset.holdout=0.5"))
    assert outputs(tmp_path).stat().st_size == 40 * 162 * 10 * 4


OTHER_STATES: tuple[dict[str, Any], ...] = (
    {},
    {"images": "5"},
    {"images": 2.5},
    {"images": True},
    {"images": -3},
    {"images": 11},
    {"images": torch.tensor(5)},
    {"seconds": "a"},
    {"seconds": math.nan},
    {"seconds": -1.0},
    {"digest": None},
    {"digest": "0" * 64},
)


def interrupted(patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let ``act`` happen when the outputs of the sixth image are computed, and not yet written."""
    compute = sskd.teachers.precompute._outputs

    def with_act(*arguments: Any) -> Iterator[Tensor]:
        for number, rows in enumerate(compute(*arguments)):
            if number == 5:
                act()
            yield rows

    patch.setattr(sskd.teachers.precompute, "_outputs", with_act)


def stopped(words: list[str], composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the outputs of the first six images, then stop by SIGTERM."""
    with monkeypatch.context() as patch:
        interrupted(patch, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            sskd.train.train(composed(*words))


def test_a_process_that_has_lost_the_folder_writes_no_more(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose() -> None:
        (lease,) = outputs(tmp_path).parent.glob(".lease")
        lease.unlink()

    interrupted(monkeypatch, lose)
    with pytest.raises(BusyError):
        sskd.train.train(composed(*kd(tmp_path)))
    assert outputs(tmp_path).stat().st_size == 5 * 162 * 10 * 4


def test_a_signal_saves_and_the_next_start_goes_on(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = kd(tmp_path)
    sskd.train.train(composed(*words))
    undisturbed = outputs(tmp_path).read_bytes()
    shutil.rmtree(outputs(tmp_path).parent)
    stopped([*words, "seed=1"], composed, monkeypatch)
    capsys.readouterr()
    sskd.train.train(composed(*words, "seed=1"))
    assert "; 6/10 images are done\n" in capsys.readouterr().out
    assert outputs(tmp_path).read_bytes() == undisturbed


def test_a_part_that_is_damaged_is_not_gone_on_from(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = kd(tmp_path)
    stopped(words, composed, monkeypatch)
    path = outputs(tmp_path)
    content = path.read_bytes()
    for name in ("a bit", "cut", "gone"):
        DAMAGES[name](path)
        with pytest.raises(UserError, match=r"outputs\.bin: is corrupt; delete the folder"):
            sskd.train.train(composed(*words))
        path.write_bytes(content)
    sskd.train.train(composed(*words))


def test_a_checkpoint_of_something_else_is_damaged(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = kd(tmp_path)
    stopped(words, composed, monkeypatch)
    path = outputs(tmp_path).with_name("last.pt")
    whole, content = load_checkpoint(path), outputs(tmp_path).read_bytes()
    shared = {name: whole[name] for name in ("stage", "lines", "metrics_digest")}
    for state in OTHER_STATES:
        save_checkpoint(path, {**(whole if state else shared), **state})
        with pytest.raises(UserError, match=r"(last\.pt|bin): is corrupt; delete the folder"):
            sskd.train.train(composed(*words))
        outputs(tmp_path).write_bytes(content)


def test_what_may_not_be_read_is_not_called_damaged(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = kd(tmp_path)
    sskd.train.train(composed(*words))

    def forbidden(path: Path, *_: int) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(sskd.teachers.outputs, "_known_digest", forbidden)
    with pytest.raises(PermissionError, match=r"outputs\.bin"):
        sskd.train.train(composed(*words, "seed=1"))


def test_a_cell_has_let_go_of_its_own_when_the_next_takes_its(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[weakref.ref[Tensor]] = []
    take = sskd.teachers.outputs.map_rows

    def watched(*arguments: Any) -> Tensor:
        assert [rows() for rows in taken] == [None] * len(taken)
        rows = take(*arguments)
        taken.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(sskd.teachers.outputs, "map_rows", watched)
    for seed in range(3):
        words = kd(tmp_path)
        sskd.train.train(composed(*words, f"seed={seed}"))
    assert len(taken) == 3


def test_processes_that_need_the_same_compute_them_once(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    ours = [
        Attempt("precomputed", runs, f"seed={seed}", log=tmp_path / f"{seed}.log")
        for seed in (0, 1)
    ]
    for attempt in ours:
        assert attempt.end(after=300) == 0, attempt.told
    told = [line for attempt in ours for line in attempt.told]
    assert sum(f"{PHASE}: computes" in line for line in told) == 1
    assert undisturbed.outcome("precomputed").items() <= outcome(runs).items()


@pytest.mark.parametrize("act", ["killed", "power failure", "disk full"])
def test_broken_anywhere_they_end_as_undisturbed(
    undisturbed: Undisturbed, tmp_path: Path, act: str
) -> None:
    last = undisturbed.moments("precomputed")
    middle = range(last // 3, 2 * last // 3)  # before them the teacher is trained
    for number in random.Random(act).sample(middle, 2):
        survives(undisturbed, "precomputed", act, number, tmp_path / str(number))
