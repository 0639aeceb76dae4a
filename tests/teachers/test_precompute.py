"""Outputs of a teacher that are computed once, kept in a file, and refused if it is corrupt."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from breaking import Undisturbed, check_survives, outcome
from conftest import Compose, random_images
from faults import SMALL, Attempt
from filelock import FileLock
from stand_in import wait_until
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
from sskd.teachers.outputs import Layout, can_precompute
from sskd.teachers.precompute import PHASE, find_or_compute_outputs
from sskd.training.acceleration import fold_teacher
from sskd.training.signals import Interrupted
from sskd.training.step import set_trainable

TEACHERS = [
    "resnet14", "resnet32x4", "wrn_40_2", "vgg13", "ResNet50", "MobileNetV2", "ShuffleV1",
    "ShuffleV2",
]  # fmt: skip
PRECOMPUTABLE = sorted(
    name for name, kind in METHODS.items() if kind.needs_teacher and can_precompute(kind)
)
TEACHER = TeacherWeights(Path("unused"), "0" * 64)


def build(config: Config, images: Images) -> Method:
    """Return the method, with statistics of ``images`` in the teacher's BatchNorms."""
    method = assemble(config, images)
    loader = Loader(
        images.train, images.mean, images.std, batch_size=len(images.train), views=method.views
    )
    method.teacher.train()
    with torch.no_grad():
        for _ in range(3):
            loader.begin_epoch(0)
            method.teacher(loader.next_batch().x)
    fold_teacher(method)
    return method


class Spy:
    """Features that record which of them are read."""

    def __init__(self, features: Features, read: set[str]) -> None:
        self._features, self._read = features, read

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return getattr(self._features, name)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_declares_the_teacher_outputs_it_reads(composed: Compose, name: str) -> None:
    if not METHODS[name].needs_teacher:
        pytest.skip("it has no teacher")
    images = random_images(8, 4, size=16)
    pair = ("arch@teacher=resnet14", "arch@student=resnet8")
    method = assemble(composed(f"method={name}", *pair), images)
    read: set[str] = set()

    def spied(batch: Any) -> Any:
        return Spy(method.teacher(batch.x), read)

    method.precomputed = spied
    for phase in method.phases():
        set_trainable(phase, method)
        loader = Loader(images.train, images.mean, images.std, batch_size=8, views=phase.views)
        phase.loss(loader.next_batch())
    assert read == set(method.teacher_outputs)


def test_methods_that_read_only_vectors_can_precompute() -> None:
    assert PRECOMPUTABLE == [
        "ab", "cc", "crd", "ctkd", "dist", "dkd", "fsp", "kd", "ls", "luminet", "pkt",
        "rkd", "skd", "srrl", "sskd", "ttm", "wttm",
    ]  # fmt: skip


