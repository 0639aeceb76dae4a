"""Every method with every pair of networks: it takes the pair, or refuses it by name."""

from __future__ import annotations

import copy
from functools import cache, partial
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import Compose, random_images
from torch import nn

from sskd.data import Batch, Images
from sskd.errors import UserError
from sskd.methods import Outputs, build_method, ft
from sskd.methods.adapters import conv_regressor
from sskd.methods.kd import Distillation
from sskd.methods.networks import Networks, modules_behind, probe_features
from sskd.methods.simkd import Projector, simkd_loss
from sskd.models import Features, build_model
from sskd.teachers.assembly import assemble
from sskd.train import train

# The channels of the stem and of each stage: one network for each combination that the networks
# for CIFAR have, from the papers' tables (MobileNetV2 with half the width).
LEVELS = {
    "resnet8": (16, 16, 32, 64),
    "resnet8x4": (32, 64, 128, 256),
    "wrn_16_1": (16, 16, 32, 64),
    "wrn_16_2": (16, 32, 64, 128),
    "ShuffleV1": (24, 240, 480, 960),
    "ShuffleV2": (24, 116, 232, 464),
    "vgg8": (64, 128, 256, 512, 512),
    "ResNet50": (64, 256, 512, 1024, 2048),
    "MobileNetV2": (16, 12, 16, 48, 160),
}
STAGE_BY_STAGE = {"at", "vid", "ab", "nst", "hsakd", "reviewkd", "ofd"}
METHODS_WITH_FEATURES = sorted(
    ["fitnet", "at", "sp", "vid", "rkd", "pkt", "ab", "ft", "crd", "cc", "nst", "fsp", "reviewkd",
     "ofd", "srrl", "cat_kd"]
)  # fmt: skip


def refused(method: str, teacher: str, student: str) -> bool:
    if method == "fsp":
        return LEVELS[teacher] != LEVELS[student]
    if method == "ofd" and teacher == "ShuffleV2":  # its last BatchNorm has half the channels
        return True
    return method in STAGE_BY_STAGE and len(LEVELS[teacher]) != len(LEVELS[student])


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """Return one network of each family; the tests here change none of them."""
    torch.manual_seed(0)
    return {name: build_model(name, 5).eval() for name in LEVELS}


@pytest.fixture(scope="module")
def images() -> Images:
    return random_images(10, 2)


@pytest.fixture(scope="module")
def features(networks: dict[str, nn.Module]) -> dict[str, Features]:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return {name: network(x) for name, network in networks.items()}


@pytest.fixture(scope="module")
def probed(networks: dict[str, nn.Module], images: Images) -> dict[int, Features]:
    return {id(network): probe_features(network, images) for network in networks.values()}


@pytest.fixture
def _probe_once(monkeypatch: pytest.MonkeyPatch, probed: dict[int, Features]) -> None:
    """Compute the features from which a method reads sizes once for each network."""
    monkeypatch.setattr(
        Networks, "probe", lambda pair: (probed[id(pair.student)], probed[id(pair.teacher)])
    )


@pytest.mark.usefixtures("_probe_once")
@pytest.mark.parametrize("method", METHODS_WITH_FEATURES)
def test_every_method_takes_or_refuses_every_pair(
    composed: Compose,
    method: str,
    networks: dict[str, nn.Module],
    features: dict[str, Features],
    images: Images,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Only shapes are tested, and most of the time is the initialisation of the widest layers.
    constant = partial(nn.init.constant_, val=0.01)
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda weight, **_: constant(weight))
    # It depends on the teacher alone, and has a hundred million weights if that is wide.
    monkeypatch.setattr(ft, "Paraphraser", cache(ft.Paraphraser))
    settings = composed(f"method={method}").method
    y, index, crop = torch.tensor([[0, 1], [4, 7], [0, 0]])
    batch = Batch(torch.zeros(2, 3, 32, 32), y, index, crop)
    for teacher in LEVELS:
        for student in LEVELS:
            pair = networks[student], networks[teacher]
            if refused(method, teacher, student):
                with pytest.raises(UserError, match="choose networks"):
                    build_method(settings, *pair, images)
                continue
            built = build_method(settings, *pair, images)
            assert isinstance(built, Distillation)
            outputs = Outputs(features[student], features[teacher], batch)
            with torch.no_grad():
                terms = built.feature_terms(outputs)
                for phase in list(built.phases())[:-1]:
                    if student == teacher or not phase.teacher_only:
                        terms |= phase.loss(batch).terms
            assert terms, "the method computed no term"
            assert all(term.isfinite() for term in terms.values()), (teacher, student)


