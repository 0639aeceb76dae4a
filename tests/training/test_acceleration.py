"""What makes a step faster changes nothing of what it computes, but for rounding."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Compose, random_images
from faults import SMALL
from torch import Tensor, nn

from sskd.data import Batch, Loader
from sskd.device import to_device
from sskd.errors import UserError
from sskd.methods import METHODS, LossOutput, Method, Phase
from sskd.methods.base import forward_in_chunks
from sskd.models import ARCHITECTURES, Features, build_model, fold_batch_norms
from sskd.teachers.assembly import assemble
from sskd.train import train
from sskd.training.acceleration import compile_loss, fold_teacher
from sskd.training.evaluation import predict
from sskd.training.step import set_trainable, train_step

CPU = torch.device("cpu")
# wide ResNets keep the BatchNorms that a sum or the returned stem stands in front of
KEPT = {"wrn_16_1": 7, "wrn_16_2": 7, "wrn_40_1": 19, "wrn_40_2": 19}


def with_statistics(network: nn.Module) -> nn.Module:
    """Give BatchNorms what training would: statistics, scales and shifts that matter."""
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
    return [features.logits, features.pooled, features.stem, *features.stages, *features.preacts]


def batch_norms(network: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare to ``tolerance`` of the largest entry: small ones are differences of large ones.

    What is below 1e-9 throughout, as the gradient of a bias in front of a BatchNorm, is zero.
    """
    scale = expected.abs().max().clamp(min=1e-9)
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
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
            for ours, plain in zip(tensors(found), tensors(expected), strict=True):
                close(ours, plain, 1e-5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


class Odd(nn.Module):
    """Convolutions that must stay as they are beside one that need not."""

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


def test_a_large_batch_is_asked_in_parts_where_only_vectors_are_read() -> None:
    network = build_model("resnet8", 5).eval()
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    x = torch.randn(130, 3, 32, 32)
    with torch.no_grad():
        whole, parts = network(x), forward_in_chunks(network, x, ("logits", "pooled"))
        maps = forward_in_chunks(network, x, ("logits", "stages"))
        forward_in_chunks(network, x[:64], ("logits",))
    assert sizes == [130, 44, 44, 42, 130, 64]
    close(parts.logits, whole.logits, 1e-5)
    close(parts.pooled, whole.pooled, 1e-5)
    close(maps.stages[-1], whole.stages[-1], 1e-5)
    assert parts.stages is None


def test_only_what_nothing_else_sees_is_folded() -> None:
    torch.manual_seed(0)
    network = with_statistics(Odd())
    folded = fold_batch_norms(network)
    assert batch_norms(folded) == 3
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        close(folded(x), network(x), 1e-5)


class Chooses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_traced_stays_as_it_is() -> None:
    network = Chooses()
    assert fold_batch_norms(network) is network


def test_predictions_are_the_plain_networks() -> None:
    images = random_images(4, 30)
    torch.manual_seed(0)
    network = with_statistics(build_model("resnet14", 5)).train()
    found = predict(network, images.test, images, "it")
    mean, std = (torch.tensor(each)[:, None, None] for each in (images.mean, images.std))
    with torch.no_grad():
        expected = network.eval()((images.test.images / 255 - mean) / std).logits
    close(found, expected, 1e-5)


def made(composed: Compose, method: str, pair: str) -> tuple[Method, list[Phase], Batch]:
    images = random_images(12, 4)
    teacher, student = pair.split("-")
    words = [f"arch@teacher={teacher}", f"arch@student={student}", f"method={method}"]
    built = assemble(composed(*words, *(["method.negatives=5"] * (method == "crd"))), images)
    for network in built.children():
        with_statistics(network)
    loader = Loader(images.train, images.mean, images.std, 8, built.views)
    return built, list(built.phases()), loader.next_batch()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_losses_and_gradients_are_those_of_the_plain_path(composed: Compose, method: str) -> None:
    """The plain path: channels first, every BatchNorm computed, an optimizer without fusion.

    The networks compute in float64, in which a ReLU's input does not change its sign by rounding;
    the losses are float32 as always.
    """
    plain, plain_stages, batch = made(composed, method, "wrn_16_2-wrn_16_2")
    fast, fast_stages, _ = made(composed, method, "wrn_16_2-wrn_16_2")
    fast.load_state_dict(plain.state_dict())
    batch = batch._replace(x=batch.x.double())
    plain_batch = batch._replace(x=batch.x.contiguous(memory_format=torch.contiguous_format))
    to_device(fast.double(), CPU)
    plain.double()
    if METHODS[method].needs_teacher:
        before = batch_norms(fast.teacher)
        fold_teacher(fast, CPU)
        assert batch_norms(fast.teacher) < before
    for ours, theirs in zip(fast_stages, plain_stages, strict=True):
        figures = []
        for stage, owner, given, fused in (
            (ours, fast, batch, True), (theirs, plain, plain_batch, False),
        ):  # fmt: skip
            set_trainable(stage, owner)
            optimizer = torch.optim.SGD(
                stage.trains.parameters(), 0.05, 0.9, weight_decay=5e-4, fused=fused
            )
            torch.manual_seed(1)
            figures.append(train_step(stage, optimizer, given, "fp32"))
        for name, value in figures[1].items():
            torch.testing.assert_close(figures[0][name], value, rtol=1e-5, atol=1e-6)
        pairs = zip(ours.trains.named_parameters(), theirs.trains.parameters(), strict=True)
        for (name, found), expected in pairs:
            assert found.grad is not None, name
            assert expected.grad is not None, name
            close(found.grad, expected.grad, 1e-4)
            close(found, expected, 1e-5)


NEEDS_A_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
COMPILE = torch.compile


def trace(loss: Callable[[Batch], LossOutput], **_: object) -> Callable[[Batch], LossOutput]:
    """Do what ``torch.compile`` does before it makes machine code, in a fifth of the time."""
    return COMPILE(loss, dynamic=False, backend="aot_eager")


@pytest.mark.parametrize(
    ("method", "compiler"),
    [("sskd", trace), pytest.param("crd", COMPILE, marks=NEEDS_A_COMPILER)],
)
def test_a_compiled_loss_is_the_same(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, method: str, compiler: Any
) -> None:
    """CRD's loss draws random numbers and changes its banks.

    SSKD's is only traced: its machine code, which takes a minute to make, is not tested.
    """
    monkeypatch.setattr(torch, "compile", compiler)
    built, stages, batch = made(composed, method, "resnet8-resnet8")
    config = composed("compile=default", "batch_size=8")
    built.double()
    batch = batch._replace(x=batch.x.double())
    set_trainable(stages[-1], built)
    state = copy.deepcopy(built.state_dict())

    def gradients(loss: Callable[[Batch], LossOutput]) -> list[Tensor]:
        built.load_state_dict(state)
        built.zero_grad()
        torch.manual_seed(1)
        terms, _ = loss(batch)
        torch.stack(list(stages[-1].weigh(terms).values())).sum().backward()
        return [p.grad for p in stages[-1].trains.parameters() if p.grad is not None]

    compiled = compile_loss(stages[-1], config)
    assert compiled.loss is not stages[-1].loss
    found, expected = gradients(compiled.loss), gradients(stages[-1].loss)
    for ours, plain in zip(found, expected, strict=True):
        close(ours, plain, 1e-4)


def test_only_full_batches_are_compiled(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stages, batch = made(composed, "kd", "resnet8-resnet8")
    compiled: list[int] = []

    def compiler(loss: Callable[[Batch], object], **_: object) -> Callable[[Batch], object]:
        def run(given: Batch) -> object:
            compiled.append(len(given.y))
            return loss(given)

        return run

    monkeypatch.setattr(torch, "compile", compiler)
    stage = compile_loss(stages[-1], composed("compile=default", "batch_size=8"))
    for size in (8, 3):
        stage.loss(Batch(*(values[:size] for values in batch)))
    assert compiled == [8]
    for choice in ("auto", "off"):
        assert compile_loss(stages[-1], composed(f"compile={choice}")) is stages[-1]


@NEEDS_A_COMPILER
def test_a_compiled_run_learns_what_a_plain_one_does(composed: Compose, tmp_path: Path) -> None:
    small = [item for item in SMALL if not item.startswith("schedule")]
    words = [*small, "schedule.epochs=1", "method=kd", "arch@teacher=resnet8", "precision=bf16"]
    losses: list[float] = []
    for choice in ("off", "default"):
        runs = tmp_path / choice
        if losses:  # the same teacher: how it was compiled is no part of what a run is
            shutil.copytree(tmp_path / "off/digits/scratch", runs / "digits/scratch")
        result = train(composed(*words, f"compile={choice}", f"runs={runs}"))
        assert result.compile == choice
        (path,) = (runs / "digits/distill").rglob("metrics.jsonl")
        losses.append(json.loads(path.read_text())["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != losses[0]  # rounded otherwise, so it was compiled


def test_a_loss_that_cannot_be_compiled_is_told_in_a_line(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stages, batch = made(composed, "kd", "resnet8-resnet8")

    def refuse(_: Batch) -> LossOutput:
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    stage = compile_loss(stages[-1], composed("compile=default", "batch_size=8"))
    told = (
        r"compile=default: phase distill cannot .* \(no C\+\+ compiler was found\); use compile=off"
    )
    with pytest.raises(UserError, match=told):
        stage.loss(batch)
