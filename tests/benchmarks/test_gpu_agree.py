"""The comparisons of ``benchmarks.gpu agree``, without a GPU: they find what differs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sskd.methods.kd
from benchmarks.gpu import cpu_steps, graph_steps, teachers, tolerances
from benchmarks.gpu.worker import Values
from benchmarks.workload import Case
from sskd.training import graph
from sskd.training.graph import Capture
from sskd.training.step import WARMUP_STEPS, TrainingStep

KD = Case(
    pair="resnet8-resnet8", batch=4, images=18, device="cpu", compile="off", graph="auto",
    precompute=False,
)  # fmt: skip
CRD = Case(**{**vars(KD), "method": "crd"})
KEY = "kd distill fp32"


def verdict(**found: Values) -> str:
    """Return the last cell of the row of KD's step."""
    cells = tolerances.step_row(KEY, {f"{kind} {KEY}": values for kind, values in found.items()})
    return cells.strip("| ").rpartition("| ")[2]


def use_graphs(monkeypatch: pytest.MonkeyPatch, capture: Capture) -> None:
    """Let the CPU capture its steps, of which each comparison takes eight."""
    monkeypatch.setattr(graph, "_why_not", lambda device, method: "")
    monkeypatch.setattr(graph, "capture_cuda_graph", capture)
    monkeypatch.setattr(graph_steps, "STEPS", 8)


@pytest.mark.parametrize("case", [KD, CRD])
def test_the_cpu_agrees_with_the_cpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        calls.append("capture")

        def replay() -> None:
            calls.append("replay")
            work()

        return replay

    use_graphs(monkeypatch, capture)
    cpu_steps.steps_on_cpu.cache_clear()
    cpu = cpu_steps.compare_with_cpu(case, "distill")
    by_graph = graph_steps.compare_graph(case, "distill")
    assert cpu == {"losses": 0, "weights": 0, "wait": ""}
    assert by_graph == {"losses": 0, "weights": 0, "moved": []}
    assert verdict(cpu=cpu, graph=by_graph) == "agree"
    assert calls.count("capture") == 2  # one for each learning rate
    assert calls.count("replay") == 8 - WARMUP_STEPS - 1  # without the smaller batch


def test_a_graph_that_omits_work_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    use_graphs(monkeypatch, lambda work: lambda: None)
    found = graph_steps.compare_graph(KD, "distill")
    assert verdict(graph=found) == "graph: losses above 0.01; graph: weights above 0.01"


def test_a_wrong_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_steps.steps_on_cpu.cache_clear()
    cpu_steps.compare_with_cpu(KD, "distill")  # keeps the steps of the CPU
    right = sskd.methods.kd.kd_loss
    monkeypatch.setattr(sskd.methods.kd, "kd_loss", lambda *logits: 1.01 * right(*logits))
    found = cpu_steps.compare_with_cpu(KD, "distill")
    assert found["losses"] == pytest.approx(0.01, rel=0.1)
    assert "losses above 0.001" in verdict(cpu=found)


def test_a_wrong_update_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_steps.steps_on_cpu.cache_clear()
    cpu_steps.compare_with_cpu(KD, "distill")
    monkeypatch.setattr(cpu_steps, "SLOWER", 1.1 * cpu_steps.SLOWER)
    found = cpu_steps.compare_with_cpu(KD, "distill")
    assert found["weights"] == pytest.approx(0.1, rel=0.1)
    assert "weights above 0.05" in verdict(cpu=found)


def test_a_tensor_that_moves_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    take = TrainingStep.take
    kept = []  # otherwise the next tensor may get the address of the one before the last

    def take_and_move(step: TrainingStep) -> int:
        taken = take(step)
        assert step.meter._sums is not None
        kept.append(step.meter._sums)
        step.meter._sums = step.meter._sums.clone()
        return taken

    monkeypatch.setattr(TrainingStep, "take", take_and_move)
    monkeypatch.setattr(graph_steps, "STEPS", 6)
    found = graph_steps.compare_graph(KD, "distill")
    assert found["moved"] == ["_sums"]
    assert verdict(graph=found) == "graph: moved: _sums"


def test_a_step_that_waits_is_found_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device, *, allowed: bool) -> Any:
        if not allowed:
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.enable_grad()

    monkeypatch.setattr(cpu_steps, "no_waiting", refuse)
    cpu_steps.steps_on_cpu.cache_clear()
    found = cpu_steps.compare_with_cpu(KD, "distill")
    assert found["losses"] == found["weights"] == 0
    assert "called a synchronizing CUDA operation" in verdict(cpu=found)


@pytest.mark.parametrize("name", ["resnet8", "vgg8"])
def test_a_folded_teacher_agrees(name: str) -> None:
    found = teachers.compare_teacher(name, "cpu", "fp32")
    assert found["plain"] == 0
    assert 0 < found["features"] < 1e-4
    assert "agree" in tolerances.teacher_row(f"teacher {name} fp32", found)
    wrong = tolerances.teacher_row(f"teacher {name} fp32", {**found, "features": 0.1})
    assert "features above 0.001" in wrong
    both = {**found, "features": math.inf, "plain": math.inf}
    assert "features above inf" in tolerances.teacher_row(f"teacher {name} fp32", both)


def test_negatives_are_of_other_classes_and_the_same_everywhere() -> None:
    labels = torch.arange(50_000) % 100
    classes = torch.tensor([3, 3, 7])
    negatives = cpu_steps.same_negatives(labels, classes, 400)
    assert (labels[negatives] != classes[:, None]).all()
    assert [len(set(row)) for row in negatives.tolist()] == [400] * 3
    assert set(negatives[0].tolist()) != set(negatives[1].tolist())
    assert torch.equal(negatives, cpu_steps.same_negatives(labels, classes, 400))
