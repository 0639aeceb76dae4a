"""The masks of low-confidence images and classes in the authors' code of MLLD and of SKD.

That code multiplies the mean of a loss by a mask, instead of the loss of each image or class. So
only the share of the images or classes that the mask keeps has an effect.
"""

from __future__ import annotations

from torch import Tensor


def share_up_to_median(values: Tensor) -> Tensor:
    """Return the share of ``values`` [N] that are at most their median, a scalar: 1/2 or more.

    The median of an even number of values is the mean of the two in the middle.
    """
    ordered = values.sort().values
    median = (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
    return (values <= median).float().mean()


def low_confidence_shares(teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares of the images and of the classes that the authors' masks keep.

    They are the images with a confidence up to the median, and the classes with a sum of
    probabilities up to the median. ``teacher`` is logits [B, C].
    """
    probabilities = teacher.float().softmax(1)
    return share_up_to_median(probabilities.amax(1)), share_up_to_median(probabilities.sum(0))
