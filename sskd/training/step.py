"""One training step of a phase, and the modes of the modules during it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sskd.data import Batch
from sskd.methods import Phase
from sskd.precision import autocast, multiplying


def set_trainable(phase: Phase, method: nn.Module) -> None:
    """Set ``phase.trains`` to train with gradients; freeze the rest of ``method`` in eval mode."""
    method.requires_grad_(False).eval()
    phase.trains.requires_grad_(True).train()


def train_step(
    phase: Phase, optimizer: torch.optim.Optimizer, batch: Batch, precision: str
) -> dict[str, Tensor]:
    """Train ``phase`` on one batch.

    Args:
        precision: one of ``sskd.precision.PRECISIONS``; losses are computed in float32.

    Returns:
        Metrics on the device, scalars: ``loss``, each term as ``loss/<term>`` and
        ``weighted/<term>``, and the phase's metrics.
    """
    with multiplying(precision):
        with autocast(precision, batch.x.device):
            terms, metrics = phase.losses(batch)
        weighted = phase.weigh(terms)
        loss = torch.stack(list(weighted.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    measured = {"loss": loss}
    measured |= {f"loss/{name}": term for name, term in terms.items()}
    measured |= {f"weighted/{name}": term for name, term in weighted.items()}
    return measured | metrics