# Without the instructions for it, bf16 is slow.
@pytest.mark.parametrize(
    ("teacher", "precision"),
    [*((name, "fp32") for name in TEACHERS), ("resnet8", "bf16"), ("vgg8", "bf16")],
)
def test_rows_equal_what_the_teacher_computes(
    composed: Compose, teacher: str, precision: str
) -> None:
    images = random_images(2, 4, size=16)
    pair = (f"arch@teacher={teacher}", "arch@student=resnet8")
    config = composed("method=rkd", *pair, f"precision={precision}", "dataset=digits")
    method = build(config, images)
    find_or_compute_outputs(method, images, plan_of(config))
    found = method.precomputed
    assert found is not None
    method.precomputed = None
    loader = Loader(images.train, images.mean, images.std, batch_size=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for seed in range(3):
            loader.begin_epoch(seed)
            batch = loader.next_batch()
            computed, read = method.teacher_features(batch), found(batch)
            # The batch size changes the rounding by a bit or two of the type.
            tolerance = 1e-4 if precision == "fp32" else 0.05
            for name in ("logits", "pooled"):
                expected, row = getattr(computed, name), getattr(read, name)
                assert row.dtype == expected.dtype
                torch.testing.assert_close(row, expected, rtol=tolerance, atol=tolerance)
            assert [len(read.stem), read.stages, read.preacts] == [0, (), ()]


@pytest.mark.parametrize("name", PRECOMPUTABLE)
def test_losses_equal_those_with_the_teacher_itself(composed: Compose, name: str) -> None:
    images = random_images(8, 4, size=16)
    pair = ("arch@teacher=resnet14", "arch@student=resnet8")
    config = composed(f"method={name}", *pair, "dataset=digits")
    method = build(config, images)
    find_or_compute_outputs(method, images, plan_of(config))
    precomputed = method.precomputed
    phases = list(method.phases())
    calls: list[object] = []
    method.teacher.register_forward_pre_hook(lambda *inputs: calls.append(inputs))
    for phase in phases:
        set_trainable(phase, method)
        loader = Loader(images.train, images.mean, images.std, batch_size=8, views=phase.views)
        batch = loader.next_batch()
        state = {key: value.clone() for key, value in method.state_dict().items()}
        losses = []
        for source in (None, precomputed):
            calls.clear()
            method.precomputed = source
            torch.manual_seed(1)  # CRD draws its negatives
            losses.append(phase.loss(batch).terms)
            method.load_state_dict(state)
        assert losses[0].keys() == losses[1].keys()
        for term, value in losses[0].items():
            torch.testing.assert_close(losses[1][term], value, rtol=1e-4, atol=1e-5)
    assert not calls, "the last phase does not call the teacher"


def plan_of(config: Config) -> RunPlan:
    """Return the plan of a run of ``config``; the digest of its teacher is made up."""
    return RunPlan(
        config=config,
        folder=Path(config.runs, "run"),
        difference={},
        teacher=TEACHER,
        full_config={},
    )


def overrides(runs: Path, *more: str) -> list[str]:
    """Return the overrides of a run on ten images, one of each class."""
    small = (*SMALL, "arch@teacher=resnet8", "dataset.fraction=0.007")
    return [f"runs={runs}", *small, "teacher.precompute=true", *more]


def kd(runs: Path, *more: str) -> list[str]:
    return overrides(runs, "method=kd", "schedule.epochs=1", "teacher.epochs=1", *more)


@pytest.fixture
def trained(composed: Compose, tmp_path: Path, shared_folder: Path) -> list[str]:
    """Return the words of the run of ``kd``, which has finished under ``tmp_path``.

    The processes of the tests train it once.
    """
    common = shared_folder / "precomputed"
    with FileLock(f"{common}.lock"):
        if not common.exists():
            part = Path(f"{common}.part")
            sskd.train.train(composed(*kd(part)))
            part.rename(common)
    shutil.copytree(common, tmp_path, dirs_exist_ok=True)
    return kd(tmp_path)


@pytest.fixture
def taught(trained: list[str], tmp_path: Path) -> list[str]:
    """Return the words of the run of ``kd``, of which only the teacher has been trained."""
    for kind in ("distill", "phases"):
        shutil.rmtree(tmp_path / "digits" / kind)
    return trained


def outputs(runs: Path) -> Path:
    (path,) = runs.rglob("outputs.bin")
    return path


def zeros(*arguments: Any, first: int) -> Iterator[Tensor]:
    """Yield zeros in the place of a teacher's outputs, where a test is of the file alone."""
    layout: Layout = arguments[-1]
    for _ in range(first, layout.images):
        yield torch.zeros(1, *layout.shape[1:], dtype=layout.dtype)


def losses(runs: Path) -> list[dict[str, float]]:
    """Return the losses of each epoch of the student."""
    (path,) = runs.glob("digits/distill/*/*/*/metrics.jsonl")
    lines = [json.loads(line) for line in path.open()]
    return [{k: v for k, v in line.items() if k.startswith("loss")} for line in lines]


@pytest.mark.parametrize("name", ["ab", "crd", "sskd"])
def test_a_run_has_the_losses_of_one_without_the_file(
    composed: Compose, tmp_path: Path, name: str
) -> None:
    words = overrides(tmp_path, f"method={name}", "schedule.epochs=1")
    for runs, precompute in (("with", "true"), ("without", "false")):
        more = [f"runs={tmp_path / runs}", f"teacher.precompute={precompute}"]
        sskd.train.train(composed(*words, *more))
    found, expected = losses(tmp_path / "with")[-1], losses(tmp_path / "without")[-1]
    assert found == pytest.approx(expected, rel=1e-3)
    folders = [
        {path.parent.relative_to(runs) for path in runs.rglob("result.json")}
        for runs in (tmp_path / "with", tmp_path / "without")
    ]
    assert {path.parts[3] for path in folders[0] - folders[1]} == {PHASE}


def test_other_students_of_the_teacher_reuse_the_file(
    composed: Compose, taught: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sskd.train.train(composed(*taught))
    assert f"{PHASE}: computes" in capsys.readouterr().out
    before = outputs(tmp_path).read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the outputs must not be computed again")

    monkeypatch.setattr(sskd.teachers.precompute, "_fill", fail)
    for other in ("seed=1", "method.temperature=2", "arch@student=resnet20", "batch_size=8"):
        sskd.train.train(composed(*taught, other))
        assert f"{outputs(tmp_path).parent}: reused" in capsys.readouterr().out
    assert outputs(tmp_path).read_bytes() == before


def test_each_setting_of_the_outputs_makes_another_file(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sskd.teachers.precompute, "_outputs", zeros)
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


def test_a_method_that_reads_maps_precomputes_nothing(
    composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = overrides(tmp_path, "method=fitnet", "schedule.epochs=1", "teacher.epochs=1")
    sskd.train.train(composed(*words))
    assert (
        "teacher.precompute: method=fitnet reads more of the teacher than its logits and its "
        "pooled feature, so every step computes the teacher's features\n"
    ) in capsys.readouterr().out
    assert not list(tmp_path.rglob("outputs.bin"))


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": flip_bit,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "missing": Path.unlink,
}


def test_the_error_names_a_corrupt_file(
    composed: Compose, trained: list[str], tmp_path: Path
) -> None:
    path = outputs(tmp_path)
    content = path.read_bytes()
    for damage in DAMAGES.values():
        damage(path)
        with pytest.raises(UserError) as error:
            sskd.train.train(composed(*trained, "seed=1"))
        assert str(error.value) == (
            f"{path}: is corrupt; delete the folder {path.parent} and rerun the same command"
        )
        path.write_bytes(content)
    shutil.rmtree(path.parent)
    sskd.train.train(composed(*trained, "seed=1"))
    assert outputs(tmp_path).read_bytes() == content


def test_too_small_a_disk_is_reported_at_the_start(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    words = overrides(tmp_path, "method=sskd", "schedule.epochs=1", "teacher.epochs=1")
    with pytest.raises(
        UserError,
        match=r"bin: the teacher's outputs need 0\.00179 GiB more, but only 0\.0009",
    ):
        sskd.train.train(composed(*words))


@pytest.mark.parametrize("message", ["CUDA out of memory.", "MPS backend out of memory"])
def test_too_small_a_device_is_reported(
    composed: Compose, trained: list[str], monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(sskd.teachers.outputs, "map_rows", full)
    expected = r"outputs, 6\.03e-05 GiB, do not fit into the memory of cpu"
    with pytest.raises(UserError, match=expected):
        sskd.train.train(composed(*trained, "seed=1"))


def test_labels_do_not_change_the_outputs(
    composed: Compose, taught: list[str], tmp_path: Path
) -> None:
    for noise in (0.0, 0.3, 0.5):
        sskd.train.train(composed(*taught, f"dataset.label_noise={noise}"))
    assert outputs(tmp_path)


def test_held_out_images_have_no_outputs(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sskd.teachers.precompute, "_outputs", zeros)
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


def before_sixth_write(patch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Call ``action`` when the outputs of the sixth image are computed and not yet written."""
    compute = sskd.teachers.precompute._outputs

    def with_action(*arguments: Any, **named: Any) -> Iterator[Tensor]:
        for number, rows in enumerate(compute(*arguments, **named)):
            if number == 5:
                action()
            yield rows

    patch.setattr(sskd.teachers.precompute, "_outputs", with_action)


def stop(words: list[str], composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the outputs of the first six images, then stop by SIGTERM."""
    with monkeypatch.context() as patch:
        before_sixth_write(patch, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            sskd.train.train(composed(*words))


def test_a_process_that_lost_the_folder_stops_writing(
    composed: Compose, taught: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 5 * 162 * 10 * 4

    def lose_lease() -> None:
        wait_until(lambda: outputs(tmp_path).stat().st_size == written)
        (lease,) = outputs(tmp_path).parent.glob(".lease")
        lease.unlink()

    before_sixth_write(monkeypatch, lose_lease)
    with pytest.raises(BusyError):
        sskd.train.train(composed(*taught))
    assert outputs(tmp_path).stat().st_size == written


def test_an_image_is_computed_while_the_last_is_written(
    composed: Compose, taught: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But only one: each write waits for the next image, and no image comes before that write."""
    compute, write_at = sskd.teachers.precompute._outputs, sskd.teachers.precompute.write_at
    computed = written = 0
    ahead: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Iterator[Tensor]:
        nonlocal computed
        for rows in compute(*arguments, **named):
            computed += 1
            ahead.append(computed - written)
            yield rows
        computed += 1

    def slow(*arguments: Any, **named: Any) -> None:
        nonlocal written
        wait_until(lambda: computed == written + 2)
        write_at(*arguments, **named)
        written += 1

    monkeypatch.setattr(sskd.teachers.precompute, "_outputs", counted)
    monkeypatch.setattr(sskd.teachers.precompute, "write_at", slow)
    sskd.train.train(composed(*taught))
    assert ahead == [1] + [2] * 9


def test_an_error_of_the_writing_thread_ends_the_run(
    composed: Compose, taught: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = sskd.teachers.precompute._outputs

    def not_finite(*arguments: Any, **named: Any) -> Iterator[Tensor]:
        for number, rows in enumerate(compute(*arguments, **named)):
            yield rows.log() if number == 4 else rows

    with monkeypatch.context() as patch:
        patch.setattr(sskd.teachers.precompute, "_outputs", not_finite)
        with pytest.raises(UserError, match=r"for training image 4 \(counting from 0\) are not fi"):
            sskd.train.train(composed(*taught))
    assert outputs(tmp_path).stat().st_size == 4 * 162 * 10 * 4
    assert not [one for one in threading.enumerate() if "ThreadPool" in one.name]


def test_a_stopped_computation_resumes(
    composed: Compose, trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    undisturbed = outputs(tmp_path).read_bytes()
    shutil.rmtree(outputs(tmp_path).parent)
    stop([*trained, "seed=1"], composed, monkeypatch)
    capsys.readouterr()
    sskd.train.train(composed(*trained, "seed=1"))
    assert "; 6/10 images are done\n" in capsys.readouterr().out
    assert outputs(tmp_path).read_bytes() == undisturbed


def test_a_corrupt_partial_file_is_refused(
    composed: Compose, taught: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(taught, composed, monkeypatch)
    path = outputs(tmp_path)
    content = path.read_bytes()
    for name in ("a bit", "cut", "missing"):
        DAMAGES[name](path)
        with pytest.raises(UserError, match=r"outputs\.bin: is corrupt; delete the folder"):
            sskd.train.train(composed(*taught))
        path.write_bytes(content)
    sskd.train.train(composed(*taught))


def test_a_foreign_checkpoint_is_corrupt(
    composed: Compose, taught: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(taught, composed, monkeypatch)
    path = outputs(tmp_path).with_name("last.pt")
    original, content = load_checkpoint(path), outputs(tmp_path).read_bytes()
    common = {name: original[name] for name in ("stage", "lines", "metrics_digest")}
    for state in OTHER_STATES:
        save_checkpoint(path, {**(original if state else common), **state})
        with pytest.raises(UserError, match=r"(last\.pt|bin): is corrupt; delete the folder"):
            sskd.train.train(composed(*taught))
        outputs(tmp_path).write_bytes(content)


def test_an_unreadable_file_is_not_called_corrupt(
    composed: Compose, trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def forbidden(path: Path, *_: int) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(sskd.teachers.outputs, "_known_digest", forbidden)
    with pytest.raises(PermissionError, match=r"outputs\.bin"):
        sskd.train.train(composed(*trained, "seed=1"))


def test_a_job_frees_its_outputs_before_the_next_loads_them(
    composed: Compose, taught: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Tensor]] = []
    map_rows = sskd.teachers.outputs.map_rows

    def watched(*arguments: Any) -> Tensor:
        assert [rows() for rows in loaded] == [None] * len(loaded)
        rows = map_rows(*arguments)
        loaded.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(sskd.teachers.outputs, "map_rows", watched)
    for seed in range(3):
        sskd.train.train(composed(*taught, f"seed={seed}"))
    assert len(loaded) == 3


def test_processes_that_need_the_same_file_compute_it_once(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    attempts = [
        Attempt("precomputed", runs, f"seed={seed}", log=tmp_path / f"{seed}.log")
        for seed in (0, 1)
    ]
    for attempt in attempts:
        assert attempt.end(after=300) == 0, attempt.output
    output = [line for attempt in attempts for line in attempt.output]
    assert sum(f"{PHASE}: computes" in line for line in output) == 1
    assert undisturbed.outcome("precomputed").items() <= outcome(runs).items()


@pytest.mark.parametrize("act", ["killed", "power failure", "disk full"])
def test_a_broken_computation_ends_like_an_undisturbed_one(
    undisturbed: Undisturbed, tmp_path: Path, act: str
) -> None:
    last = undisturbed.moments("precomputed")
    middle = range(last // 3, 2 * last // 3)  # the teacher is trained before
    for number in random.Random(act).sample(middle, 2):
        check_survives(
            undisturbed, "precomputed", act, number=number, folder=tmp_path / str(number)
        )
