"""The stand-in GPU counts what PyTorch asks of it, and refuses what CUDA refuses in a capture.

The tests that build it and run on it need ``g++``, and run with ``make test-stand-in``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks import stand_in
from benchmarks.launches import operation
from benchmarks.stand_in.build import check_requirements, stubs_of
from sskd import CONF
from sskd.errors import UserError
from sskd.methods import METHODS
from sskd.models import build_model

# Takes steps on the stand-in; prints for each of them the counts, the kernels and the errors.
STEPS = """
import json
from dataclasses import asdict
import torch
from torch.nn.functional import conv2d
from benchmarks import stand_in

found = {}

def record(name, step):
    step()  # sets up cuBLAS, cuDNN and the allocator
    stand_in.reset()
    step()
    found[name] = {"counts": asdict(stand_in.counts()), "kernels": stand_in.kernels()}

def capture(name, work):
    graph, errors = torch.cuda.CUDAGraph(), []
    stand_in.reset()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        errors = [str(error), str(error.__context__)]
    found[name] = {"counts": asdict(stand_in.counts()), "errors": errors}
    return graph

a, b = torch.ones(8, 8, device="cuda"), torch.ones(8, 8, device="cuda")
out, host = torch.empty_like(a), torch.ones(8, 8)
x = torch.ones(2, 8, 4, 4, device="cuda", dtype=torch.bfloat16, requires_grad=True)
weight = torch.ones(8, 8, 3, 3, device="cuda", dtype=torch.bfloat16, requires_grad=True)
side = torch.cuda.Stream()
record("addition", lambda: a + b)
record("item", lambda: a[0, 0].item())
record("matmul", lambda: a @ b)
record("to the device", lambda: host.to("cuda"))
record("on the device", lambda: out.copy_(a))
record("convolution", lambda: conv2d(x, weight, padding=1).sum().backward())
record("waiting", torch.cuda.synchronize)

graph = capture("two additions", lambda: a + b + b)
record("replay", graph.replay)
capture("backward", lambda: (a.clone().requires_grad_() * b).sum().backward())
capture("item in a capture", lambda: a.sum().item())
capture("after that", lambda: a + b)

def elsewhere(joins):
    if joins:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.add(a, b, out=out)
    if joins == "both":
        torch.cuda.current_stream().wait_stream(side)
    a + b

capture("another stream", lambda: elsewhere(""))
capture("a stream that joins", lambda: elsewhere("both"))
capture("a stream that does not join", lambda: elsewhere("begin"))
print(json.dumps({"found": found, "device": torch.cuda.get_device_capability()}))
"""


# Captures the step of each method and phase at two learning rates, with an epoch's smaller batch
# between them; prints what it asked of the stand-in during each capture and the replays after it,
# and which of the tensors that last from step to step moved.
CAPTURES = """
import json
from dataclasses import asdict
from unittest.mock import patch
import torch
from benchmarks import stand_in
from benchmarks.gpu.graph_steps import places
from benchmarks.workload import Case, loader_of, noise, training_step
from sskd.methods import METHODS
from sskd.teachers.assembly import assemble
from sskd.training.graph import GraphedStep
from sskd.training.step import WARMUP_STEPS

PAIR, SIZES = "resnet14-resnet8", {"batch": 8, "images": 100}  # the last batch is smaller
CHOICES = {"device": "cuda", "compile": "off", "graph": "on", "precompute": False}

def capture(case, images, name):
    step = training_step(case.config, images, loader_of(case, images.to("cuda")), name)
    assert type(step) is GraphedStep
    for _ in range(WARMUP_STEPS):
        step.take()
    before = places(step)
    captures = []
    for lr in (0.05, 0.005):
        step.optimizer.param_groups[0]["lr"] = lr
        stand_in.reset()
        step.take()
        captured = asdict(stand_in.counts())
        stand_in.reset()
        replays = 0
        while step.loader.next_size == step.loader.batch_size:
            step.take()
            replays += 1
        replayed = asdict(stand_in.counts())
        captures.append({"captured": captured, "replayed": replayed, "replays": replays})
        step.take()
        step.loader.begin_epoch(1)
    after = places(step)
    moved = [name for name, place in before.items() if after[name] != place]
    return {"captures": captures, "moved": moved, "tensors": len(before)}

