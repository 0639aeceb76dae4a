"""The networks: published numbers, and properties that every network must have."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from sskd.errors import UserError
from sskd.models import ARCHITECTURES, Features, build_model

Shapes = tuple[tuple[int, ...], ...]
NARROW = ((16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8), (64,))
TIMES_FOUR = ((32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (256,))
BOTTLENECKS = ((64, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4), (2048,))
WIDE = ((16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8), (128,))
VGG = ((64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4), (512,))
MOBILE = ((16, 16, 16), (12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2), (1280,))
BASIC = ((64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512,))
SEPARABLE = ((64, 32, 32), (128, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (1024,))
SHUFFLE_1 = ((24, 32, 32), (240, 16, 16), (480, 8, 8), (960, 4, 4), (960,))
SHUFFLE_2 = ((24, 32, 32), (116, 16, 16), (232, 8, 8), (464, 4, 4), (1024,))

# For the published networks with 100 classes: parameters; shapes of (stem, stages..., pooled) for
# a 32x32 image; the start of the SHA-256 of the JSON list of [name, shape] of all tensors. Those of
# the last four: torchvision's with a 3x3 convolution first, and the published MobileNet's.
FACTS: dict[str, tuple[int, Shapes, str]] = {
    "resnet8": (83_892, NARROW, "4c781e512cd685f5"),
    "resnet14": (181_108, NARROW, "5f23fb935b1739d3"),
    "resnet20": (278_324, NARROW, "6b9f0272a6f6bace"),
    "resnet32": (472_756, NARROW, "095172c6c880ccb6"),
    "resnet44": (667_188, NARROW, "6f43e86f9efa855a"),
    "resnet56": (861_620, NARROW, "6393373383fefe0d"),
    "resnet110": (1_736_564, NARROW, "6f41c9b012d4b0e8"),
    "resnet8x4": (1_233_540, TIMES_FOUR, "67392e7f5dc443fc"),
    "resnet32x4": (7_433_860, TIMES_FOUR, "d1cdc5857b58d7d5"),
    "ResNet50": (23_705_252, BOTTLENECKS, "5924c7eeb130c707"),
    "wrn_16_1": (180_916, NARROW, "8adc30f7ae18228d"),
    "wrn_16_2": (703_284, WIDE, "ae5aa50cb9f7c2a1"),
    "wrn_40_1": (569_780, NARROW, "9f11c1460fb95baf"),
    "wrn_40_2": (2_255_156, WIDE, "2a9d2160e1be72dd"),
    "vgg8": (3_965_028, VGG, "bba81923398e0983"),
    "vgg11": (9_277_284, VGG, "82df3a294a8a590f"),
    "vgg13": (9_462_180, VGG, "c80ade34bfeb1ffe"),
    "vgg16": (14_774_436, VGG, "19ac5dad6e21a6b1"),
    "vgg19": (20_086_692, VGG, "56c93dfd1a66dbe8"),
    "MobileNetV2": (812_836, MOBILE, "d8a76a010dcabc59"),
    "ShuffleV1": (949_258, SHUFFLE_1, "b908def5e360bd6b"),
    "ShuffleV2": (1_355_528, SHUFFLE_2, "93732fe0d514eb70"),
    "ResNet18": (11_220_132, BASIC, "bc311ecf6029cd80"),
    "ResNet34": (21_328_292, BASIC, "0779fb90efb0a09e"),
    "ResNet50_224": (23_705_252, BOTTLENECKS, "02cf5015a653d017"),
    "MobileNetV1": (3_309_476, SEPARABLE, "3424c86b8a19c309"),
}
RATES = dict.fromkeys(("MobileNetV2", "ShuffleV1", "ShuffleV2"), 0.01) | dict.fromkeys(
    ("ResNet18", "ResNet34", "ResNet50_224", "MobileNetV1"), 0.1
)  # the others are trained with a learning rate of 0.05
CONF = Path(__file__).parents[2] / "conf" / "arch"


class Trained(NamedTuple):
    """A network after one forward and backward pass in train mode, and its features."""

    name: str
    model: nn.Module
    features: Features


@pytest.fixture(scope="module", params=FACTS)
def trained(request: pytest.FixtureRequest) -> Trained:
    torch.manual_seed(0)
    model = build_model(request.param, 100).train()
    features = model(torch.randn(2, 3, 32, 32))
    F.cross_entropy(features.logits, torch.tensor([3, 97])).backward()
    return Trained(request.param, model, features)


def layout(model: nn.Module) -> list[list[object]]:
    return [[name, list(tensor.shape)] for name, tensor in model.state_dict().items()]


def test_no_architecture_is_missing() -> None:
    assert list(ARCHITECTURES) == list(FACTS)


def test_parameters_and_tensors_are_as_published(trained: Trained) -> None:
    parameters, _, digest = FACTS[trained.name]
    assert sum(parameter.numel() for parameter in trained.model.parameters()) == parameters
    tensors = json.dumps(layout(trained.model)).encode()
    assert hashlib.sha256(tensors).hexdigest().startswith(digest)


def test_tensors_agree_with_the_reference_file(trained: Trained) -> None:
    folder = os.environ.get("SSKD_REFERENCE")
    if not folder:
        pytest.skip("SSKD_REFERENCE names no folder with architectures.json")
    published = json.loads((Path(folder) / "architectures.json").read_text())
    if trained.name not in published:
        pytest.skip(f"{trained.name} is not a published network")
    reference = published[trained.name]
    expected = [[name, shape] for name, shape in reference["state_dict"].items()]
    assert layout(trained.model) == expected
    assert FACTS[trained.name][0] == reference["parameters"]
    assert [list(shape) for shape in FACTS[trained.name][1]] == reference["features"]


def test_feature_shapes_are_as_published(trained: Trained) -> None:
    stem, *stages, pooled = FACTS[trained.name][1]
    features = trained.features
    assert features.logits.shape == (2, 100)
    assert features.pooled.shape[1:] == pooled
    assert features.stem.shape[1:] == stem
    assert [stage.shape[1:] for stage in features.stages] == stages
    assert [preact.shape[1:] for preact in features.preacts] == stages


def test_every_parameter_receives_a_gradient(trained: Trained) -> None:
    for name, parameter in trained.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias in front of a BatchNorm has no effect, so its gradient is rounding noise.
        assert parameter.ndim == 1 or parameter.grad.abs().max() > 0, name


def test_every_batch_norm_runs_once_per_forward(trained: Trained) -> None:
    counts = [m.num_batches_tracked for m in trained.model.modules() if hasattr(m, "running_mean")]
    assert len(counts) == sum("running_mean" in name for name in trained.model.state_dict())
    assert {int(count) for count in counts} == {1}  # type: ignore[arg-type]


def test_pre_activations_follow_their_definition(trained: Trained) -> None:
    for stage, preact in zip(trained.features.stages, trained.features.preacts, strict=True):
        if trained.name == "MobileNetV2":
            assert torch.equal(preact, stage)
        elif trained.name.startswith("wrn"):
            # Before training, a BatchNorm in train mode only standardises each channel.
            centred = stage - stage.mean((0, 2, 3), keepdim=True)
            deviation = centred.pow(2).mean((0, 2, 3), keepdim=True).add(1e-5).sqrt()
            torch.testing.assert_close(preact, centred / deviation, rtol=1e-3, atol=1e-4)
        else:
            assert (preact < 0).any()
            rectified = preact.clamp(min=0)
            if trained.name == "ShuffleV2":  # the shuffle interleaves the two halves
                first, second = rectified.chunk(2, dim=1)
                assert torch.equal(stage[:, 0::2], first)
                assert torch.equal(stage[:, 1::2], second)
            else:
                assert torch.equal(stage, rectified)


def test_a_larger_image_is_accepted(trained: Trained) -> None:
    stem, *stages, pooled = FACTS[trained.name][1]
    with torch.inference_mode():
        features = trained.model.eval()(torch.randn(1, 3, 64, 64))
    doubled = [(c, 2 * h, 2 * w) for c, h, w in [stem, *stages]]
    if trained.name.startswith("vgg"):  # an additional pooling in front of the last block
        doubled[-1] = (512, 4, 4)
    assert [tuple(map_.shape[1:]) for map_ in (features.stem, *features.stages)] == doubled
    assert features.pooled.shape == (1, *pooled)
    assert features.logits.isfinite().all()


def test_an_image_has_the_same_features_in_a_batch(trained: Trained) -> None:
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        together = trained.model.eval()(images)
        alone = trained.model(images[1:])
    for left, right in zip(flatten(together), flatten(alone), strict=True):
        scale = float(right.abs().max())
        torch.testing.assert_close(left[1:], right, rtol=1e-3, atol=1e-4 * scale)


def flatten(features: Features) -> list[Tensor]:
    logits, pooled, stem, stages, preacts, last_map = features
    return [logits, pooled, stem, *stages, *preacts, last_map]


@pytest.mark.parametrize("num_classes", [1, 10])
@pytest.mark.parametrize("name", FACTS)
def test_other_numbers_of_classes_are_built(name: str, num_classes: int) -> None:
    with torch.device("meta"):
        features = build_model(name, num_classes)(torch.empty(2, 3, 32, 32))
    assert features.logits.shape == (2, num_classes)


def test_initialisation_follows_the_published_code(trained: Trained) -> None:
    by_default = trained.name.startswith(("Shuffle", "MobileNetV1"))
    for module in trained.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d):
            outputs, inputs, height, width = module.weight.shape
            if by_default:
                check_uniform(module.weight, 1 / math.sqrt(inputs * height * width))
            else:
                check_normal(module.weight, math.sqrt(2 / (outputs * height * width)))
                assert module.bias is None or (module.bias == 0).all()
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            if trained.name.startswith(("vgg", "MobileNetV2")):
                check_normal(module.weight, 0.01)
                assert (module.bias == 0).all()
            else:
                check_uniform(module.weight, bound)
                assert module.bias.abs().max() <= bound
                assert (module.bias == 0).all() == trained.name.startswith("wrn")


def check_normal(weight: Tensor, std: float) -> None:
    """Mean and deviation within six standard errors, and tails unlike a uniform distribution."""
    weight, count = weight.detach(), weight.numel()
    assert abs(float(weight.mean())) < 6 * std / math.sqrt(count)
    assert float(weight.pow(2).mean().sqrt()) == pytest.approx(std, rel=6 / math.sqrt(2 * count))
    assert count < 1000 or weight.abs().max() > 2 * std


def check_uniform(weight: Tensor, bound: float) -> None:
    """All values within the bound, and a uniform deviation within six standard errors."""
    assert weight.abs().max() <= bound
    deviation = bound / math.sqrt(3)
    rms = float(weight.detach().pow(2).mean().sqrt())
    assert rms == pytest.approx(deviation, rel=6 * math.sqrt(0.2 / weight.numel()))


def test_a_similar_name_is_suggested() -> None:
    with pytest.raises(UserError, match="no architecture 'resnet57'; did you mean 'resnet5"):
        build_model("resnet57", 100)


def test_every_architecture_has_a_configuration() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(FACTS)
    for name in FACTS:
        # For FT's first phase the CRD benchmark uses 0.01 with these students.
        ft_rate = {"paraphraser_lr": 0.01} if name.startswith(("resnet", "wrn")) else {}
        expected = {"name": name, "base_lr": RATES.get(name, 0.05)} | ft_rate
        assert OmegaConf.load(CONF / f"{name}.yaml") == expected
