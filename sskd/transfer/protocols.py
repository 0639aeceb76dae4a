"""How the linear classifier is trained: named protocols.

``hsakd`` is that of the code of Yang et al., *Hierarchical Self-supervised Augmented Knowledge
Distillation*, IJCAI 2021 (github.com/winycg/HSAKD, ``eval_rep.py``), on features that are computed
once: of each training image and of its mirror image, of which an epoch draws one. Their code draws
a crop of random size and position as well, and computes the features in each epoch.

``logistic`` is the convex alternative: L2-regularised logistic regression by L-BFGS, its strength
chosen on held-out training images, as Kornblith et al. do (*Do Better ImageNet Models Transfer
Better?*, CVPR 2019). It has no schedule and no random order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Split
from sskd.data.images import hold_out
from sskd.output import complain_once
from sskd.schedule import Schedule
from sskd.seeding import derive_seed
from sskd.training.evaluation import accuracy


class Features(NamedTuple):
    """Features of a dataset, float32 on one device.

    ``train`` is ``[V, N, d]``: V views of each training image; ``test`` is ``[M, d]``. The labels
    are int64 ``[N]`` and ``[M]``.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int


class Reached(NamedTuple):
    """Top-1 accuracies on the test part in percent, and the epoch of the best one, from 1.

    A protocol without epochs has the same value twice, and no epoch. ``setting`` describes what it
    has chosen on held-out images, if anything.
    """

    last: float
    best: float
    best_epoch: int | None = None
    setting: str = ""


class LinearProtocol(Protocol):
    """A way to train the linear classifier."""

    mirrored: ClassVar[bool]
    description: ClassVar[str]

    def fit(self, features: Features, seed: int) -> Reached:
        """Train on the training features and return the accuracies on the test part."""


@dataclass(frozen=True)
class SgdProtocol:
    """SGD with Nesterov momentum, in epochs over random batches."""

    mirrored: ClassVar[bool] = True
    description: ClassVar[str] = (
        "HSAKD's: SGD with Nesterov momentum 0.9, learning rate 0.1, multiplied by 0.1 after"
        " epochs 30, 60 and 90 of 100, batches of 64, no weight decay; on the features of each"
        " training image and of its mirror image, without HSAKD's random resized crop"
    )

    epochs: int = 100
    lr: float = 0.1
    milestones: tuple[int, ...] = (30, 60, 90)
    gamma: float = 0.1
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 0.0

    def fit(self, features: Features, seed: int) -> Reached:
        """Train a layer and return its accuracies after the last and after the best epoch."""
        with torch.no_grad():
            top1 = [
                accuracy(layer(features.test), features.test_labels)
                for layer in self.train(features, seed)
            ]
        best = max(top1)
        return Reached(top1[-1], best, top1.index(best) + 1)

    def train(self, features: Features, seed: int) -> Iterator[nn.Linear]:
        """Yield the layer after each epoch; ``seed`` decides its first weights and the batches."""
        layer = _new_layer(features, seed)
        schedule = Schedule(self.epochs, self.lr, self.milestones, self.gamma)
        optimizer = torch.optim.SGD(
            layer.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            weight_decay=self.weight_decay,
        )
        for epoch in range(self.epochs):
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr_at(epoch)
            for x, y in self._batches(features, derive_seed("transfer", seed, epoch)):
                with torch.enable_grad():
                    loss = F.cross_entropy(layer(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            yield layer

    def _batches(self, features: Features, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch: one view of each image, in random order."""
        views, images = features.train.shape[:2]
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(images, generator=generator)
        drawn = torch.randint(views, (images,), generator=generator)
        device = features.train.device
        order, drawn = order.to(device), drawn.to(device)
        for part, view in zip(
            order.split(self.batch_size), drawn.split(self.batch_size), strict=True
        ):
            yield features.train[view, part], features.train_labels[part]


@dataclass(frozen=True)
class LogisticProtocol:
    """Logistic regression with an L2 penalty, by L-BFGS.

    ``strengths`` are the candidates of scikit-learn's ``C``, the weight of the loss beside the
    penalty. Of each class, ``holdout`` of the training images choose one of them.
    """

    mirrored: ClassVar[bool] = False
    description: ClassVar[str] = (
        "logistic regression with an L2 penalty by L-BFGS on the features of each training image;"
        " its strength is chosen on a fifth of the training images"
    )

    strengths: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    holdout: float = 0.2
    most_steps: int = 1000

    def fit(self, features: Features, seed: int) -> Reached:
        """Fit on all training images with the chosen strength; return the accuracy twice."""
        train = Split(features.train[0].cpu(), features.train_labels.cpu())
        test = Split(features.test.cpu(), features.test_labels.cpu())
        names = tuple(map(str, range(features.classes)))
        part, held_out = hold_out(train, names, self.holdout, seed)
        assert held_out is not None
        scores = [self._top1(part, held_out, strength) for strength in self.strengths]
        # If several scores are equal, this is the strongest penalty, because it comes first.
        chosen = self.strengths[scores.index(max(scores))]
        top1 = self._top1(train, test, chosen)
        return Reached(top1, top1, setting=f"C={chosen:g}")

    def _top1(self, train: Split, test: Split, strength: float) -> float:
        """Return the accuracy on ``test``, whose ``images`` are features, as those of ``train``."""
        # The import takes half a second, which the other protocol should not pay for.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=strength, max_iter=self.most_steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(train.images.double().numpy(), train.labels.numpy())
        if caught:
            complain_once(
                f"warning: L-BFGS has not converged in {self.most_steps} steps with C={strength:g}"
            )
        return 100 * float(model.score(test.images.double().numpy(), test.labels.numpy()))


def _new_layer(features: Features, seed: int) -> nn.Linear:
    """Return a layer with PyTorch's initialisation, the same on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("transfer", seed, "layer"))
        layer = nn.Linear(features.test.shape[1], features.classes)
    return layer.to(features.test.device)


PROTOCOLS: dict[str, LinearProtocol] = {"hsakd": SgdProtocol(), "logistic": LogisticProtocol()}