found = {}
images = noise(SIZES["images"], torch.device("cpu"))
with patch("sskd.models.fusing._agree", return_value=True):
    for method in METHODS:
        for precision, optimizer in (("fp32", "adamw"), ("bf16", "sgd")):
            settings = {"method": method, "precision": precision, "optimizer": optimizer}
            case = Case(pair=PAIR, **SIZES, **CHOICES, **settings)
            for phase in assemble(case.config, images).phases():
                key = f"{method} {phase.name} {precision} {optimizer}"
                found[key] = capture(case, images, phase.name)
print(json.dumps(found))
"""


# Takes steps of three jobs with one teacher, one after another and in threads; prints for each
# whether it was captured as two graphs, how many random numbers it drew, from which seed, and the
# identity of its images.
THREADS = """
import json
from dataclasses import asdict
from unittest.mock import patch
import torch
from benchmarks import stand_in
from benchmarks.workload import Case, loader_of, noise, training_step
from sskd.commands.threads import run_in_threads
from sskd.streams import own_stream
from sskd.seeding import seed_torch
from sskd.training.shared_pass import SplitStep
from sskd.turns import shared

METHODS, STEPS = ("crd", "kd", "crd"), 100
SETTINGS = {"batch": 8, "images": 80, "compile": "off", "graph": "on", "precompute": False}

def job(method):
    def work():
        case = Case(pair="resnet14-resnet8", device="cuda", method=method, **SETTINGS)
        mine = shared("images", lambda: images.to("cuda"))
        step = training_step(case.config, images, loader_of(case, mine), None)
        step.method.shared_teacher = "of all jobs"
        generator = torch.cuda.default_generators[0]
        seed_torch(method)
        first = generator.get_offset()
        with own_stream(step.loader.device):
            for _ in range(STEPS):
                if step.loader.position == step.loader.steps:
                    step.loader.begin_epoch(0)
                step.take()
            step.meter.read()
        drawn = generator.get_offset() - first
        is_split = type(step._replay) is SplitStep
        return is_split, drawn, generator.initial_seed(), id(step.loader.augmenter._crop)
    return work

images = noise(80, torch.device("cpu"))
with patch("sskd.models.fusing._agree", return_value=True):
    jobs = {number: job(method) for number, method in enumerate(METHODS)}
    found = []
    for at_once in (1, 3):
        stand_in.reset()
        found.append((run_in_threads(jobs, at_once), asdict(stand_in.counts())))
    print(json.dumps(found))
"""


def on_stand_in(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the stand-in: a new process, because it must load the stand-in first."""
    if "SSKD_STAND_IN" not in os.environ:
        pytest.skip("SSKD_STAND_IN is not set: make test-stand-in sets it")
    try:
        check_requirements()
    except UserError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "benchmarks.stand_in", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    """What each of ``STEPS`` asked of the stand-in."""
    found: dict[str, Any] = json.loads(on_stand_in("-c", STEPS).stdout)
    return found


def counts(steps: dict[str, Any], name: str) -> dict[str, int]:
    """Return the counts of a step that are not zero."""
    return {key: count for key, count in steps["found"][name]["counts"].items() if count}


def test_the_counts_of_simple_operations_are_known(steps: dict[str, Any]) -> None:
    assert counts(steps, "addition") == {"launches": 1}
    assert counts(steps, "item") == {"device_to_host": 1, "syncs": 1}
    assert counts(steps, "matmul") == {"library_calls": 1}
    assert counts(steps, "to the device") == {"host_to_device": 1, "syncs": 1}
    assert counts(steps, "on the device") == {"device_to_device": 1}
    assert counts(steps, "waiting") == {"syncs": 1}


def test_a_kernel_has_its_name(steps: dict[str, Any]) -> None:
    (name,) = steps["found"]["addition"]["kernels"]
    assert "CUDAFunctor_add" in name


def test_a_convolution_in_bf16_is_three_library_calls(steps: dict[str, Any]) -> None:
    assert steps["device"] == [9, 0]
    called = [name for name in steps["found"]["convolution"]["kernels"] if "cudnn" in name]
    assert called == [f"cudnn convolution {part}" for part in (
        "backward data", "backward filter", "forward",
    )]  # fmt: skip


