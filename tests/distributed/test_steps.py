"""Training steps on two ranks: the same on both, and the same as on one."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import Compose
from many_ranks import Result, Steps, on_ranks

from sskd.checks.samples import random_images
from sskd.methods import METHODS

# Small images make the steps fast. The fourth step of an epoch has fewer images. As each class has
# as many images, crd draws all images of other classes, and its loss is the same on any rank.
IMAGES = random_images(40, 4, size=16)
WORDS = ("arch@teacher=resnet8", "arch@student=resnet8", "dataset=digits", "batch_size=12")
# A small rate: after a few large steps a difference in rounding has become one in every digit.
SLOW = "optimizer.lr=0.001"
ROUNDING = 5e-3  # of the largest value; dist divides by small deviations
# The methods that compare the images of a batch, which is the part of a rank by default.
COMPARE_IMAGES = {"cc", "dist", "luminet", "mlld", "pkt", "rkd", "skd", "sp", "sskd"}


class EveryMethod:
    """The steps of every method, in one pair of processes."""

    def __init__(
        self, composed: Compose, *words: str, steps: int, eval_norms: bool = False
    ) -> None:
        self.work = {
            name: Steps(
                composed(f"method={name}", *WORDS, *words).model_dump(), IMAGES, steps, eval_norms
            )
            for name in sorted(METHODS)
        }

    def __call__(self) -> dict[str, Result]:
        return {name: steps() for name, steps in self.work.items()}


def largest_difference(one: Result, other: Result) -> float:
    """Return the largest difference, as a share of the largest value of each tensor."""
    assert one.keys() == other.keys()
    differences = [
        (value - other[name]).abs().max() / other[name].abs().max().clamp(min=1e-3)
        for name, value in one.items()
    ]
    return max(map(float, differences))


def test_every_method_has_the_same_bits_on_both_ranks(composed: Compose, tmp_path: Path) -> None:
    work = EveryMethod(composed, steps=20)
    for name, words in {
        "a weight of 0": ("method=at", "weighting=crd_benchmark"),
        "bf16": ("method=kd", "precision=bf16"),
    }.items():
        work.work[name] = Steps(composed(*WORDS, *words).model_dump(), IMAGES, steps=3)
    first, second = on_ranks(2, work, tmp_path)
    for name in work.work:
        assert first[name].keys() == second[name].keys()
        different = [k for k, v in first[name].items() if not torch.equal(v, second[name][k])]
        assert not different, name


def test_two_ranks_train_as_one_does_if_norms_do_not_see_the_batch(
    composed: Compose, tmp_path: Path
) -> None:
    work = EveryMethod(composed, SLOW, steps=2, eval_norms=True)
    first, _ = on_ranks(2, work, tmp_path)
    differences = {name: largest_difference(first[name], work.work[name]()) for name in METHODS}
    differ = {name for name, difference in differences.items() if difference > 4 * ROUNDING}
    assert differ == COMPARE_IMAGES
    assert all(differences[name] < ROUNDING for name in METHODS.keys() - differ), differences


def test_two_ranks_train_as_one_does_on_the_whole_batch(composed: Compose, tmp_path: Path) -> None:
    words = ("gather_batch=true", "sync_batch_norm=true", SLOW)
    work = EveryMethod(composed, *words, steps=2)
    first, _ = on_ranks(2, work, tmp_path)
    differences = {name: largest_difference(first[name], work.work[name]()) for name in METHODS}
    assert not {name: value for name, value in differences.items() if value > ROUNDING}
