"""The progress that a user sees during a long phase."""

from __future__ import annotations

import pytest

import sskd.training.progress
from sskd.runs.epoch_line import EpochLine
from sskd.training.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock; it shows the only entry of the returned list."""
    now = [0.0]
    monkeypatch.setattr(sskd.training.progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_few_plain_lines(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    reads = 0

    def read_metrics() -> dict[str, float]:
        nonlocal reads
        reads += 1
        return {"loss": 2.5, "loss/ce": 1.25, "weighted/ce": 0.1, "top1": 43.21}

    progress = Progress("distill", 4, 1000, done=0, metrics=read_metrics)
    for second in range(1, 121):
        clock[0] = second
        progress.advance(10)
    metrics = {"lr": 0.05, "test/top1": 50.0, "seconds": 3, "images_per_second": 1234.5}
    progress.epoch(EpochLine("distill", 1, metrics))
    progress.close()
    assert reads == 2  # once a minute, because each read copies from the device
    assert capsys.readouterr().out.splitlines() == [
        # 600 of 4000 images took 60 seconds, so the other 3400 take 340 seconds.
        "distill: epoch 1/4, 15.0 %, loss 2.5, loss/ce 1.25, top1 43.21, 05:40 left",
        "distill: epoch 2/4, 30.0 %, loss 2.5, loss/ce 1.25, top1 43.21, 04:40 left",
        "distill: epoch 1/4, lr 0.05, test/top1 50.00, images_per_second 1234, 04:40 left",
    ]


def test_images_of_an_earlier_start_do_not_raise_the_rate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("train", 2, 100, done=150, metrics=dict)
    clock[0] = 10.0
    progress.advance(10)
    progress.epoch(EpochLine("train", 2, {}))
    assert capsys.readouterr().out == "train: epoch 2/2, 00:40 left\n"
