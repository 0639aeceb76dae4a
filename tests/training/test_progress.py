"""What a person sees of a long stage."""

from __future__ import annotations

import pytest

import sskd.training.progress
from sskd.training.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a clock that stands still until its only entry is changed."""
    now = [0.0]
    monkeypatch.setattr(sskd.training.progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_plain_lines_and_few(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    looks = 0

    def figures() -> dict[str, float]:
        nonlocal looks
        looks += 1
        return {"loss": 2.5, "loss/ce": 1.25, "weighted/ce": 0.1, "top1": 43.21}

    progress = Progress("distill", 4, 1000, done=0, metrics=figures)
    for second in range(1, 121):
        clock[0] = second
        progress.advance(10)
    progress.epoch(1, {"lr": 0.05, "test/top1": 50.0, "seconds": 3, "images_per_second": 1234.5})
    progress.close()
    assert looks == 2  # once a minute: each look is a copy from the device
    assert capsys.readouterr().out.splitlines() == [
        # 600 of 4000 images in 60 seconds: 340 seconds for the other 3400
        "distill: epoch 1/4, 15.0 %, loss 2.5, loss/ce 1.25, top1 43.21, 05:40 left",
        "distill: epoch 2/4, 30.0 %, loss 2.5, loss/ce 1.25, top1 43.21, 04:40 left",
        "distill: epoch 1/4, lr 0.05, test/top1 50.00, images_per_second 1234, 04:40 left",
    ]


def test_what_an_earlier_start_has_trained_does_not_count_for_the_rate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("train", 2, 100, done=150, metrics=dict)
    clock[0] = 10.0
    progress.advance(10)
    progress.epoch(2, {})
    assert capsys.readouterr().out == "train: epoch 2/2, 00:40 left\n"
