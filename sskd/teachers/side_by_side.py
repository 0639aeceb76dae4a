"""One forward pass of a teacher for several jobs of a process that are at the same batch.

Jobs with the same seed, batch size and views draw the same batches, and take turns step by step. So
the job that comes first computes the features, and the others find them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from sskd.methods import Method
from sskd.methods.base import computes_whole, forward_in_chunks
from sskd.models import Features
from sskd.runs.plan import RunPlan
from sskd.turns import shared, shares_process

# Batches whose features are kept for jobs that are a step behind. The maps of a batch of 64 images
# can take hundreds of MB.
_KEPT = 2


def share_forward(method: Method, plan: RunPlan, device: torch.device) -> None:
    """Let ``method`` share its teacher's forward passes with jobs that have the same teacher.

    On a GPU the pass is a graph of its own (``sskd.training.shared_pass``). To compare two batches
    the host would have to wait there, so the settings and the epoch's seed identify a batch.
    """
    config = plan.config
    if not (shares_process() and config.teacher and plan.teacher):
        return
    key = (
        config.teacher.name,
        plan.teacher.digest,
        config.seed,
        config.batch_size,
        config.augmentation,
    )
    if device.type == "cpu":
        method.teacher_forward = shared(("forward", *key), RememberedForward)
    else:
        data = (config.dataset.model_dump_json(), plan.data_digest)
        method.shared_teacher = (*key, config.precision, *data, device)


class RememberedForward:
    """``forward_in_chunks`` of networks with the same weights, which keeps the latest features.

    They are found again for an input with the same values, so the result is that of a new pass, bit
    for bit.
    """

    def __init__(self) -> None:
        self._latest: dict[Hashable, deque[tuple[Tensor, Features]]] = {}

    def __call__(self, network: nn.Module, x: Tensor, fields: Sequence[str]) -> Features:
        """Return the features of ``x`` [N, 3, H, W], which no caller may change."""
        kind = "whole" if computes_whole(x, fields) else tuple(fields)
        key = (x.shape, x.dtype, kind, torch.is_autocast_enabled(x.device.type))
        latest = self._latest.setdefault(key, deque(maxlen=_KEPT))
        for known, features in latest:
            if torch.equal(known, x):
                return features
        latest.append((x, forward_in_chunks(network, x, fields)))
        return latest[-1][1]
