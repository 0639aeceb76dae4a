"""The checks fail for what they are about, and their command reports it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Compose, SmallTeacher
from faults import SMALL
from torch import Tensor, nn

from sskd import errors
from sskd.checks.__main__ import main
from sskd.checks.device import check_device
from sskd.checks.methods import (
    check_overfits,
    check_phases,
    check_resume,
    check_single_image,
    check_state,
    check_teacher_outputs,
)
from sskd.checks.networks import (
    check_features,
    check_gradients,
    check_recognition,
    check_teacher,
)
from sskd.checks.networks import check_single_image as check_image_alone
from sskd.checks.samples import random_images
from sskd.data import Batch, Images
from sskd.errors import CheckError, UserError
from sskd.methods import METHODS, build_method
from sskd.methods.kd import KD, Outputs
from sskd.models import ARCHITECTURES, Features, build_model
from sskd.train import train


class Extra(KD):
    """KD with a term that each test defines."""

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"at": self.term(outputs.student, outputs.teacher)}

    def term(self, student: Features, teacher: Features) -> Tensor:
        raise NotImplementedError


class ForgottenAdapter(Extra):
    """Trains a layer that is not among its adapters."""

    def __init__(self, *networks: Any, **shared: Any) -> None:
        super().__init__(*networks, **shared)
        self.layer = nn.Linear(64, 64)

    def term(self, student: Features, teacher: Features) -> Tensor:
        layer = self.layer.requires_grad_(True)
        return (layer(student.pooled) - teacher.pooled).square().mean()


class UnusedAdapter(Extra):
    """Has an adapter that no loss depends on."""

    def __init__(self, *networks: Any, **shared: Any) -> None:
        super().__init__(*networks, **shared)
        self.layer = nn.Linear(64, 64)
        self.adapters = (self.layer,)

    def term(self, student: Features, teacher: Features) -> Tensor:
        return student.pooled.mean()


class MovingTeacher(Extra):
    """Updates the statistics of the teacher's BatchNorm."""

    def loss(self, batch: Batch) -> Any:
        self.teacher.train()
        return super().loss(batch)

    def term(self, student: Features, teacher: Features) -> Tensor:
        return student.pooled.mean()


class Counter(Extra):
    """Keeps the number of its steps in a Python attribute."""

    steps = 0

    def term(self, student: Features, teacher: Features) -> Tensor:
        self.steps += 1
        return student.pooled.mean() * self.steps


class Greedy(Extra):
    """Reads a field of the teacher that it does not name."""

    def term(self, student: Features, teacher: Features) -> Tensor:
        return (student.pooled - teacher.pooled).square().mean()


class Divided(Extra):
    """Divides by the deviation over the batch, which one image does not have."""

    def term(self, student: Features, teacher: Features) -> Tensor:
        return (student.pooled / student.pooled.std(0)).mean()


class Unnamed(Extra):
    """Returns a term that has no weight."""

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"other": outputs.student.pooled.mean()}


class Opposed(Extra):
    """Its losses cannot be learned."""

    def loss(self, batch: Batch) -> Any:
        output = super().loss(batch)
        return output._replace(terms={name: -term for name, term in output.terms.items()})

    def term(self, student: Features, teacher: Features) -> Tensor:
        return student.pooled.mean() * 0


class Constant(Extra):
    """Its state lacks a buffer that never changes, and has any name."""

    memory: Tensor

    def __init__(self, *networks: Any, **shared: Any) -> None:
        super().__init__(*networks, **shared)
        self.register_buffer("memory", torch.arange(3.0), persistent=False)

    def term(self, student: Features, teacher: Features) -> Tensor:
        return student.pooled.mean()


class Unsaved(Constant):
    """Its state lacks a buffer that each step changes."""

    def term(self, student: Features, teacher: Features) -> Tensor:
        self.memory += 1
        return student.pooled.mean()


class Unequal(Constant):
    """Its state lacks a buffer that each new method draws."""

    def __init__(self, *networks: Any, **shared: Any) -> None:
        super().__init__(*networks, **shared)
        torch.seed()
        self.memory = torch.rand(3)


