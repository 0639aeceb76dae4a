"""The device that a run uses, and its peak memory there."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from starting import PIPE, Started

import sskd.device
from sskd.device import (
    choose_device,
    peak_memory,
    reset_peak_gpu_memory,
    reset_peak_memory,
)
from sskd.errors import UserError

# A process that sees three GPUs, prints which one it chooses, and waits for a line to end.
CHOOSE_GPU = """
from types import SimpleNamespace
import torch
torch.cuda.device_count = lambda: 3
torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=f"gpu-{index}")
from sskd.device import claim_gpu
assert claim_gpu() == claim_gpu()
print(claim_gpu(), flush=True)
input()
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux reports it")
def test_the_peak_on_a_cpu_is_since_the_reset() -> None:
    device = torch.device("cpu")
    size = 512 * 2**20

    def peak_of(elements: int) -> float:
        reset_peak_memory(device)
        torch.ones(elements, dtype=torch.uint8).max()
        peak = peak_memory(device)
        assert peak is not None
        return peak

    small, large, again = peak_of(1), peak_of(size), peak_of(1)
    assert large - small == pytest.approx(512, rel=0.1)
    assert again == pytest.approx(small, rel=0.1)


@pytest.mark.parametrize(("name", "resets"), [("cuda:1", ["cuda:1"]), ("cpu", []), ("mps", [])])
def test_only_the_peak_of_a_gpu_starts_again(
    monkeypatch: pytest.MonkeyPatch, name: str, resets: list[str]
) -> None:
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda at: found.append(str(at)))
    monkeypatch.setattr(sskd.device, "trim_heap", lambda: pytest.fail("it is for a whole run"))
    before = peak_memory(torch.device("cpu")) or 0
    reset_peak_gpu_memory(torch.device(name))
    assert found == resets
    assert (peak_memory(torch.device("cpu")) or 0) >= before


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(), reason="large pages are off"
)
def test_tensors_on_a_cpu_use_large_pages() -> None:
    """So do tensors that are allocated after the memory of an earlier run was released."""
    program = """
import re, torch
from pathlib import Path
from sskd.device import reset_peak_memory, tune_device
device = torch.device("cpu")
tune_device(device)
for _ in range(2):
    reset_peak_memory(device)
    tensor = torch.ones(2**27)
    text = Path("/proc/self/smaps_rollup").read_text()
    print(re.search(r"AnonHugePages: +([0-9]+) kB", text)[1])
    del tensor
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(int(size) > 2**18 for size in done.stdout.split()), "half of 512 MiB, in KiB"


def test_processes_spread_over_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def start() -> Started:
        return Started("-c", CHOOSE_GPU, stdin=PIPE)

    def choice(process: Started) -> int:
        assert process.stdout is not None
        return int(process.stdout.readline())

    processes = [start() for _ in range(4)]
    chosen = [choice(process) for process in processes]
    assert sorted(Counter(chosen).values()) == [1, 1, 2]
    alone = next(index for index in range(3) if chosen.count(index) == 1)
    killed = processes[chosen.index(alone)]
    killed.kill()
    killed.wait()
    processes.append(start())
    assert choice(processes[-1]) == alone  # the killed process no longer counts
    for process in processes:
        process.kill()
        process.wait()


# Page faults of a tensor of 64 MiB that is allocated and freed repeatedly.
COUNT_FAULTS = """
import resource, sys, torch
from sskd.device import tune_device
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10
usual = faults()
tune_device(torch.device("cpu"))
faults()
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_freed_memory_is_used_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True
    )
    usual, kept = map(float, done.stdout.split())
    assert kept < usual / 10  # usually 16,384 faults with pages of 4 KiB, fewer with larger pages


def test_a_device_without_free_memory_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 MiB")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UserError, match=r"has no free memory \(CUDA out of memory\. Tried"):
        choose_device("cpu")
