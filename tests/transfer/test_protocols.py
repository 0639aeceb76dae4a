"""The linear classifiers: against scikit-learn on convex problems, and the recipe of HSAKD."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from sskd.transfer.__main__ import PROTOCOL_NAMES
from sskd.transfer.protocols import PROTOCOLS, Features, LogisticProtocol, SgdProtocol

CLASSES = 3


def make_features(views: int = 1, noise: float = 1.0, images: int = 60) -> Features:
    """Return noisy features [views, images, 4] around a centre for each class."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(CLASSES, 4, generator=generator)
    labels = torch.arange(images) % CLASSES

    def around() -> Tensor:
        return centres[labels] + noise * torch.randn(images, 4, generator=generator)

    train = torch.stack([around() for _ in range(views)])
    return Features(train, labels, around(), labels, CLASSES)


def test_sgd_reaches_the_minimum_of_scikit_learn() -> None:
    """Full batches and a weight decay make the problem convex with one minimum."""
    found, decay = make_features(), 0.01
    protocol = SgdProtocol(epochs=300, lr=0.3, milestones=(), batch_size=60, weight_decay=decay)
    *_, layer = protocol.train(found, seed=0)
    # PyTorch decays the bias as well, so it is the weight of a constant feature here.
    x = np.hstack([found.train[0].double().numpy(), np.ones((60, 1))])
    model = LogisticRegression(C=1 / (60 * decay), fit_intercept=False, tol=1e-10, max_iter=5000)
    model.fit(x, found.train_labels.numpy())
    weights = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()
    assert weights.numpy() == pytest.approx(model.coef_, abs=1e-3)


class Recorded(torch.optim.SGD):
    """An optimizer that records its settings at each step."""

    steps: list[tuple[float, float, bool, float]] = []  # noqa: RUF012

    def step(self, closure: Any = None) -> Any:
        (group,) = self.param_groups
        names = ("lr", "momentum", "nesterov", "weight_decay")
        self.steps.append(tuple(group[name] for name in names))
        return super().step(closure)


def test_hsakds_recipe_is_that_of_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "SGD", Recorded)
    monkeypatch.setattr(Recorded, "steps", [])
    PROTOCOLS["hsakd"].fit(make_features(images=90), seed=0)
    assert len(Recorded.steps) == 100 * 2, "two batches, of 64 and 26 images"
    assert {step[1:] for step in Recorded.steps} == {(0.9, True, 0)}
    rates = [step[0] for step in Recorded.steps[::2]]
    expected = [0.1] * 30 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 10
    assert rates == pytest.approx(expected)


def test_an_epoch_has_each_image_once_in_one_of_its_views() -> None:
    found = make_features(views=2)
    batches = list(SgdProtocol()._batches(found, seed=1))
    assert [len(labels) for _, labels in batches] == [60]
    rows = batches[0][0]
    places = [(found.train == row).all(-1).nonzero().tolist() for row in rows]
    assert sorted(image for ((_, image),) in places) == list(range(60))
    views = [view for ((view, _),) in places]
    assert 15 < sum(views) < 45
    assert all(
        found.train_labels[image] == label
        for ((_, image),), label in zip(places, batches[0][1], strict=True)
    )


def test_a_seed_decides_the_result_and_leaves_the_global_one() -> None:
    found, protocol = make_features(views=2), SgdProtocol(epochs=2)

    def weights(seed: int) -> Tensor:
        *_, layer = protocol.train(found, seed)
        return layer.weight

    before = torch.get_rng_state()
    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert torch.equal(torch.get_rng_state(), before)


class GoodInBetween(SgdProtocol):
    """Predicts one class after the first and the last of three epochs."""

    def train(self, features: Features, seed: int) -> Iterator[nn.Linear]:
        *_, good = SgdProtocol(epochs=30).train(features, seed)
        one_class = nn.Linear(4, CLASSES)
        nn.init.zeros_(one_class.weight)
        yield from (one_class, good, one_class)


def test_the_best_epoch_is_recorded_beside_the_last() -> None:
    reached = GoodInBetween().fit(make_features(noise=0.1), 0)
    assert reached.last == pytest.approx(100 / 3)
    assert (reached.best, reached.best_epoch) == (100, 2)


def test_logistic_regression_chooses_its_strength_without_the_test_part() -> None:
    """A strong penalty cannot suppress a feature that is large and says nothing."""
    found = make_features(noise=0.5)
    large = 50 * torch.randn(2, 60, 1, generator=torch.Generator().manual_seed(1))
    found = found._replace(
        train=torch.cat([found.train, large[:1]], dim=2),
        test=torch.cat([found.test, large[1]], dim=1),
    )
    protocol = LogisticProtocol(strengths=(1e-6, 1.0))
    reached = protocol.fit(found, 0)
    assert reached.setting == "C=1"
    model = LogisticRegression(C=1.0, max_iter=1000)
    model.fit(found.train[0].double().numpy(), found.train_labels.numpy())
    top1 = 100 * model.score(found.test.double().numpy(), found.test_labels.numpy())
    assert (reached.last, reached.best, reached.best_epoch) == (top1, top1, None)
    other = protocol.fit(found._replace(test=-found.test), 0)
    assert other.setting == "C=1"
    assert other.last < reached.last


def test_both_protocols_agree_on_an_easy_problem() -> None:
    found = make_features(noise=0.2)
    assert [protocol.fit(found, 0).last for protocol in PROTOCOLS.values()] == [100, 100]


def test_the_command_knows_every_protocol() -> None:
    assert set(PROTOCOL_NAMES) == set(PROTOCOLS)
    assert all(protocol.description for protocol in PROTOCOLS.values())