class Repeated(Extra):
    """Has two phases of one name."""

    def phases(self) -> Any:
        yield from super().phases()
        yield from super().phases()

    def term(self, student: Features, teacher: Features) -> Tensor:
        return student.pooled.mean()


class TeacherLast(Repeated):
    """Ends with a phase of the teacher alone."""

    def phases(self) -> Any:
        for phase in KD.phases(self):
            yield dataclasses.replace(phase, teacher_only=True)


class Phaseless(Repeated):
    """Has no phase."""

    def phases(self) -> Any:
        yield from ()


STUDENT_LAST = "the last phase must train the student: yield one with teacher_only=False at the end"
FAULTY_PHASES = [
    (Repeated, "2 phases have the name 'distill'; give each phase another one"),
    (TeacherLast, STUDENT_LAST),
    (Phaseless, STUDENT_LAST),
]


@pytest.fixture
def build(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> Callable[..., KD]:
    """Return a function that builds a method with the settings of AT."""
    settings = composed("method=at").method

    def build_one(kind: type[KD], images: Images) -> KD:
        kind.terms = (*KD.terms, "at")
        monkeypatch.setitem(METHODS, "at", kind)
        torch.manual_seed(0)
        student, teacher = (build_model("resnet8", images.num_classes) for _ in range(2))
        method = build_method(settings, student, teacher, images)
        assert isinstance(method, KD)
        return method

    return build_one


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ForgottenAdapter, "the loss trains layer.bias, layer.weight; see Method.adapters"),
        (UnusedAdapter, "no loss depends on "),
        (MovingTeacher, "changes teacher."),
        (Unnamed, "the terms are .* the weights"),
        *FAULTY_PHASES,
    ],
)
def test_a_phase_that_trains_the_wrong_thing_fails(
    build: Callable[..., KD], kind: type[KD], message: str
) -> None:
    images = random_images(3, 4)
    with pytest.raises(CheckError, match=message):
        check_phases(build(kind, images), images)


@pytest.mark.parametrize(("kind", "message"), FAULTY_PHASES)
def test_faulty_phases_end_before_training(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: type[KD],
    message: str, small_teacher: SmallTeacher,
) -> None:  # fmt: skip
    small_teacher.put(tmp_path / "runs")
    kind.terms = (*KD.terms, "at")
    config = composed(*SMALL, "method=at", "force=true")
    monkeypatch.setitem(METHODS, "at", kind)
    with pytest.raises(UserError) as caught:
        train(config)
    assert str(caught.value) == f"method=at: {message}"
    assert not (tmp_path / "runs/digits/distill").exists()


def test_a_hidden_counter_fails_the_resume(build: Callable[..., KD]) -> None:
    images = random_images(12, 4)
    with pytest.raises(CheckError, match="differs after a resume"):
        check_resume(lambda: build(Counter, images), images)


def test_an_unnamed_teacher_output_fails(build: Callable[..., KD]) -> None:
    images = random_images(8, 4)
    with pytest.raises(
        CheckError, match=r"pooled of the teacher, which teacher_outputs \(logits\)"
    ):
        check_teacher_outputs(build(Greedy, images), images)


@pytest.mark.filterwarnings("ignore:std")
def test_a_loss_without_a_value_for_one_image_fails(build: Callable[..., KD]) -> None:
    images = random_images(8, 4)
    with pytest.raises(CheckError, match="the loss is not finite"):
        check_single_image(build(Divided, images), images)


def test_a_method_that_does_not_learn_fails(build: Callable[..., KD]) -> None:
    images = random_images(8, 4)
    with pytest.raises(CheckError, match="instead of 100 percent"):
        check_overfits(build(Opposed, images), images)


def test_a_buffer_outside_of_the_state_fails(build: Callable[..., KD]) -> None:
    images = random_images(12, 4)
    with pytest.raises(CheckError, match="phase distill: memory differs after a resume"):
        check_resume(lambda: build(Unsaved, images), images)
    with pytest.raises(CheckError, match="memory is not in the state"):
        check_state(lambda: build(Unequal, images))


def test_a_constant_buffer_may_be_outside_of_the_state(build: Callable[..., KD]) -> None:
    images = random_images(12, 4)
    check_state(lambda: build(Constant, images))
    check_resume(lambda: build(Constant, images), images)


