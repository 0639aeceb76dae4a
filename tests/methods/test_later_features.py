"""LumiNet, ReviewKD and OFD: their losses against loops in float64, and their properties."""

from __future__ import annotations

import itertools
import math
from statistics import fmean
from typing import Any

import pytest
import torch
from conftest import Compose
from omegaconf import OmegaConf
from torch import Tensor, nn

import sskd.invocation.resolvers  # noqa: F401  ${by_pair:...}
from sskd import CONF
from sskd.data import Batch, Images
from sskd.errors import UserError
from sskd.methods import Networks, Outputs, build_method
from sskd.methods.adapters import BatchNorm
from sskd.methods.luminet import luminet_loss, perception
from sskd.methods.networks import last_layers
from sskd.methods.ofd import OFD, negative_means, ofd_loss
from sskd.methods.reviewkd import Fusion, ReviewKD, hcl_loss
from sskd.models import Features, build_model, fold_batch_norms

Row = list[float]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settings_of(method: str, pair: str) -> dict[str, Any]:
    """Return the settings in ``conf/method`` for a pair, without composing a whole run."""
    teacher, student = pair.split("-")
    networks = {"teacher": {"name": teacher}, "student": {"name": student}}
    settings = OmegaConf.load(CONF / "method" / f"{method}.yaml")
    root: Any = OmegaConf.to_container(
        OmegaConf.create({**networks, "method": settings}), resolve=True
    )
    return dict(root["method"])


def softmax(row: Row) -> Row:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def perceived(logits: Tensor, temperature: float) -> list[Row]:
    columns = []
    for column in logits.double().T.tolist():
        mean = fmean(column)
        variance = fmean((value - mean) ** 2 for value in column)
        columns.append([(z - mean) / math.sqrt(variance + 1e-5) / temperature for z in column])
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_luminet_equals_loops(temperature: float) -> None:
    student, teacher = (3 * random(5, 7, seed=seed) + 2 for seed in (1, 2))
    rows = []
    both = (perceived(logits, temperature) for logits in (teacher, student))
    for p, q in (map(softmax, pair) for pair in zip(*both, strict=True)):
        rows.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    found = luminet_loss(student, teacher, temperature)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(fmean(rows), rel=1e-5)


def test_luminet_sees_no_scale_and_no_offset_of_a_class() -> None:
    student, teacher = random(6, 4, seed=1), random(6, 4, seed=2)
    changed = teacher * torch.tensor([2.0, 3.0, 5.0, 7.0]) + torch.tensor([1.0, -2.0, 4.0, 0.0])
    assert luminet_loss(student, changed, 4).item() == pytest.approx(
        luminet_loss(student, teacher, 4).item(), rel=1e-3
    )
    assert luminet_loss(changed, changed, 4).item() == 0
    assert luminet_loss(student, teacher.flip(1), 4) != luminet_loss(student, teacher, 4)


def test_equal_logits_of_a_class_give_zeros_and_a_finite_gradient() -> None:
    logits = random(4, 3)
    logits[:, 1] = 7
    assert perception(logits)[:, 1].tolist() == [0, 0, 0, 0]
    one_image = random(1, 3).requires_grad_()
    loss = luminet_loss(one_image, random(1, 3, seed=1), 4)
    loss.backward()
    assert loss.item() == 0
    assert one_image.grad is not None
    assert one_image.grad.isfinite().all()


def test_luminet_has_the_authors_settings_of_a_pair() -> None:
    expected = {  # CE's weight, alpha, T
        "resnet56-resnet20": (2, 31, 4), "resnet32x4-resnet8x4": (2, 33, 4),
        "vgg13-vgg8": (1, 70, 8), "wrn_40_2-wrn_40_1": (1, 75, 8),
        "vgg13-MobileNetV2": (2, 70, 8), "ResNet50-MobileNetV2": (2, 70, 8),
        "wrn_40_2-ShuffleV1": (2, 35, 4),
    }  # fmt: skip
    for pair, (ce, alpha, temperature) in expected.items():
        settings = settings_of("luminet", pair)
        assert settings["weights"] == {"ce": ce, "luminet": alpha**2}
        assert settings["temperature"] == temperature


def pooled(channel: list[Row], size: int) -> Row:
    """Return a square map, average-pooled to ``size`` x ``size``, row by row."""
    ratio = len(channel) // size
    cells = [(ratio * y, ratio * x) for y in range(size) for x in range(size)]
    return [
        fmean(channel[y + i][x + j] for i in range(ratio) for j in range(ratio)) for y, x in cells
    ]


