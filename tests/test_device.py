"""The memory that a run has taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sskd.device import peak_memory, reset_peak_memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_the_peak_on_a_cpu_is_that_since_the_reset() -> None:
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
