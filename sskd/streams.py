"""Streams of an NVIDIA GPU: the work that is queued there, and who waits for it.

On another device all of this does nothing, because the work is done when its call returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sskd.turns import outside_turn, pass_turn, shares_process


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Compute on a new stream of ``device`` inside a ``with`` block, if it is an NVIDIA GPU.

    A CUDA graph cannot be captured on the default stream.
    """
    if device.type != "cuda":
        yield
        return
    outer, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)


class Fence:
    """The end of the work that is queued now on this thread's stream of ``device``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = _record_event(device) if device.type == "cuda" else None

    def hold_back(self) -> None:
        """Let this thread's stream start later work only after it; the host does not wait."""
        if self._event:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def wait(self) -> None:
        """Let other jobs of this process work until the GPU has done the work."""
        if self._event:
            with outside_turn():
                self._event.synchronize()


class StepLimit:
    """Bounds the steps that one of several jobs starts before an NVIDIA GPU has computed them.

    A job that starts too many fills the GPU's queue, and then has the turn until there is room.
    """

    _PART = 16  # steps
    _MOST_PARTS = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_limited = device.type == "cuda" and shares_process()
        self._started = 0
        self._parts: deque[Fence] = deque()

    def step_started(self) -> None:
        """Pass the turn to other jobs, after the start of a step."""
        self._started += 1
        if self._is_limited and self._started % self._PART == 0:
            self._parts.append(Fence(self._device))
            if len(self._parts) > self._MOST_PARTS:
                self._parts.popleft().wait()
        pass_turn()


def wait_for(device: torch.device) -> None:
    """Let other jobs of this process work until an NVIDIA GPU has done the work of this one."""
    if shares_process():
        Fence(device).wait()


def copy_to_host(x: Tensor) -> Callable[[], Tensor]:
    """Start copying ``x`` to the CPU; return a function that waits for the copy and returns it.

    This thread does not wait for an NVIDIA GPU. Another thread may call the function.
    """
    if x.device.type != "cuda":
        copy = x.cpu()
        return lambda: copy
    # A copy to memory that is not pinned would block the host.
    pinned = torch.empty_like(x, device="cpu", pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        copied.synchronize()
        return pinned

    return wait


def _record_event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)  # the thread sleeps while it waits
    event.record(torch.cuda.current_stream(device))
    return event
