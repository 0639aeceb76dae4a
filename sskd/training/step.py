"""One training step of a phase, and what is on and off during it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sskd.data import Batch
from sskd.methods import Phase


def set_trainable(phase: Phase, method: nn.Module) -> None:
    """Give what ``phase`` trains gradients and train mode; freeze the rest of ``method``."""
    method.requires_grad_(False).eval()
    phase.trains.requires_grad_(True).train()


def train_step(
    phase: Phase, optimizer: torch.optim.Optimizer, batch: Batch, precision: str
) -> dict[str, Tensor]:
    """Train ``phase`` on one batch.

    Args:
        precision: ``fp32``, or ``bf16`` for autocast of the networks.

    Returns:
        Figures on the device, scalars: ``loss``, each term as ``loss/<term>`` and
        ``weighted/<term>``, and the phase's metrics.
    """
    with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        terms, metrics = phase.losses(batch)
    weighted = phase.weigh(terms)
    loss = torch.stack(list(weighted.values())).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    figures = {"loss": loss}
    figures |= {f"loss/{name}": term for name, term in terms.items()}
    figures |= {f"weighted/{name}": term for name, term in weighted.items()}
    return figures | metrics
