"""The step as a CUDA graph: all but the capture itself, which a CPU replaces by the function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Compose, random_images
from torch import Tensor

from sskd.config import Config
from sskd.data import Loader
from sskd.errors import UserError
from sskd.methods import METHODS
from sskd.optimizers import build_optimizer
from sskd.teachers.assembly import assemble
from sskd.training.graph import GraphedStep, build_step
from sskd.training.meter import Meter
from sskd.training.step import WARMUP_STEPS, TrainingStep, set_trainable

RATES = [0.05, 0.05, 0.005]  # one for each epoch, of 5 whole batches and a smaller one


def phases_of(config: Config) -> list[dict[str, Any]]:
    """Return the parts of the training step of each phase of a new method."""
    images = random_images(23, 4)
    method = assemble(config, images)
    parts = []
    for phase in method.phases():
        loader = Loader(images.train, images.mean, images.std, batch_size=4, views=phase.views)
        optimizer = build_optimizer(config.optimizer, phase.trains.parameters(), RATES[0])
        own = {"phase": phase, "optimizer": optimizer, "loader": loader, "meter": Meter()}
        parts.append({"method": method, **own})
    return parts


def train(step: TrainingStep) -> list[dict[str, float]]:
    """Train an epoch at each of the ``RATES``; return their metrics."""
    metrics = []
    torch.manual_seed(0)
    for epoch, lr in enumerate(RATES):
        set_trainable(step.phase, step.method)
        step.loader.begin_epoch(epoch)
        step.meter.reset()
        for group in step.optimizer.param_groups:
            group["lr"] = lr
        while step.loader.position < step.loader.steps:
            step.take()
        metrics.append(step.meter.read())
    return metrics


def tensors(step: TrainingStep) -> dict[str, Tensor]:
    method, state = step.method, step.optimizer.state_dict()["state"]
    moments = {
        f"{index}.{name}": value for index, each in state.items() for name, value in each.items()
    }
    return {**dict(method.named_parameters()), **dict(method.named_buffers()), **moments}


@pytest.mark.parametrize(
    "words", [["method=sskd"], ["method=crd", "optimizer=adamw", "precision=bf16"]]
)
def test_a_graph_trains_as_single_steps_do(composed: Compose, words: list[str]) -> None:
    networks = ["arch@teacher=resnet8", "arch@student=resnet8"]
    config = composed(*networks, *words, "batch_size=4")
    captured: list[tuple[str, float]] = []
    phases: list[str] = []
    replays: list[str] = []

    for one, other in zip(phases_of(config), phases_of(config), strict=True):
        plain = TrainingStep(**one, precision=config.precision)
        phases.append(plain.phase.name)

        def capture(work: Callable[[], None], parts: Any = other) -> Callable[[], None]:
            group = parts["optimizer"].param_groups[0]
            assert group.get("capturable", True)
            captured.append((parts["phase"].name, group["lr"]))

            def replay() -> None:
                replays.append(parts["phase"].name)
                work()

            return replay

        graph = GraphedStep(**other, precision=config.precision, capture=capture)
        assert train(graph) == train(plain)
        assert not graph.optimizer.param_groups[0].get("capturable", False)
        expected, found = tensors(plain), tensors(graph)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert captured == [(phase, lr) for phase in phases for lr in (0.05, 0.005)]
    for phase in phases:
        assert replays.count(phase) == 5 * len(RATES) - WARMUP_STEPS


def test_a_graph_needs_a_gpu_and_a_method_that_allows_it(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["arch@teacher=resnet8", "arch@student=resnet8", "method=kd"]
    (parts,) = phases_of(composed(*words))
    configs = {choice: composed(*words, f"graph={choice}") for choice in ("auto", "on", "off")}

    def kind(choice: str) -> type[TrainingStep]:
        return type(build_step(configs[choice], **parts))

    assert kind("auto") is kind("off") is TrainingStep
    with pytest.raises(UserError, match=r"graph=on: .* an NVIDIA GPU, and .* 'cpu'; use graph=aut"):
        kind("on")
    parts["loader"].device = torch.device("cuda")
    assert kind("auto") is kind("on") is GraphedStep
    assert kind("off") is TrainingStep
    monkeypatch.setattr(METHODS["kd"], "capturable", False)
    assert not capsys.readouterr().out
    assert kind("auto") is TrainingStep
    assert capsys.readouterr().out.startswith("graph=auto: class KD has capturable = False; each")
    with pytest.raises(UserError, match="class KD has capturable = False; use graph=auto"):
        kind("on")


def test_a_step_that_cannot_be_captured_is_a_short_error(composed: Compose) -> None:
    (parts,) = phases_of(composed("arch@teacher=resnet8", "arch@student=resnet8", "method=kd"))

    def capture(_: Callable[[], None]) -> Callable[[], None]:
        try:  # as torch.cuda.graph does
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    message = r"phase distill: .* \(operation not permitted when .*\); use graph=off"
    with pytest.raises(UserError, match=message):
        train(GraphedStep(**parts, precision="fp32", capture=capture))
