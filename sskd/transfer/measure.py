"""The accuracy of a linear classifier on the features of one network."""

from __future__ import annotations

from typing import Any

import torch

from sskd.data import DatasetSettings, Images, LabelledImages
from sskd.device import to_device
from sskd.measuring.datasets import normalised_for
from sskd.measuring.store import Key, data_key
from sskd.models import weights_digest
from sskd.trained import TrainedNetwork
from sskd.training.evaluation import predict_vectors
from sskd.transfer.protocols import PROTOCOLS, Features

SEED = 0  # of the layer's first weights and of the batches


def measurement_key(
    trained: TrainedNetwork, settings: DatasetSettings, images: Images, protocol: str
) -> Key:
    """Return what decides the result of a transfer."""
    chosen = PROTOCOLS[protocol]
    return {
        "kind": "transfer",
        "weights": weights_digest(trained.network),
        "normalisation": trained.normalisation,
        "data": data_key(settings, images),
        "protocol": [protocol, chosen.mirrored, repr(chosen)],
        "seed": SEED,
    }


def measure_transfer(
    trained: TrainedNetwork, images: Images, protocol: str, title: str
) -> dict[str, Any]:
    """Train a linear classifier on the features of ``trained``, frozen and in eval mode.

    Returns the fields of ``Reached``.

    Args:
        images: the dataset, on the device to compute on.
        protocol: a key of ``PROTOCOLS``.
        title: names the network on the progress bar.

    Raises:
        NotFiniteError: the features are not finite.
    """
    to_device(trained.network, images.train.device)
    features = compute_features(trained, images, title, mirrored=PROTOCOLS[protocol].mirrored)
    return PROTOCOLS[protocol].fit(features, SEED)._asdict()


def compute_features(
    trained: TrainedNetwork, images: Images, title: str, *, mirrored: bool
) -> Features:
    """Return the pooled features of all images; with ``mirrored``, of their mirror images too."""
    normalised = normalised_for(trained, images)

    def pooled(split: LabelledImages, part: str) -> torch.Tensor:
        found = predict_vectors(trained.network, split, normalised, f"{title}, {part}").pooled
        return found.to(split.device)

    views = [pooled(images.train, "training images")]
    if mirrored:
        views.append(pooled(images.train.mirrored(), "mirrored training images"))
    return Features(
        train=torch.stack(views),
        train_labels=images.train.labels,
        test=pooled(images.test, "test images"),
        test_labels=images.test.labels,
        classes=images.num_classes,
    )
