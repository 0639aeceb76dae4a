"""Folding, chunks and compilation change what a step computes by rounding alone."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Compose, random_images
from faults import SMALL
from torch import Tensor, fx, nn

from sskd.data import Batch, Loader
from sskd.device import to_device
from sskd.errors import UserError
from sskd.methods import METHODS, LossOutput, Method, Phase
from sskd.methods.base import forward_in_chunks
from sskd.models import (
    ARCHITECTURES,
    Features,
    build_model,
    fold_batch_norms,
    fuse_layers,
)
from sskd.models.fusing import FusedConvolution
from sskd.teachers.assembly import assemble
from sskd.train import train
from sskd.training.acceleration import compile_loss, fold_teacher
from sskd.training.evaluation import predict
from sskd.training.step import set_trainable, train_step

CPU = torch.device("cpu")
# BatchNorms that stay: those of wide ResNets whose input is a sum or the returned stem.
KEPT = {"wrn_16_1": 7, "wrn_16_2": 7, "wrn_40_1": 19, "wrn_40_2": 19}


def with_statistics(network: nn.Module) -> nn.Module:
    """Give each BatchNorm the random statistics, scale and shift that training could give it."""
    generator = torch.Generator().manual_seed(3)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in (
                (layer.running_mean, -0.3, 0.3), (layer.running_var, 0.5, 2.0),
                (layer.weight, 0.5, 1.5), (layer.bias, -0.5, 0.5),
            ):  # fmt: skip
                assert tensor is not None
                tensor.data.uniform_(low, high, generator=generator)
    return network.eval()


def tensors(features: Features) -> list[Tensor]:
    logits, pooled, stem, stages, preacts, last_map = features
    return [logits, pooled, stem, *stages, *preacts, last_map]


# Two large ones are left out, which have the blocks of ResNet18 and ResNet50.
NAMES = sorted(ARCHITECTURES.keys() - {"ResNet34", "ResNet50_224"})


def batch_norms(network: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert that the difference is at most ``tolerance`` times the largest expected entry.

    Small entries are differences of large ones, so their relative errors are larger. A tensor whose
    entries are all below 1e-9, such as the gradient of a bias before a BatchNorm, counts as zero.
    """
    scale = expected.abs().max().clamp(min=1e-9)
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_a_folded_network_has_the_same_features(name: str) -> None:
    torch.manual_seed(0)
    network = with_statistics(build_model(name, 7))
    before = copy.deepcopy(network.state_dict())
    folded = fold_batch_norms(network)
    assert batch_norms(folded) == KEPT.get(name, 0)
    with torch.no_grad():
        for images in (torch.randn(3, 3, 32, 32), torch.randn(2, 3, 64, 64)):
            found, expected = folded(images), network(images)
            assert isinstance(found, Features)
            for one, other in zip(tensors(found), tensors(expected), strict=True):
                assert_close(one, other, 1e-5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


# Fused convolutions, and those of them with a sum, by the architecture's definition: each but the
# last of a stage of a ResNet, whose sum is a pre-activation; the first of each block of a wide
# ResNet; the ones inside of VGG's blocks.
FUSED = {"resnet56": (1 + 27 + 24, 24), "wrn_40_2": (18, 0), "vgg13": (10 - 4, 0)}


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_network_has_the_same_features(name: str) -> None:
    torch.manual_seed(0)
    folded = fold_batch_norms(with_statistics(build_model(name, 7)))
    before = folded.state_dict(keep_vars=True)
    fused = fuse_layers(folded)
    assert isinstance(fused, fx.GraphModule)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        for one, other in zip(tensors(fused(x)), tensors(folded(x)), strict=True):
            assert_close(one, other, 1e-5)
    layers = dict(fused.named_modules())
    found = [
        node
        for node in fused.graph.nodes
        if isinstance(layers.get(str(node.target)), FusedConvolution)
    ]
    assert found
    with_sum = sum(len(node.args) == 2 for node in found)
    assert FUSED.get(name, (len(found), with_sum)) == (len(found), with_sum)
    after = folded.state_dict(keep_vars=True)
    assert all(after[key] is tensor for key, tensor in before.items())


def test_a_gradient_passes_a_fused_convolution() -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    fused = FusedConvolution(layer)
    x, z = torch.randn(2, 1, 3, 5, 5).requires_grad_().unbind()
    expected = nn.functional.relu(layer(x) + z).sum()
    assert torch.equal(fused(x, z).sum(), expected)
    (slope,) = torch.autograd.grad(fused(x).sum(), x)
    (same,) = torch.autograd.grad(nn.functional.relu(layer(x)).sum(), x)
    assert torch.equal(slope, same)


class Odd(nn.Module):
    """Two convolutions that must stay as they are, and one that can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 1)
        self.seen = nn.Conv2d(3, 3, 1)
        self.free = nn.Conv2d(3, 3, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        twice = self.norms[0](self.shared(x)) + self.norms[1](self.shared(-x))
        seen = self.seen(twice)
        return self.norms[3](self.free(self.norms[2](seen) * seen))


def test_a_large_batch_is_computed_in_chunks() -> None:
    network = build_model("resnet8", 5).eval()
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    x = torch.randn(130, 3, 32, 32)
    with torch.no_grad():
        expected, parts = network(x), forward_in_chunks(network, x, ("logits", "pooled"))
        maps = forward_in_chunks(network, x, ("logits", "stages"))
        forward_in_chunks(network, x[:64], ("logits",))
    assert sizes == [130, 44, 44, 42, 130, 64]
    assert_close(parts.logits, expected.logits, 1e-5)
    assert_close(parts.pooled, expected.pooled, 1e-5)
    assert_close(maps.stages[-1], expected.stages[-1], 1e-5)
    assert parts.stages == ()


def test_only_a_convolution_with_one_reader_is_folded() -> None:
    torch.manual_seed(0)
    network = with_statistics(Odd())
    folded = fold_batch_norms(network)
    assert batch_norms(folded) == 3
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        assert_close(folded(x), network(x), 1e-5)


class Chooses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_traced_stays_as_it_is() -> None:
    network = Chooses()
    assert fold_batch_norms(network) is network


class OfItsLength(nn.Module):
    """Tracing raises RuntimeError: it has no length."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(len(x), -1)


class OfItsType(OfItsLength):
    """Tracing follows the other branch than a batch does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if isinstance(x, Tensor) else self.layer(2 * x)


class OfItsKeys(OfItsLength):
    """Tracing raises an error of the network's own."""

    def forward(self, x: Tensor) -> Tensor:
        return {Tensor: self.layer}[type(x)](x)


class OfItsSize(OfItsLength):
    """Tracing raises an assertion of the network's own."""

    def forward(self, x: Tensor) -> Tensor:
        assert type(x) is Tensor
        return self.layer(x)


class WithoutStatistics(OfItsLength):
    """One BatchNorm that normalises by its batch, and one that can be folded."""

    def __init__(self) -> None:
        super().__init__()
        batch_norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.own = nn.Sequential(nn.Conv2d(4, 4, 1), batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.layer(x))


class OfChance(OfItsLength):
    """Draws random numbers, so that no two outputs are equal."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand_like(x[:, :1])


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        (OfItsLength, 1), (OfItsType, 1), (OfItsKeys, 1), (OfItsSize, 1),
        (WithoutStatistics, 1), (OfChance, 1),
    ],
)  # fmt: skip
def test_an_unusual_network_keeps_its_features(kind: type[nn.Module], left: int) -> None:
    torch.manual_seed(0)
    network = kind()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.fill_(0.5)
    images = torch.randn(5, 3, 8, 8)
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    folded = fold_batch_norms(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert batch_norms(folded) == left
    with torch.no_grad():
        torch.manual_seed(1)
        found = folded(images)
        torch.manual_seed(1)
        assert_close(found, network(images), 1e-5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_folded_teacher_is_used_on_extreme_statistics() -> None:
    """Channels that are nearly constant amplify rounding, but are no reason not to fold."""
    torch.manual_seed(0)
    network = with_statistics(build_model("resnet20", 7))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_var is not None
            layer.running_var[::3] = 1e-6
    assert batch_norms(fold_batch_norms(network)) == 0


def test_predictions_equal_the_plain_networks() -> None:
    images = random_images(4, 30)
    torch.manual_seed(0)
    network = with_statistics(build_model("resnet14", 5)).train()
    found = predict(network, images.test, images, "it")
    mean, std = (torch.tensor(each)[:, None, None] for each in (images.mean, images.std))
    with torch.no_grad():
        expected = network.eval()((images.test.images / 255 - mean) / std).logits
    assert_close(found, expected, 1e-5)


def build(
    composed: Compose, method: str, pair: str, batch_size: int = 8
) -> tuple[Method, list[Phase], Batch]:
    images = random_images(12, 4)
    teacher, student = pair.split("-")
    words = [f"arch@teacher={teacher}", f"arch@student={student}", f"method={method}"]
    built = assemble(composed(*words, *(["method.negatives=5"] * (method == "crd"))), images)
    for network in built.children():
        with_statistics(network)
    loader = Loader(images.train, images.mean, images.std, batch_size=batch_size, views=built.views)
    return built, list(built.phases()), loader.next_batch()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_losses_and_gradients_equal_the_plain_path(composed: Compose, method: str) -> None:
    """The plain path: channels first, every BatchNorm computed, an optimizer without fusion.

    The networks compute in float64, so that rounding changes the sign of no input of a ReLU. The
    losses are float32 as always.
    """
    plain, plain_phases, batch = build(composed, method, "wrn_16_2-wrn_16_2", 4)
    fast, fast_phases, _ = build(composed, method, "wrn_16_2-wrn_16_2", 4)
    fast.load_state_dict(plain.state_dict())
    batch = batch._replace(x=batch.x.double())
    plain_batch = batch._replace(x=batch.x.contiguous(memory_format=torch.contiguous_format))
    fast.double()
    plain.double()
    if METHODS[method].needs_teacher:
        before = batch_norms(fast.teacher)
        fold_teacher(fast)
        assert batch_norms(fast.teacher) < before
    to_device(fast, CPU)
    for fast_phase, plain_phase in zip(fast_phases, plain_phases, strict=True):
        metrics = []
        for phase, module, images, fused in (
            (fast_phase, fast, batch, True), (plain_phase, plain, plain_batch, False),
        ):  # fmt: skip
            set_trainable(phase, module)
            optimizer = torch.optim.SGD(
                phase.trains.parameters(), 0.05, 0.9, weight_decay=5e-4, fused=fused
            )
            torch.manual_seed(1)
            metrics.append(train_step(phase, optimizer, images, "fp32"))
        for name, value in metrics[1].items():
            torch.testing.assert_close(metrics[0][name], value, rtol=1e-5, atol=1e-6)
        parameters = zip(
            fast_phase.trains.named_parameters(), plain_phase.trains.parameters(), strict=True
        )
        for (name, found), expected in parameters:
            assert found.grad is not None, name
            assert expected.grad is not None, name
            assert_close(found.grad, expected.grad, 1e-4)
            assert_close(found, expected, 1e-5)


NEEDS_A_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
COMPILE = torch.compile


def trace(loss: Callable[[Batch], LossOutput], **_: object) -> Callable[[Batch], LossOutput]:
    """Do what ``torch.compile`` does before it generates machine code, in a fifth of the time."""
    return COMPILE(loss, dynamic=False, backend="aot_eager")


@pytest.mark.parametrize("method", ["sskd", "crd"])
def test_a_compiled_loss_is_the_same(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """CRD draws random numbers and keeps its embeddings.

    The losses are only traced, because their machine code takes a minute to generate.
    """
    monkeypatch.setattr(torch, "compile", trace)
    built, phases, batch = build(composed, method, "resnet8-resnet8")
    config = composed("compile=default", "batch_size=8")
    built.double()
    batch = batch._replace(x=batch.x.double())
    set_trainable(phases[-1], built)
    state = copy.deepcopy(built.state_dict())

    def gradients(loss: Callable[[Batch], LossOutput]) -> list[Tensor]:
        built.load_state_dict(state)
        built.zero_grad()
        torch.manual_seed(1)
        terms, _ = loss(batch)
        torch.stack(list(phases[-1].weigh(terms).values())).sum().backward()
        return [p.grad for p in phases[-1].trains.parameters() if p.grad is not None]

    compiled = compile_loss(phases[-1], config)
    assert compiled.loss is not phases[-1].loss
    found, expected = gradients(compiled.loss), gradients(phases[-1].loss)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-4)


def test_only_full_batches_are_compiled(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    _, phases, batch = build(composed, "kd", "resnet8-resnet8")
    compiled: list[int] = []

    def compiler(loss: Callable[[Batch], object], **_: object) -> Callable[[Batch], object]:
        def run(batch: Batch) -> object:
            compiled.append(len(batch.y))
            return loss(batch)

        return run

    monkeypatch.setattr(torch, "compile", compiler)
    phase = compile_loss(phases[-1], composed("compile=default", "batch_size=8"))
    for size in (8, 3):
        phase.loss(Batch(*(values[:size] for values in batch)))
    assert compiled == [8]
    for choice in ("auto", "off"):
        assert compile_loss(phases[-1], composed(f"compile={choice}")) is phases[-1]


@NEEDS_A_COMPILER
def test_a_compiled_run_has_the_losses_of_a_plain_one(composed: Compose, tmp_path: Path) -> None:
    small = [item for item in SMALL if not item.startswith("schedule")]
    words = [*small, "schedule.epochs=1", "method=vanilla"]
    losses: list[float] = []
    for choice in ("off", "default"):
        runs = tmp_path / choice
        result = train(composed(*words, f"compile={choice}", f"runs={runs}"))
        assert result.compile == choice
        (path,) = runs.rglob("metrics.jsonl")
        losses.append(json.loads(path.read_text())["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != losses[0]  # rounded differently, so it was compiled


def test_a_loss_that_cannot_be_compiled_is_a_short_error(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, phases, batch = build(composed, "kd", "resnet8-resnet8")

    def refuse(_: Batch) -> LossOutput:
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    phase = compile_loss(phases[-1], composed("compile=default", "batch_size=8"))
    message = (
        r"compile=default: phase distill cannot .* \(no C\+\+ compiler was found\); use compile=off"
    )
    with pytest.raises(UserError, match=message):
        phase.loss(batch)