class Planted(Extra):
    """Has a fault that each test defines: what it makes of the student's pooled feature."""

    fault: Callable[[Tensor], Tensor]

    def term(self, student: Features, teacher: Features) -> Tensor:
        return type(self).fault(student.pooled).float().mean()


class WaitsAfterwards(Constant):
    """Waits for the device after a step."""

    def after_step(self) -> None:
        self.memory.fill_(float(self.memory.sum()))


class WaitsForStored(Constant):
    """Waits for the device if the teacher's outputs are stored: then there are no stages."""

    def term(self, student: Features, teacher: Features) -> Tensor:
        if not teacher.stages:
            teacher.logits.sum().item()
        return student.pooled.mean()


class OutsideOfBuffers(Constant):
    """Keeps a tensor in an attribute, which stays on the host."""

    def __init__(self, *networks: Any, **shared: Any) -> None:
        super().__init__(*networks, **shared)
        self.scale = torch.ones(64)

    def term(self, student: Features, teacher: Features) -> Tensor:
        return (student.pooled * self.scale).mean()


class FirstPhase(Constant):
    """Waits for the device in a phase before the last one."""

    def phases(self) -> Any:
        (last,) = super().phases()
        yield dataclasses.replace(last, name="first", after_step=self.wait)
        yield last

    def wait(self) -> None:
        self.memory.tolist()


class InPlace(Constant):
    """Changes a buffer in place."""

    def after_step(self) -> None:
        self.memory.copy_(self.memory.roll(1) + 1)


class Replaced(Constant):
    """Puts another tensor in the place of a buffer."""

    def after_step(self) -> None:
        self.memory = self.memory + 1


class ReplacedData(Constant):
    """Puts another tensor's memory in the place of a buffer's."""

    def after_step(self) -> None:
        self.memory.data = self.memory + 1


class Swapped(Constant):
    """Swaps two buffers."""

    other: Tensor

    def __init__(self, *networks: Any, **shared: Any) -> None:
        super().__init__(*networks, **shared)
        self.register_buffer("other", torch.zeros(3))

    def after_step(self) -> None:
        self.memory, self.other = self.other, self.memory


Fault = Callable[[Tensor], Tensor]
WAITING: list[Fault] = [
    lambda pooled: pooled / pooled.max().item(),
    lambda pooled: pooled if pooled.mean() > 0 else -pooled,
    lambda pooled: pooled * len(pooled.tolist()),
    lambda pooled: pooled.cpu().mean(),
    lambda pooled: pooled * pooled.detach().numpy().max(),
    lambda pooled: pooled[pooled > 0],
    lambda pooled: pooled[pooled[:, 0].nonzero()],
    lambda pooled: pooled.unique(),
    lambda pooled: pooled[:, 0].long().bincount() + pooled.mean(),
    lambda pooled: pooled.repeat_interleave(pooled[:, 0].long(), 0),
    lambda pooled: pooled.clone().index_put_((pooled[:, 0] > 0,), pooled.mean(0)),
    lambda pooled: (pooled, pooled.register_hook(lambda grad: grad / grad.max().item()))[0],
]
ON_HOST: list[Fault] = [
    lambda pooled: pooled * torch.tensor(3.0),
    lambda pooled: pooled[torch.arange(2)],
    lambda pooled: pooled + torch.from_numpy(np.ones(64, "float32")).to(pooled.device),
]
MIXED: list[Fault] = [
    lambda pooled: pooled + torch.ones(64),
    lambda pooled: torch.cat([pooled, torch.zeros(2, 64)]),
]
SOUND: list[Fault] = [
    lambda pooled: pooled[torch.arange(2, device=pooled.device)],
    lambda pooled: torch.where(pooled > 0, pooled, 0) * torch.rand_like(pooled),
    lambda pooled: pooled.clone().index_put_((pooled[:, 0] > 0,), pooled.new_zeros(())),
    lambda pooled: torch.repeat_interleave(pooled, pooled[:, 0].long(), 0, output_size=9),
]


def check_planted(build: Callable[..., KD], fault: Fault, **attributes: Any) -> None:
    kind = type("Planted", (Planted,), {"fault": staticmethod(fault), **attributes})
    check_built(build, kind)