@pytest.mark.parametrize(
    ("size", "weights"),
    [(8, {8: 8, 4: 4, 2: 2, 1: 1}), (4, {4: 8, 2: 4, 1: 2}), (2, {2: 8, 1: 4}), (1, {1: 8})],
)
def test_hcl_equals_loops(size: int, weights: dict[int, int]) -> None:
    """``weights`` has a weight for each size to which the maps are pooled, up to a factor."""
    student, teacher = random(2, 3, size, size, seed=1), random(2, 3, size, size, seed=2)
    total = 0.0
    for pooled_size, weight in weights.items():
        differences = [
            (a - b) ** 2
            for image in range(2)
            for channel in range(3)
            for a, b in zip(
                *(pooled(m[image][channel].tolist(), pooled_size) for m in (student, teacher)),
                strict=True,
            )
        ]
        total += weight * fmean(differences)
    found = hcl_loss(student, teacher)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(total / sum(weights.values()), rel=1e-5)
    assert hcl_loss(student, student) == 0


def test_a_fused_map_is_the_attended_sum() -> None:
    fusion = Fusion(3, 7, width=2, is_deepest=False).eval().double()
    own, deeper = random(2, 3, 4, 4, seed=1).double(), random(2, 2, 2, 2, seed=2).double()
    with torch.no_grad():
        reduced = fusion.reduce(own)
        fused, mapped = fusion(own, deeper, torch.Size((8, 8)))
    weight = fusion.get_parameter("attention.0.weight")[:, :, 0, 0].tolist()
    bias = fusion.get_parameter("attention.0.bias").tolist()
    for n, y, x in ((0, 0, 0), (1, 5, 2), (0, 7, 7)):
        # From 4x4 to 8x8, a pixel is repeated twice; the deeper map of 2x2, four times.
        one = reduced[n, :, y // 2, x // 2].tolist()
        other = deeper[n, :, y // 4, x // 4].tolist()
        scores = [sum(map(math.prod, zip(row, one + other, strict=True))) for row in weight]
        shares = [1 / (1 + math.exp(-s - b)) for s, b in zip(scores, bias, strict=True)]
        expected = [shares[0] * a + shares[1] * b for a, b in zip(one, other, strict=True)]
        assert fused[n, :, y, x].tolist() == pytest.approx(expected)
    assert mapped.shape == (2, 7, 8, 8)


def test_the_first_level_trains_the_deepest() -> None:
    deepest = Fusion(5, 4, width=2, is_deepest=True)
    shallow = Fusion(3, 4, width=2, is_deepest=False)
    fused, _ = deepest(random(2, 5, 1, 1), None, torch.Size((1, 1)))
    _, mapped = shallow(random(2, 3, 4, 4), fused, torch.Size((4, 4)))
    hcl_loss(mapped, random(2, 4, 4, 4)).backward()
    gradient = deepest.get_parameter("reduce.1.bias").grad
    assert gradient is not None
    assert gradient.abs().min() > 0


def test_a_batch_norm_of_one_value_uses_the_running_statistics() -> None:
    layer, usual = BatchNorm(3), nn.BatchNorm2d(3)
    two = random(2, 3, 1, 1)
    assert torch.equal(layer(two), usual(two))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert torch.equal(layer(two[:1]), usual.eval()(two[:1]))
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


def reviewkd(teacher: str, student: str, images: Images) -> ReviewKD:
    networks = Networks(build_model(student, 4), build_model(teacher, 4), images)
    return ReviewKD(networks, largest_width=512, warmup=0.1, weights={"ce": 1.0, "reviewkd": 5.0})


@pytest.mark.parametrize(
    ("teacher", "student", "width", "teachers"),
    [("resnet8x4", "resnet8", 64, [256, 256, 128, 64]),
     ("vgg8", "MobileNetV2", 512, [512, 512, 512, 256, 128])],
)  # fmt: skip
def test_reviewkd_has_a_fusion_for_each_stage_and_the_pooled_feature(
    teacher: str, student: str, width: int, teachers: list[int], few_images: Images
) -> None:
    method = reviewkd(teacher, student, few_images)
    expansions = [fusion.get_parameter("expand.0.weight") for fusion in method.fusions]
    assert [each.shape for each in expansions] == [(c, width, 3, 3) for c in teachers]


def test_reviewkd_equals_its_levels(few_images: Images) -> None:
    method = reviewkd("resnet8x4", "resnet8", few_images).eval()
    x = random(2, 3, 32, 32)
    with torch.no_grad():
        student, teacher = method.student(x), method.teacher(x)
        found = method.feature_terms(Outputs(student, teacher, Batch(x, x, x, x)))["reviewkd"]
        own = [student.pooled[:, :, None, None], *reversed(student.stages)]
        targets = [teacher.pooled[:, :, None, None], *reversed(teacher.preacts)]
        fused, total = None, 0.0
        for fusion, one, other in zip(method.fusions, own, targets, strict=True):
            fused, mapped = fusion(one, fused, other.shape[2:])
            total += hcl_loss(mapped, other).item()
    assert found.item() == pytest.approx(total)


def test_cat_kd_has_the_authors_settings_of_a_pair() -> None:
    expected = {  # beta, resolution, normalise
        "resnet56-resnet20": (0.7, 2, False), "wrn_40_2-wrn_40_1": (1.5, 2, False),
        "vgg13-vgg8": (4.5, 2, False), "vgg13-MobileNetV2": (15, 2, True),
        "ResNet50-MobileNetV2": (40, 2, True), "wrn_40_2-ShuffleV1": (80, 4, True),
    }  # fmt: skip
    for pair, (beta, resolution, normalise) in expected.items():
        settings = settings_of("cat_kd", pair)
        assert settings["weights"] == {"ce": 1, "cat": beta}
        assert (settings["resolution"], settings["normalise"]) == (resolution, normalise)


@pytest.mark.parametrize("name", ["luminet", "reviewkd", "dkd"])
def test_the_main_phase_has_the_warmup_of_the_file(
    name: str, composed: Compose, few_images: Images
) -> None:
    student, teacher = (build_model("resnet8", few_images.num_classes) for _ in range(2))
    method = build_method(composed(f"method={name}").method, student, teacher, few_images)
    phase = list(method.phases())[-1]
    assert set(phase.warmup) == set(method.terms) - {"ce"}
    assert set(phase.warmup.values()) == {20 / 240}


def test_reviewkd_refuses_other_numbers_of_stages(few_images: Images) -> None:
    with pytest.raises(UserError, match="4 stages, the student 3; choose networks"):
        reviewkd("vgg8", "resnet8", few_images)


def test_reviewkd_has_the_weight_of_a_pair() -> None:
    expected = {
        "wrn_40_2-wrn_16_2": 5, "resnet32x4-ShuffleV2": 8, "resnet56-resnet20": 0.6,
        "resnet110-resnet32": 1, "ResNet50-MobileNetV2": 30, "vgg13-vgg8": 5,
    }  # fmt: skip
    found = {pair: settings_of("reviewkd", pair)["weights"]["reviewkd"] for pair in expected}
    assert found == expected


def mean_below_zero(mean: float, deviation: float) -> float:
    """Integrate a normal distribution below 0 by sums."""
    points = [-20 + 0.001 * k for k in range(20_000)]
    weights = [math.exp(-(((x - mean) / deviation) ** 2) / 2) for x in points]
    return sum(x * w for x, w in zip(points, weights, strict=True)) / sum(weights)


def test_margins_equal_integrals() -> None:
    cases = [(0.0, 1.0), (-2.0, 0.5), (1.0, -1.5), (3.0, 1.0)]  # mean, weight
    layer = nn.BatchNorm2d(len(cases))
    with torch.no_grad():
        for place, (mean, weight) in enumerate(cases):
            layer.bias[place], layer.weight[place] = mean, weight
    expected = [mean_below_zero(mean, abs(weight)) for mean, weight in cases]
    assert negative_means(layer).tolist() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("mean", "weight", "margin"),
    [(4.0, 1.0, -3.0), (4.0, -0.5, -1.5), (-2.0, 0.0, -2.0), (2.0, 0.0, 0.0), (0.0, 0.0, 0.0)],
)
def test_the_margin_of_a_channel_without_negative_values(
    mean: float, weight: float, margin: float
) -> None:
    layer = nn.BatchNorm2d(1)
    nn.init.constant_(layer.bias, mean)
    nn.init.constant_(layer.weight, weight)
    assert negative_means(layer).item() == margin


def test_ofd_equals_loops() -> None:
    student, teacher = 2 * random(2, 3, 4, 4, seed=1), 2 * random(2, 3, 4, 4, seed=2)
    margin = torch.tensor([-0.5, -1.0, -0.1])
    total = 0.0
    for n, c, y, x in itertools.product(range(2), range(3), range(4), range(4)):
        s, t, m = student[n, c, y, x].item(), teacher[n, c, y, x].item(), margin[c].item()
        if t > 0:
            total += (s - t) ** 2
        elif s > max(t, m):
            total += (s - max(t, m)) ** 2
    found = ofd_loss(student, teacher, margin)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(total / 2 / 1000, rel=1e-5)


def test_ofd_of_zeros_has_a_finite_gradient() -> None:
    student = torch.zeros(1, 2, 3, 3, requires_grad=True)
    loss = ofd_loss(student, torch.zeros(1, 2, 3, 3), torch.tensor([0.0, -1.0]))
    loss.backward()
    assert loss == 0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros_like(student))


