"""The step as a CUDA graph: all but the capture itself, which a CPU replaces by the function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Compose, random_images
from torch import Tensor, nn

from sskd.config import Config
from sskd.data import Loader
from sskd.errors import UserError
from sskd.methods import METHODS, Method
from sskd.optimizers import build_optimizer
from sskd.teachers.assembly import assemble
from sskd.training.graph import WARMUP_STEPS, GraphedStep, build_step
from sskd.training.meter import Meter
from sskd.training.step import TrainingStep, set_trainable

RATES = [0.05, 0.05, 0.005]  # one for each epoch, of 5 whole batches and a smaller one


def steps_of(config: Config) -> tuple[Method, list[TrainingStep]]:
    """Return a method and the training step of each of its phases."""
    images = random_images(23, 4)
    method = assemble(config, images)
    steps = []
    for phase in method.phases():
        loader = Loader(images.train, images.mean, images.std, batch_size=4, views=phase.views)
        optimizer = build_optimizer(config.optimizer, phase.trains.parameters(), RATES[0])
        steps.append(
            TrainingStep(
                phase=phase, optimizer=optimizer, loader=loader, meter=Meter(), precision="fp32"
            )
        )
    return method, steps


def train(method: nn.Module, step: TrainingStep) -> list[dict[str, float]]:
    """Train an epoch at each of the ``RATES``; return their metrics."""
    metrics = []
    torch.manual_seed(0)
    for epoch, lr in enumerate(RATES):
        set_trainable(step.phase, method)
        step.loader.begin_epoch(epoch)
        step.meter.reset()
        for group in step.optimizer.param_groups:
            group["lr"] = lr
        while step.loader.position < step.loader.steps:
            step.take()
        metrics.append(step.meter.read())
    return metrics


def tensors(method: Method, step: TrainingStep) -> dict[str, Tensor]:
    state = step.optimizer.state_dict()["state"]
    moments = {
        f"{index}.{name}": value for index, each in state.items() for name, value in each.items()
    }
    return {**dict(method.named_parameters()), **dict(method.named_buffers()), **moments}


@pytest.mark.parametrize("words", [["method=sskd"], ["method=crd", "optimizer=adamw"]])
def test_a_graph_trains_as_single_steps_do(composed: Compose, words: list[str]) -> None:
    networks = ["arch@teacher=resnet8", "arch@student=resnet8"]
    config = composed(*networks, *words, "batch_size=4")
    captured: list[tuple[str, float]] = []
    replays: list[str] = []

    plain, plain_steps = steps_of(config)
    graphed, graphed_steps = steps_of(config)
    for expected, found in zip(plain_steps, graphed_steps, strict=True):

        def capture(work: Callable[[], None], *, step: TrainingStep = found) -> Callable[[], None]:
            group = step.optimizer.param_groups[0]
            assert group.get("capturable", True)
            captured.append((step.phase.name, group["lr"]))

            def replay() -> None:
                replays.append(step.phase.name)
                work()

            return replay

        graph = GraphedStep(**vars(found), capture=capture)
        assert train(graphed, graph) == train(plain, expected)
        assert not graph.optimizer.param_groups[0].get("capturable", False)
        same, other = tensors(plain, expected), tensors(graphed, found)
        assert same.keys() == other.keys()
        assert all(torch.equal(same[name], other[name]) for name in same)
    phases = [step.phase.name for step in plain_steps]
    assert captured == [(phase, lr) for phase in phases for lr in (0.05, 0.005)]
    for phase in phases:
        assert replays.count(phase) == 5 * len(RATES) - WARMUP_STEPS


def test_a_graph_needs_a_gpu_and_a_method_that_allows_it(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["arch@teacher=resnet8", "arch@student=resnet8", "method=kd"]
    method, (step,) = steps_of(composed(*words))
    for choice in ("auto", "off"):
        assert build_step(step, method, composed(*words, f"graph={choice}")) is step
    on = composed(*words, "graph=on")
    with pytest.raises(
        UserError, match=r"graph=on: .* an NVIDIA GPU, and .* 'cpu'; use graph=auto"
    ):
        build_step(step, method, on)
    step.loader.device = torch.device("cuda")
    assert isinstance(build_step(step, method, on), GraphedStep)
    assert isinstance(build_step(step, method, composed(*words)), GraphedStep)
    assert build_step(step, method, composed(*words, "graph=off")) is step
    monkeypatch.setattr(METHODS["kd"], "capturable", False)
    assert not capsys.readouterr().out
    assert build_step(step, method, composed(*words)) is step
    assert capsys.readouterr().out.startswith("graph=auto: class KD has capturable = False; each")
    with pytest.raises(UserError, match="class KD has capturable = False; use graph=auto"):
        build_step(step, method, on)


def test_a_step_that_cannot_be_captured_is_a_short_error(composed: Compose) -> None:
    method, (step,) = steps_of(
        composed("arch@teacher=resnet8", "arch@student=resnet8", "method=kd")
    )

    def capture(_: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    graph = GraphedStep(**vars(step), capture=capture)
    message = r"phase distill: .* \(operation not permitted when .*\); use graph=off"
    with pytest.raises(UserError, match=message):
        train(method, graph)
