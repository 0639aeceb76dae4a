"""What methods put beside the networks: heads here, and their sizes, read off the networks."""

from __future__ import annotations

import torch
from torch import nn

from sskd.data import Images
from sskd.models import Features


def features_of(network: nn.Module, data: Images) -> Features:
    """Return ``network``'s features of one zero image of ``data``'s size, to read shapes from."""
    was_training = network.training
    parameter = next(network.parameters())
    image = torch.zeros(1, 3, data.image_size, data.image_size, device=parameter.device)
    with torch.no_grad():
        features: Features = network.eval()(image)
    network.train(was_training)
    return features


class ProjectionHead(nn.Sequential):
    """SSKD's projection head on the pooled feature: Linear(d, d), ReLU, Linear(d, d)."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