def test_a_graph_replays_with_one_launch(steps: dict[str, Any]) -> None:
    assert steps["found"]["two additions"]["counts"]["launches"] == 2
    assert counts(steps, "replay") == {"launches": 1}
    assert steps["found"]["replay"]["kernels"] == {"graph of 2 nodes": 1}


def test_the_backward_pass_is_captured(steps: dict[str, Any]) -> None:
    captured = steps["found"]["backward"]
    assert captured["errors"] == []
    assert captured["counts"]["launches"] > 3
    assert captured["counts"]["illegal"] == captured["counts"]["outside"] == 0


def test_an_item_in_a_capture_raises(steps: dict[str, Any]) -> None:
    last, first = steps["found"]["item in a capture"]["errors"]
    assert "operation not permitted when stream is capturing (cudaStreamSynchronize)" in first
    assert "operation failed due to a previous error during capture" in last
    assert steps["found"]["item in a capture"]["counts"]["illegal"] == 1
    assert steps["found"]["after that"]["errors"] == []


def test_work_on_another_stream_is_not_captured(steps: dict[str, Any]) -> None:
    assert steps["found"]["another stream"]["errors"] == []
    assert steps["found"]["another stream"]["counts"]["outside"] == 1
    assert steps["found"]["a stream that joins"]["errors"] == []
    assert steps["found"]["a stream that joins"]["counts"]["outside"] == 0
    last, _ = steps["found"]["a stream that does not join"]["errors"]
    assert "unjoined work" in last


def test_the_launches_of_a_step_are_written(tmp_path: Path) -> None:
    command = ["-m", "benchmarks.launches", "--pairs", "resnet14-resnet8", "--methods", "kd"]
    small = ["--precisions", "bf16", "--batch", "4", "--images", "40", "--kernels"]
    on_stand_in(*command, *small, "--out", str(tmp_path / "launches"))
    (found,) = json.loads((tmp_path / "launches.json").read_text())["launches"]
    teacher, student = (
        sum(isinstance(module, nn.Conv2d) for module in build_model(name, 100).modules())
        for name in ("resnet14", "resnet8")
    )
    called = {
        name.removeprefix("cudnn convolution "): count
        for name, count in found["kernels"].items()
        if name.startswith("cudnn convolution")
    }
    # No gradient reaches the images, so the first convolution has none for its input.
    assert called == {
        "forward": teacher + student,
        "backward filter": student,
        "backward data": student - 1,
    }
    assert found["counts"]["syncs"] == found["counts"]["device_to_host"] == 0
    assert "| kd | distill | bf16 |" in (tmp_path / "launches.md").read_text()


# ---- without the stand-in ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cublasLtMatmul", "cublasLtMatmul"),
        ("void at::native::(anonymous namespace)::f<float>", "f float"),
        (
            "at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, "
            "bool, at::native::(anonymous namespace)::CompareEqFunctor<float> >, std::array<char*, "
            "3ul>, false>",
            "vectorized_elementwise_kernel CompareEqFunctor float",
        ),
        (
            "at::native::reduce_kernel<512, 1, at::native::ReduceOp<c10::BFloat16, at::native::"
            "func_wrapper_t<c10::BFloat16, at::native::sum_functor<c10::BFloat16, float, "
            "c10::BFloat16> >, unsigned int, c10::BFloat16, 4, 8> >",
            "reduce_kernel sum_functor BFloat16",
        ),
    ],
)
def test_a_kernel_is_named_by_its_operation(name: str, expected: str) -> None:
    assert operation(name) == expected


def test_only_functions_that_compute_are_counted() -> None:
    compute = ["cublasSgemm_v2", "cudnnRNNForward", "cusparseSpMM", "cufftXtExec"]
    prepare = ["cublasGetVersion", "cudnnCreate", "cusparseSpMM_bufferSize", "cudaIpcOpenMemHandle"]
    lines = stubs_of(compute + prepare).splitlines()
    counted = [line.split()[1].partition("(")[0] for line in lines if "library_call(" in line]
    assert counted == sorted(compute)