def check_built(build: Callable[..., KD], kind: type[KD]) -> None:
    images = random_images(8, 4)
    check_device(build(kind, images), images)


@pytest.mark.parametrize(
    "fault",
    [
        lambda pooled: pooled * random.random(),
        lambda pooled: pooled[: random.choice([2, 3])],
        lambda pooled: pooled.sin() if random.random() < 0.5 else pooled.cos(),
    ],
)
def test_what_python_draws_in_a_step_fails(build: Callable[..., KD], fault: Fault) -> None:
    random.seed(3)  # with it each fault differs between the last two steps
    with pytest.raises(CheckError, match=r"phase distill: two steps differ in what Python decides"):
        check_planted(build, fault)
    check_planted(build, fault, capturable=False)


@pytest.mark.parametrize("fault", [*WAITING, *ON_HOST, *MIXED])
def test_a_step_that_leaves_the_device_fails(build: Callable[..., KD], fault: Fault) -> None:
    what = "needs the values of a tensor" if fault in WAITING else "uses a tensor of the CPU"
    place = rf"\S*test_checks\.py:{fault.__code__.co_firstlineno}"
    with pytest.raises(CheckError, match=rf"^phase distill: {place} {what} \("):
        check_planted(build, fault)


@pytest.mark.parametrize(
    ("fault", "operation"),
    [(WAITING[6], "aten.nonzero.default"), (ON_HOST[1], "aten.arange.default")],
)
def test_a_fault_on_the_device_names_its_operation(
    build: Callable[..., KD], fault: Fault, operation: str
) -> None:
    with pytest.raises(CheckError, match=rf"a tensor.* \({operation}\);"):
        check_planted(build, fault)


@pytest.mark.skipif(torch.__version__ < "2.15", reason="torch does not report the copy")
def test_a_copy_of_numbers_fails(build: Callable[..., KD]) -> None:
    with pytest.raises(CheckError, match=r"uses a tensor of the CPU \(aten.lift_fresh.default\)"):
        check_planted(build, lambda pooled: pooled[[0, 2]])


@pytest.mark.parametrize("fault", SOUND)
def test_a_step_that_stays_on_the_device_passes(build: Callable[..., KD], fault: Fault) -> None:
    check_planted(build, fault)


@pytest.mark.parametrize("fault", [WAITING[0], WAITING[3], WAITING[5], *ON_HOST])
def test_a_step_without_a_graph_may_wait(build: Callable[..., KD], fault: Fault) -> None:
    check_planted(build, fault, capturable=False)


@pytest.mark.parametrize("fault", MIXED)
def test_no_step_mixes_devices(build: Callable[..., KD], fault: Fault) -> None:
    with pytest.raises(CheckError, match="uses a tensor of the CPU"):
        check_planted(build, fault, capturable=False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WaitsAfterwards, r"^phase distill: .*needs the values of a tensor \("),
        (WaitsForStored, r"^phase distill: .*needs the values of a tensor \("),
        (FirstPhase, r"^phase first: .*needs the values of a tensor \("),
        (OutsideOfBuffers, r"^phase distill: .*uses a tensor of the CPU \("),
        (Replaced, r"^phase distill: .*in the place of memory; change it in place \(copy_\)"),
        (ReplacedData, "in the place of memory;"),
        (Swapped, "in the place of memory, other;"),
    ],
)
def test_a_method_that_leaves_the_device_fails(
    build: Callable[..., KD], kind: type[KD], message: str
) -> None:
    with pytest.raises(CheckError, match=message):
        check_built(build, kind)


def test_a_buffer_may_change_in_place(build: Callable[..., KD]) -> None:
    check_built(build, InPlace)


def test_without_a_graph_a_buffer_may_be_replaced(build: Callable[..., KD]) -> None:
    check_built(build, type("Free", (Replaced,), {"capturable": False}))


