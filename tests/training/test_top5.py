"""Accuracies on the test set, and which of them an epoch reports."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sskd.checks.samples import random_images
from sskd.models import build_model
from sskd.training.evaluation import evaluate_epoch, predict, top5_accuracy


def test_top5_is_that_of_a_sort() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(300, 40, generator=generator)
    labels = torch.randint(0, 40, (300,), generator=generator)
    largest = np.argsort(-logits.numpy(), axis=1)[:, :5]
    share = np.mean([label in row for label, row in zip(labels.numpy(), largest, strict=True)])
    assert 0 < share < 1
    assert top5_accuracy(logits, labels) == pytest.approx(100 * share)


@pytest.mark.parametrize(("classes", "reported"), [(10, False), (19, False), (20, True)])
def test_an_epoch_reports_top5_from_20_classes_on(classes: int, reported: bool) -> None:
    images = random_images(1, 40, classes)
    images = replace(images, holdout=images.test)
    network = build_model("resnet8", classes)
    found = evaluate_epoch(network, images)
    top5 = {"test/top5", "holdout/top5"} if reported else set()
    assert found.keys() == {"test/top1", "holdout/top1"} | top5
    if reported:
        logits = predict(network, images.test, images)
        assert found["test/top5"] == top5_accuracy(logits, images.test.labels)
