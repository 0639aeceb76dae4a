"""The precision of every computation: TF32's two flags, autocast, and what ``auto`` means."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Compose, SmallTeacher, random_images
from crashes import CrashError, at_step, crash
from faults import SMALL
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from sskd import precision
from sskd.data import Batch
from sskd.errors import UserError
from sskd.methods import LossOutput, Phase
from sskd.methods.base import in_float32
from sskd.precision import PRECISIONS, computing, exact, multiplying, resolve_precision
from sskd.runs.folder import read_config_file
from sskd.runs.result import RunResult
from sskd.teachers.find import run_location
from sskd.teachers.outputs import Layout
from sskd.teachers.precompute import _outputs
from sskd.train import train
from sskd.training.evaluation import predict
from sskd.training.result import _circumstances
from sskd.training.step import train_step

CPU = torch.device("cpu")
OFF = (False, False)
# The flags of convolutions and of matrix products in each precision.
EXPECTED = {"fp32": OFF, "tf32": (True, False), "bf16": OFF}


def flags() -> tuple[bool, bool]:
    """Return PyTorch's flags of TF32 in convolutions and in matrix products."""
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = flags()
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def can_multiply(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, *cpu: str
) -> None:
    """Pretend that there is a GPU of this ``capability``, or none, and a ``cpu`` with these."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    known = dict.fromkeys(cpu, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)


@pytest.mark.parametrize("before", [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("name", PRECISIONS)
def test_the_flags_are_set_and_restored(name: str, before: tuple[bool, bool]) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    with computing(name, CPU):
        assert flags() == EXPECTED[name]
        assert torch.is_autocast_enabled("cpu") == (name == "bf16")
        with exact(CPU):
            assert flags() == OFF
            assert not torch.is_autocast_enabled("cpu")
        assert flags() == EXPECTED[name]
    assert flags() == before
    with pytest.raises(CrashError), multiplying(name):
        crash()
    assert flags() == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="it came with torch 2.9")
@pytest.mark.parametrize("name", PRECISIONS)
def test_pytorchs_newer_setting_is_overruled(name: str) -> None:
    every: Any = torch.backends
    convolutions, products = every.cudnn.conv, every.cuda.matmul
    before = every.fp32_precision
    every.fp32_precision = convolutions.fp32_precision = products.fp32_precision = "tf32"
    try:
        with multiplying(name):
            found = (convolutions.fp32_precision == "tf32", products.fp32_precision == "tf32")
            assert found == EXPECTED[name]
        assert convolutions.fp32_precision == products.fp32_precision == "tf32"
    finally:
        every.fp32_precision = before


class Watched(torch.autograd.Function):
    """The identity; it records the flags of its forward and of its backward pass."""

    seen: list[tuple[bool, bool]]

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        Watched.seen.append(flags())
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        Watched.seen.append(flags())
        assert not torch.is_autocast_enabled("cpu")
        return gradients[0]


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_step_has_its_flags_in_both_passes(name: str) -> None:
    layer, Watched.seen = nn.Conv2d(3, 2, 3), []

    @in_float32
    def loss(output: Tensor) -> Tensor:
        assert output.dtype == torch.float32
        assert (output.flatten(1) @ output.flatten(1).T).dtype == torch.float32
        watched: Tensor = Watched.apply(output)
        return watched.square().mean()

    def losses(batch: Batch) -> LossOutput:
        output = layer(Watched.apply(batch.x))
        assert output.dtype == (torch.bfloat16 if name == "bf16" else torch.float32)
        return LossOutput({"ce": loss(output)}, {})

    images = random_images(4, 4)
    batch: Any = SimpleNamespace(x=torch.randn(4, 3, 8, 8, requires_grad=True), y=images.train)
    phase = Phase("train", layer, losses, {"ce": 1.0})
    before = flags()
    train_step(phase, torch.optim.SGD(layer.parameters(), 0.1), batch, name)
    # Two forward passes and two backward passes.
    assert Watched.seen == [EXPECTED[name]] * 4
    assert flags() == before


@contextmanager
def watching(seen: set[Any], what: Callable[[nn.Module], Any]) -> Iterator[None]:
    """Add what each forward pass of a convolution shows to ``seen``."""

    def hook(module: nn.Module, *_: Any) -> None:
        if isinstance(module, nn.Conv2d):
            seen.add(what(module))

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", PRECISIONS)
def test_precomputed_outputs_have_the_precision(name: str) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 5, 32)

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=self.layer(x).flatten(1))

    images = random_images(1, 1)
    layout = Layout(1, 162, {"logits": 5}, torch.float32)
    seen: set[Any] = set()
    with watching(seen, lambda module: (flags(), torch.is_autocast_enabled("cpu"))):
        list(_outputs(Network(), images, name, layout, first=0))
    assert seen == {(EXPECTED[name], name == "bf16")}


def test_evaluation_in_tf32_is_exact(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = composed(*SMALL, "method=vanilla", "schedule.epochs=1", "precision=tf32")
    seen: set[Any] = set()
    with monkeypatch.context() as patch, watching(seen, lambda module: (module.training, flags())):
        patch.setitem(precision._HAS_TF32, "cpu", lambda device: True)
        result = train(config)
    assert seen == {(True, EXPECTED["tf32"]), (False, OFF)}
    assert (result.precision, result.tf32) == ("tf32", True)
    assert result.difference["precision"] == "tf32"
    assert train(config) == result  # a finished run needs no GPU


def test_a_caller_in_bf16_evaluates_in_float32() -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor) -> Any:
            product = x.flatten(1) @ torch.ones(3 * 32 * 32, 5)
            assert product.dtype == torch.float32
            return SimpleNamespace(logits=product)

    images = random_images(2, 2)
    with computing("bf16", CPU):
        predict(Network(), images.test, images)


def test_auto_depends_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, expected in (("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "fp32")):
        can_multiply(monkeypatch, None, cpu)
        assert resolve_precision("auto", CPU) == expected
    for capability, expected in (((8, 0), "bf16"), ((9, 0), "bf16"), ((7, 5), "fp32")):
        can_multiply(monkeypatch, capability)
        assert resolve_precision("auto", torch.device("cuda:1")) == expected
    assert resolve_precision("auto", torch.device("mps")) == "fp32"
    assert [resolve_precision(name, CPU) for name in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_tf32_needs_an_nvidia_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    can_multiply(monkeypatch, (8, 6))
    assert resolve_precision("tf32", torch.device("cuda:1")) == "tf32"
    for name, capability, hip in (
        ("cpu", (9, 0), None), ("mps", (9, 0), None), ("cuda", (7, 5), None), ("cuda", (9, 0), "6"),
    ):  # fmt: skip
        can_multiply(monkeypatch, capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        with pytest.raises(UserError, match=rf"^precision=tf32: .* '{name}' .*precision=fp32$"):
            resolve_precision("tf32", torch.device(name))


@pytest.mark.parametrize("setting", ["precision", "teacher.precision"])
def test_tf32_is_refused_before_a_teacher_is_trained(
    composed: Compose, tmp_path: Path, setting: str
) -> None:
    config = composed(*SMALL, "method=kd", f"{setting}=tf32")
    with pytest.raises(UserError, match=rf"^{setting}=tf32: the device 'cpu'.*{setting}=fp32$"):
        train(config)
    assert not (tmp_path / "runs").exists()


def test_auto_is_one_run_on_every_machine(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_teacher: SmallTeacher
) -> None:
    small_teacher.put(tmp_path / "bf16", tmp_path / "fp32")
    words = (*SMALL, "method=sskd", "teacher.precision=fp32", "schedule.epochs=1",
             "teacher.epochs=3")  # fmt: skip
    for name, cpu in (("bf16", "avx512_bf16"), ("fp32", "avx2")):
        can_multiply(monkeypatch, None, cpu)
        config = composed(*words, "precision=auto", f"runs={tmp_path / name}")
        folder, difference = run_location(config)
        with monkeypatch.context() as patch:
            can_multiply(patch, (9, 0))
            assert run_location(composed(*words, "precision=auto", f"runs={config.runs}")) == (
                folder, difference,
            )  # fmt: skip
        assert difference["precision"] == config.precision == "auto"
        result = train(config)
        assert (result.precision, result.tf32) == (name, False)
        assert result.run is not None
        assert result.run["precision"] == read_config_file(folder / "config.yaml")["precision"]
        assert result.run["precision"] == "auto"
        # In the report the run is beside those with the explicit precision.
        named = run_location(composed(*words, f"precision={name}"))[1]
        assert result.difference == named
        (phase,) = Path(config.runs).glob("digits/phases/*/*/*/config.yaml")
        assert read_config_file(phase)["precision"] == name
    assert len({path.relative_to(tmp_path / n) for n in ("bf16", "fp32")
                for path in (tmp_path / n).glob("digits/distill/*/*/*")}) == 1  # fmt: skip


def test_auto_resumes_only_in_the_same_precision(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = composed(*SMALL, "method=vanilla", "precision=auto")
    can_multiply(monkeypatch, None, "avx512_bf16")
    with monkeypatch.context() as patch:
        at_step(patch, 7, crash)  # in the second epoch; the first one is saved
        with pytest.raises(CrashError):
            train(config)
    (path,) = (tmp_path / "runs").rglob("last.pt")
    state = torch.load(path, weights_only=True)
    assert state["precision"] == "bf16"
    can_multiply(monkeypatch, None)
    for device, advice in (
        ("cpu", "use a 'cpu' device of the same model"),
        ("cuda", "use device=cuda"),
    ):
        torch.save(state | {"device": device}, path)
        with pytest.raises(
            UserError,
            match=rf"stopped in 'bf16' on '{device}', but precision=auto is 'fp32' on this 'cpu'; "
            rf"{advice}, or start from scratch with force=true$",
        ):
            train(config)
    can_multiply(monkeypatch, None, "amx_bf16")
    assert train(config).epoch == 3


def test_the_result_of_a_gpu_names_its_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**20)
    monkeypatch.setattr(torch.backends.cudnn.m, "version", lambda: 91002)  # type: ignore[attr-defined]
    for name, versions in (("cuda", {"cudnn": 91002}), ("cpu", {})):
        images: Any = SimpleNamespace(train=SimpleNamespace(device=torch.device(name)))
        found = _circumstances(images)["versions"]
        assert {key: found[key] for key in found if key == "cudnn"} == versions
        result = RunResult(precision="fp32", tf32=False, versions=found)
        assert RunResult.from_json(json.loads(json.dumps(result.to_json()))) == result