@pytest.mark.parametrize("program", ["g++", "nm"])
def test_a_missing_program_is_named(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == program else f"/bin/{name}")
    monkeypatch.setattr(Path, "exists", lambda path: True)
    with pytest.raises(UserError) as raised:
        check_requirements()
    expected = f"the stand-in GPU needs {program}; install it: apt-get install g++"
    assert str(raised.value) == expected


def test_a_missing_header_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(Path, "exists", lambda path: path.name != "cudnn.h")
    with pytest.raises(UserError, match=r"needs nvidia/cudnn/include/cudnn\.h, which PyTorch"):
        check_requirements()


def test_a_process_is_not_on_the_stand_in_by_itself() -> None:
    assert not stand_in.is_active()


def test_every_step_is_captured_and_nothing_moves() -> None:
    found = json.loads(on_stand_in("-c", CAPTURES).stdout)
    assert {name.split()[0] for name in found} == set(METHODS)
    for name, step in found.items():
        assert step["tensors"] > 50, name
        assert step["moved"] == [], name
        assert [each["replays"] for each in step["captures"]] == [8, 11], name
        for each in step["captures"]:
            captured, replayed, replays = each["captured"], each["replayed"], each["replays"]
            assert captured["launches"] >= 50, name
            assert captured["illegal"] == captured["outside"] == 0, name
            waits = ("syncs", "host_to_device", "device_to_host", "library_calls")
            assert {kind: replayed[kind] for kind in waits} == dict.fromkeys(waits, 0), name
            # One for the graph, and two for each generator that it draws from.
            assert replays <= replayed["launches"] + replayed["memsets"] <= 5 * replays, name


def test_jobs_in_threads_draw_their_own_numbers() -> None:
    (alone, _), (together, counts) = json.loads(on_stand_in("-c", THREADS).stdout)
    assert counts["illegal"] == counts["outside"] == 0
    assert [job[:3] for job in together] == [job[:3] for job in alone]
    assert all(captured for captured, *_ in together)
    drawn = [job[1] for job in together]
    assert drawn[0] == drawn[2] > drawn[1] == 0
    assert len({job[3] for job in together}) == 1  # the images


def test_the_commands_on_a_gpu_write_every_row(tmp_path: Path) -> None:
    """The numbers are arbitrary, so some of the rows that read them fail."""
    pairs = ["--agree-pair", "resnet14-resnet8", "--pairs", "resnet14-resnet8", "--grid-pairs"]
    chosen = ["--methods", "crd", "sskd", "--teachers", "vgg8", "--works", "kd", "ss_head"]
    small = ["--precisions", "bf16", "--modes", "graph", "eager", "--jobs", "2", "--batch", "4"]
    few = ["--images", "80", "--rounds", "1", "--steps", "2", "--workers", "1"]
    command = ["-m", "benchmarks.gpu", "agree", "throughput", "--out", str(tmp_path)]
    done = on_stand_in(*command, *pairs, *chosen, *small, *few)
    assert done.stdout.splitlines()[-1] == "throughput: done"
    agree, throughput = (
        {row.pop("key"): row for row in map(json.loads, path.read_text().splitlines())}
        for path in (tmp_path / "agree.jsonl", tmp_path / "throughput.jsonl")
    )
    steps = [f"{name} bf16" for name in ("crd distill", "sskd ss_head", "sskd distill")]
    assert sorted(agree) == sorted(
        [f"{kind} {name}" for kind in ("cpu", "graph") for name in steps] + ["teacher vgg8 bf16"]
    )
    assert [agree[f"cpu {name}"]["wait"] for name in steps] == [""] * 3
    assert [agree[f"graph {name}"]["moved"] for name in steps] == [[]] * 3
    timed = [f"resnet14-resnet8 {work} {mode} bf16 {jobs}" for work in ("kd", "ss_head")
             for mode, jobs in (("graph", 1), ("eager", 1), ("graph", 2))]  # fmt: skip
    assert all(throughput[key]["seconds"] > 0 for key in timed)
    others = {f"{key} resnet14-resnet8" for key in ("evaluation", "checkpoint")}
    assert set(throughput) == {*others, "resnet14-resnet8 kd conventional fp32 1", *timed}