class Network(nn.Module):
    """A resnet8 whose features a test changes."""

    def __init__(self, classes: int, change: Callable[[Features], Any]) -> None:
        super().__init__()
        self.network = build_model("resnet8", classes)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.network(x))


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], str]:
    def register(change: Callable[[Features], Any]) -> str:
        monkeypatch.setitem(ARCHITECTURES, "mine", lambda classes: Network(classes, change))
        return "mine"

    return register


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda features: features.logits, "does not return Features"),
        (lambda features: features._replace(logits=features.logits[:, :3]), "logits have shape"),
        (lambda features: features._replace(pooled=features.stem), "pooled has shape"),
        (lambda features: features._replace(stem=features.pooled), "should be"),
        (lambda features: features._replace(preacts=features.preacts[1:]), "differ in shape"),
    ],
)
def test_features_of_a_wrong_shape_fail(
    network: Callable[..., str], change: Callable[[Features], Any], message: str
) -> None:
    with pytest.raises(CheckError, match=message):
        check_features(network(change))


def test_a_network_without_a_gradient_fails(network: Callable[..., str]) -> None:
    with pytest.raises(CheckError, match="has no finite gradient"):
        check_gradients(network(lambda f: f._replace(logits=f.logits * torch.nan)))


def test_a_network_that_mixes_images_fails(network: Callable[..., str]) -> None:
    def centre(features: Features) -> Features:
        return features._replace(pooled=features.pooled - features.pooled.mean(0))

    with pytest.raises(CheckError, match="depend on the other images"):
        check_image_alone(network(centre))


class Hidden(nn.Module):
    """A resnet8 whose trace has an offset that a batch of other images lacks."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = build_model("resnet8", classes)

    def forward(self, x: Tensor) -> Features:
        features: Features = self.network(x)
        seen = x.shape[2] if type(x.shape[2]) is int else 32
        return features._replace(pooled=features.pooled + seen)


class Counting(Network):
    """Counts its batches in a buffer, also in eval mode."""

    batches: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__(classes, lambda features: features)
        self.register_buffer("batches", torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        self.batches += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Hidden, "the network has different features for 2 images of 64 pixels a side"),
        (Counting, "a teacher changes batches in eval mode"),
    ],
)
def test_a_network_that_is_no_teacher_fails(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], message: str
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "mine", kind)
    with pytest.raises(CheckError, match=message):
        check_teacher("mine")


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "ShuffleV2"])
def test_the_suites_networks_are_teachers(name: str) -> None:
    check_teacher(name)


def test_a_network_that_is_another_is_not_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "mine", ARCHITECTURES["resnet8"])
    with pytest.raises(CheckError, match=r"recognised as \('resnet8', 7\)"):
        check_recognition("mine")


def test_the_command_prints_a_line_for_each_check(capsys: Any) -> None:
    assert main(["dataset", "digits"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["ok"] * 4


@pytest.mark.parametrize(
    ("script", "name"), [("/venv/bin/sskd-checks", "sskd-checks"), ("-m", "python -m sskd.checks")]
)
def test_the_help_names_the_command(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, script: str, name: str
) -> None:
    monkeypatch.setattr("sys.argv", [script])
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {name} ")
    assert f"SSKD_EXTENSIONS=dist.py {name} method dist --config-dir conf" in shown
    assert shown.count("sskd-checks") + shown.count("sskd.checks") == 5


def test_a_failed_check_is_an_error_of_the_suite() -> None:
    assert CheckError.__module__ == "sskd.errors"
    assert "CheckError" in str(errors.__doc__)


def test_the_command_fails_if_a_check_fails(
    capsys: Any, network: Callable[..., str], tmp_path: Path
) -> None:
    name = network(lambda features: features._replace(logits=features.logits[:, :3]))
    (tmp_path / "arch").mkdir()
    (tmp_path / f"arch/{name}.yaml").write_text(f"name: {name}\nbase_lr: 0.05\n")
    assert main(["arch", name, "--config-dir", str(tmp_path)]) == 1
    assert "FAILED  shapes of the features: logits have shape (2, 3)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method", "kdd"], "method=kdd: no such method; did you mean 'kd'?"),
        (["method", "kd", "method.temperature=0"], "method.temperature: should be greater than 0"),
        (["dataset", "folder", "dataset.root=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(capsys: Any, words: list[str], message: str) -> None:
    assert main(words) == 1
    captured = capsys.readouterr()
    assert message in captured.out + captured.err
