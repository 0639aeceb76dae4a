"""Accuracies and confusions against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from samples import overconfident
from sklearn import metrics

from sskd.evaluate.classification import (
    Confusion,
    class_accuracies,
    confusion_matrix,
    frequent_confusions,
    wilson_interval,
)
from sskd.training.evaluation import accuracy, top_k


@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_top_k_is_that_of_scikit_learn(k: int) -> None:
    logits, labels = overconfident()
    share = metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(12))
    assert top_k(logits, labels, k) == pytest.approx(100 * share)
    if k == 1:
        assert top_k(logits, labels, k) == accuracy(logits, labels)


def test_classes_and_confusions_are_those_of_scikit_learn() -> None:
    logits, labels = overconfident()
    predicted = logits.argmax(1)
    matrix = confusion_matrix(predicted, labels, 12)
    assert matrix.tolist() == metrics.confusion_matrix(labels, predicted).tolist()
    recall = metrics.recall_score(labels, predicted, average=None)
    assert class_accuracies(matrix) == pytest.approx(list(100 * recall))


def test_the_most_frequent_confusions_come_first() -> None:
    matrix = torch.tensor([[5, 0, 3], [3, 1, 0], [0, 4, 0]])
    found = frequent_confusions(matrix, 3)
    assert found == [
        Confusion(2, 1, 4, 100.0),
        Confusion(0, 2, 3, 37.5),
        Confusion(1, 0, 3, 75.0),
    ]
    assert frequent_confusions(matrix, 2) == found[:2]
    assert frequent_confusions(5 * torch.eye(3, dtype=torch.int64), 3) == []


def test_a_class_without_images_has_no_accuracy() -> None:
    matrix = confusion_matrix(torch.tensor([0, 2]), torch.tensor([0, 0]), 3)
    assert class_accuracies(matrix) == [50.0, None, None]


@pytest.mark.parametrize(
    ("percent", "count", "expected"),
    # The first is the example of Newcombe (1998), table I: 81 of 263.
    [(100 * 81 / 263, 263, (25.53, 36.62)), (0, 10, (0, 27.75)), (100, 10, (72.25, 100))],
)
def test_the_interval_is_wilsons(percent: float, count: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(percent, count) == pytest.approx(expected, abs=0.01)
