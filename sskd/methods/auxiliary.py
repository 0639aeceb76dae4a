"""Auxiliary classifiers behind the stages of a network, which predict class and rotation at once.

Yang, An, Cai, Xu, "Hierarchical Self-supervised Augmented Knowledge Distillation", IJCAI 2021,
section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Views
from sskd.errors import UserError
from sskd.methods.base import top1
from sskd.methods.networks import Networks, probe_features

ROTATIONS = 4
VIEWS = Views(ROTATIONS, one_crop=True)


class AuxiliaryClassifiers(nn.Module):
    """Behind each stage of ``network``: layers like the later stages, pooling, a linear layer.

    Raises:
        UserError: the network has no ``branch`` to build the layers.
    """

    def __init__(self, network: nn.Module, networks: Networks) -> None:
        super().__init__()
        branch: Any = getattr(network, "branch", None)
        if branch is None:
            raise UserError(
                f"builds classifiers with branch(stage) of a network, and {type(network).__name__} "
                "has none; choose networks that have one"
            )
        features = probe_features(network, networks.data)
        width, classes = features.pooled.shape[1], features.logits.shape[1]
        stages = range(1, len(features.stages) + 1)
        self.branches = nn.ModuleList(branch(stage) for stage in stages)
        self.linears = nn.ModuleList(nn.Linear(width, ROTATIONS * classes) for _ in stages)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load the ``state`` of classifiers that were trained with the network.

        Raises:
            UserError: it is not the state of such classifiers.
        """
        try:
            self.load_state_dict(state)
        except RuntimeError:
            raise UserError(
                "the teacher's heads are not the auxiliary classifiers of this network; train the "
                "teacher again with force=true"
            ) from None

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Return the joint logits [N, 4 * classes] behind each of the maps ``stages``."""
        pooled = [
            branch(stage).mean(dim=(2, 3))
            for branch, stage in zip(self.branches, stages, strict=True)
        ]
        return [linear(each) for linear, each in zip(self.linears, pooled, strict=True)]


def joint_labels(labels: Tensor) -> Tensor:
    """Return ``4 * label + rotation`` of each view: int64 [4 * B] for labels [B]."""
    rotation = torch.arange(ROTATIONS, device=labels.device)
    return (ROTATIONS * labels[:, None] + rotation).flatten()


def joint_loss(joint_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the cross-entropies of the classifiers with the joint labels, summed: a scalar.

    Args:
        joint_logits: of each classifier, [4 * B, 4 * classes].
        labels: [B].
    """
    target = joint_labels(labels)
    return torch.stack([F.cross_entropy(each.float(), target) for each in joint_logits]).sum()


def joint_top1(joint_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the accuracy of the last classifier on the joint labels, in percent, a scalar.

    The arguments are those of ``joint_loss``.
    """
    return top1(joint_logits[-1], joint_labels(labels))