def test_simkd_projects_the_map_of_every_pair(
    features: dict[str, Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = partial(nn.init.constant_, val=0.01)
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda weight, **_: constant(weight))
    for teacher, student in product(LEVELS, LEVELS):
        own, target = features[student].last_map, features[teacher].last_map
        with torch.no_grad():
            projected = Projector(own, target, reduction=2)(own)
            assert projected.shape[:2] == target.shape[:2]
            assert simkd_loss(projected, target).isfinite()


def test_hsakd_needs_equally_many_stages(
    composed: Compose, networks: dict[str, nn.Module], images: Images
) -> None:
    settings = composed("method=hsakd").method
    with pytest.raises(UserError, match="choose networks with the same number of stages"):
        build_method(settings, networks["vgg8"], networks["resnet8"], images)


@pytest.mark.usefixtures("_probe_once")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fitnet_takes_any_stage_of_any_pair(
    composed: Compose,
    stage: int,
    networks: dict[str, nn.Module],
    features: dict[str, Features],
    images: Images,
) -> None:
    settings = composed("method=fitnet", f"method.stage={stage}").method
    for teacher, of_teacher in features.items():
        for student, of_student in features.items():
            built = build_method(settings, networks[student], networks[teacher], images)
            mapped = built.get_submodule("regressor")(of_student.stages[stage - 1])
            assert mapped.shape == of_teacher.stages[stage - 1].shape


@pytest.mark.parametrize("trains", ["teacher.train=true", "teacher.train=false"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method=fsp", "pair=vgg13-MobileNetV2"), "method=fsp vgg13-MobileNetV2: needs the same"),
        (("method=at", "arch@student=vgg8"), "method=at wrn_40_2-vgg8: .*the teacher has 3 stages"),
        (("method=fitnet", "method.stage=4"), "method=fitnet wrn_40_2-wrn_16_2: method.stage=4"),
        (("method=vid", "method.variance=1e-6"), "method.variance=1e-06: must be above"),
        (("method=cat_kd", "method.resolution=9"), "method.resolution=9: .* use at most 8"),
        (("method=mlld", "augmentation=weak_and_strong"), "has strong views of its own; use aug"),
        (("method=mlld", "optimizer=adamw"), "add method.distill.lr=null to train the phase at"),
        (("method=sskd", "optimizer=adamw"), "add method.ss_head.lr=null to train the phase at"),
        (
            ("method=hsakd", "optimizer.momentum=0"),
            "above 0; change the setting of the optimizer, or method.n",
        ),
        (("method=hsakd", "teacher.method=hsakd_teacher"), "teacher.epoch=best: method=hsakd"),
        (
            ("method=hsakd", "teacher.method=hsakd_teacher", "teacher.checkpoint=FILE"),
            "no effect with teacher.checkpoint",
        ),
    ],
)
def test_impossible_pairs_are_refused_before_training(
    composed: Compose, tmp_path: Path, overrides: tuple[str, ...], message: str, trains: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(composed("dataset=digits", trains, *overrides))
    assert not list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob("config.yaml"))


def test_crd_needs_a_second_class(composed: Compose) -> None:
    config = composed("method=crd", "arch@teacher=resnet14", "arch@student=resnet8")
    with pytest.raises(UserError, match="needs images of a second class"):
        assemble(config, random_images(4, 4, classes=1))


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape"),
    [((6, 8, 8), (9, 8, 8)), ((6, 8, 8), (9, 16, 16)), ((6, 8, 8), (9, 4, 4)),
     ((6, 8, 8), (9, 7, 7)), ((6, 8, 8), (9, 1, 1))],
)  # fmt: skip
def test_the_regressor_returns_the_teachers_shape(
    student_shape: tuple[int, int, int], teacher_shape: tuple[int, int, int]
) -> None:
    regressor = conv_regressor(torch.Size(student_shape), torch.Size(teacher_shape))
    assert regressor(torch.randn(2, *student_shape)).shape == (2, *teacher_shape)


def test_the_regressor_refuses_a_much_smaller_map() -> None:
    with pytest.raises(UserError, match="cannot map the student's 4x4 to the teacher's 16x16"):
        conv_regressor(torch.Size((6, 4, 4)), torch.Size((6, 16, 16)))


@pytest.mark.parametrize("outputs", ["stages", "preacts"])
@pytest.mark.parametrize("name", LEVELS)
def test_the_body_alone_changes_the_outputs(name: str, outputs: str, images: Images) -> None:
    network = build_model(name, 5).eval()
    parts = modules_behind(network, images, lambda features: getattr(features, outputs))
    found = {id(parameter) for part in parts for parameter in part.parameters()}
    assert all(parameter.requires_grad for parameter in network.parameters())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = getattr(network(x), outputs)
        for label, child in network.named_children():
            kept = copy.deepcopy(child.state_dict())
            for parameter in child.parameters():
                parameter.add_(torch.rand_like(parameter))
            after = getattr(network(x), outputs)
            changed = any(not torch.equal(*maps) for maps in zip(before, after, strict=True))
            child.load_state_dict(kept)
            assert {id(parameter) in found for parameter in child.parameters()} == {changed}, label


def test_frozen_parameters_stay_frozen(images: Images) -> None:
    network = build_model("resnet8", 5)
    network.conv1.requires_grad_(False)
    modules_behind(network, images, lambda features: features.stages)
    frozen = [name for name, each in network.named_parameters() if not each.requires_grad]
    assert frozen == ["conv1.weight"]


def test_a_body_with_unused_parameters_is_refused(images: Images) -> None:
    class Scaled(nn.Module):
        """A network with a parameter beside a module that has an unused classifier."""

        def __init__(self) -> None:
            super().__init__()
            self.network = build_model("resnet8", 5)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> Features:
            found: Features = self.network(x)
            return found._replace(stages=tuple(self.scale * maps for maps in found.stages))

    with pytest.raises(ValueError, match="a module that also holds"):
        modules_behind(Scaled(), images, lambda features: features.stages)