def ofd(teacher: nn.Module, student: str, images: Images) -> OFD:
    return OFD(Networks(build_model(student, 4), teacher, images), weights={"ce": 1.0, "ofd": 1.0})


def test_the_margins_are_those_of_the_trained_teacher(few_images: Images) -> None:
    torch.manual_seed(0)
    teacher = build_model("resnet8x4", 4).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    method = ofd(teacher, "resnet8", few_images).eval()
    for number, connector in enumerate(method.connectors, 1):
        layer = teacher.get_submodule(f"layer{number}.0.bn2")
        assert isinstance(layer, nn.BatchNorm2d)
        assert torch.equal(connector.get_buffer("margin"), negative_means(layer))
    x = random(2, 3, 32, 32)
    batch = Batch(x, *torch.tensor([[0, 1], [4, 7], [0, 0]]))
    with torch.no_grad():
        found = method.loss(batch).terms["ofd"]
        method.teacher = fold_batch_norms(teacher)
        folded = method.loss(batch).terms["ofd"]
        stages = zip(method.connectors, method.student(x).preacts, teacher(x).preacts, strict=True)
        first, second, third = (connector(*maps).item() for connector, *maps in stages)
    assert found.item() == pytest.approx(first / 4 + second / 2 + third)
    assert found.item() == pytest.approx(folded.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("resnet14", ["layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2"]),
     ("resnet8", ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"]),  # before their shortcuts'
     ("wrn_16_1", ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]),
     ("ShuffleV1", ["layer1.3.bn3", "layer2.7.bn3", "layer3.3.bn3"]),
     # Of Heo et al.'s code, which counts the ReLUs too.
     ("MobileNetV1", ["model.3.4", "model.5.4", "model.11.4", "model.13.4"])],
)  # fmt: skip
def test_the_last_layer_before_each_stages_relu(
    name: str, layers: list[str], few_images: Images
) -> None:
    network = build_model(name, 4).requires_grad_(False)
    found = last_layers(network, few_images, lambda output: output.preacts)
    assert found == [network.get_submodule(layer) for layer in layers]
    assert not any(module._forward_hooks for module in network.modules())


def test_ofd_needs_a_batch_norm_of_all_channels(few_images: Images) -> None:
    with pytest.raises(
        UserError, match="but ShuffleNetV2 lacks one; choose networks with another teacher"
    ):
        ofd(build_model("ShuffleV2", 4), "resnet8", few_images)


def test_ofd_refuses_a_convolution_behind_the_batch_norm(few_images: Images) -> None:
    class Biased(nn.Module):
        """A network whose pre-activations pass through a convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.network = build_model("resnet8", 4)
            self.convolutions = nn.ModuleList(nn.Conv2d(c, c, 1) for c in (16, 32, 64))

        def forward(self, x: Tensor) -> Features:
            output: Features = self.network(x)
            maps = zip(self.convolutions, output.preacts, strict=True)
            return output._replace(preacts=tuple(layer(each) for layer, each in maps))

    with pytest.raises(UserError, match="but Biased lacks one"):
        ofd(Biased(), "resnet8", few_images)


def test_ofd_refuses_other_numbers_of_stages(few_images: Images) -> None:
    with pytest.raises(UserError, match="3 stages, the student 4; choose networks"):
        ofd(build_model("resnet8", 4), "vgg8", few_images)
