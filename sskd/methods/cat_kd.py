"""CAT-KD: Guo, Yan, Li, Liu, "Class Attention Transfer Based Knowledge Distillation", CVPR 2023."""

from __future__ import annotations

from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sskd.errors import UserError
from sskd.methods.base import in_float32, unit_vectors
from sskd.methods.kd import Distillation, Outputs
from sskd.methods.networks import Networks, classifier_of

Resolution = Annotated[int, Field(gt=0, le=256)]  # pixels a side of the pooled maps


def class_activation_maps(classifier: nn.Linear, last_map: Tensor) -> Tensor:
    """Return the map of each class, [B, classes, h, w], of ``last_map`` [B, d, h, w].

    The classifier is applied at each position, without its bias. The mean of a map is then the
    logit of its class without the bias.
    """
    return F.conv2d(last_map, classifier.weight[:, :, None, None])


@in_float32
def cat_loss(student: Tensor, teacher: Tensor, resolution: int, *, normalise: bool) -> Tensor:
    """Return the mean squared difference of the maps, pooled to ``resolution`` a side: a scalar.

    Args:
        student: [B, classes, h, w].
        teacher: [B, classes, h', w'].
        normalise: scale each pooled map to length 1 first.
    """
    pooled = [F.adaptive_avg_pool2d(maps, resolution).flatten(2) for maps in (student, teacher)]
    one, other = map(unit_vectors, pooled) if normalise else pooled
    return F.mse_loss(one, other)


class CATKD(Distillation):
    """Match the class activation maps of both networks.

    Raises:
        UserError: a network has no linear classifier, or ``resolution`` is larger than both maps.
    """

    terms = ("ce", "cat")
    teacher_outputs = ("last_map",)

    def __init__(
        self, networks: Networks, *, resolution: Resolution, normalise: bool, **shared: Any
    ) -> None:
        super().__init__(networks, **shared)
        largest = max(max(features.last_map.shape[2:]) for features in networks.probe())
        if resolution > largest:
            raise UserError(
                f"method.resolution={resolution}: the larger of the networks' last maps has "
                f"{largest} pixels a side; use at most {largest}"
            )
        self.resolution, self.normalise = resolution, normalise
        # A tuple does not register them as submodules, so checkpoints store them only once.
        self._classifiers = tuple(
            classifier_of(network, networks.data) for network in (self.student, self.teacher)
        )

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return ``cat`` (L_CAT of the paper)."""
        student, teacher = (
            class_activation_maps(classifier, features.last_map)
            for classifier, features in zip(self._classifiers, outputs[:2], strict=True)
        )
        loss = cat_loss(student, teacher, self.resolution, normalise=self.normalise)
        return {"cat": loss}
