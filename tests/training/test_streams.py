"""The work that is queued on a GPU, which is simulated here, and who waits for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sskd.seeding import OwnGenerators
from sskd.streams import Fence, StepLimit, copy_to_host, wait_for
from sskd.turns import Turns

GPU = torch.device("cuda:1")


class Stream:
    """A stream that records which events it waits for."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def wait_event(self, event: object) -> None:
        self._calls.append("held back")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the GPU."""
    found: list[str] = []
    stream = Stream(found)

    class Event:
        def __init__(self, **_: object) -> None:
            pass

        def record(self, on: Stream) -> None:
            assert on is stream
            found.append("recorded")

        def synchronize(self) -> None:
            found.append("waited")

    def current_stream(device: torch.device) -> Stream:
        assert device == GPU
        return stream

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    return found


def in_a_job(work: Callable[[], None]) -> None:
    with Turns(received=lambda: None).job(OwnGenerators()):
        work()


def test_a_fence_holds_back_a_stream_and_not_the_host(calls: list[str]) -> None:
    fence = Fence(GPU)
    fence.hold_back()
    assert calls == ["recorded", "held back"]
    fence.wait()
    assert calls[2:] == ["waited"]
    Fence(torch.device("cpu")).hold_back()
    Fence(torch.device("cpu")).wait()
    assert len(calls) == 3


def test_a_job_starts_a_limited_number_of_steps(calls: list[str]) -> None:
    """It waits for the steps 1 to 16 after 48, and so at most 48 are queued."""

    def start_steps() -> None:
        limit = StepLimit(GPU)
        for number in range(1, 65):
            limit.step_started()
            assert calls.count("recorded") == number // 16
            assert calls.count("waited") == max(0, number // 16 - 2)

    in_a_job(start_steps)
    alone = StepLimit(GPU)
    before = len(calls)
    for _ in range(64):
        alone.step_started()
    assert len(calls) == before


def test_only_one_of_several_jobs_waits_for_its_own_work(calls: list[str]) -> None:
    wait_for(GPU)  # the host waits anyway when it reads the values
    assert calls == []
    in_a_job(lambda: wait_for(GPU))
    assert calls == ["recorded", "waited"]


class OnGpu(torch.Tensor):
    """A tensor in the memory of a GPU that does not exist."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:1")


def test_a_copy_to_the_host_waits_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    """The GPU is simulated. Only the call of the returned function waits for it."""

    def on_the_host(x: torch.Tensor, *, device: str, pin_memory: bool) -> torch.Tensor:
        assert (device, pin_memory) == ("cpu", True)
        return torch.zeros(x.shape)

    monkeypatch.setattr(torch, "empty_like", on_the_host)
    wait = copy_to_host(torch.arange(6.0).as_subclass(OnGpu))
    assert calls == ["recorded"]
    assert wait().tolist() == [0, 1, 2, 3, 4, 5]
    assert calls == ["recorded", "waited"]
    on_cpu = torch.arange(6.0)
    assert copy_to_host(on_cpu)().tolist() == on_cpu.tolist()
