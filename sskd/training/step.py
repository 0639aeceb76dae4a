"""One training step of a stage, and what is on and off during it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sskd.data import Batch
from sskd.methods import Stage


def enter(stage: Stage, method: nn.Module) -> None:
    """Give what ``stage`` trains gradients and train mode; freeze the rest of ``method``."""
    method.requires_grad_(False).eval()
    stage.trains.requires_grad_(True).train()


def take_step(
    stage: Stage, optimizer: torch.optim.Optimizer, batch: Batch, precision: str
) -> dict[str, Tensor]:
    """Train ``stage`` on one batch.

    Args:
        precision: ``fp32``, or ``bf16`` for autocast of the networks.

    Returns:
        Figures on the device, scalars: ``loss``, each term as ``loss/<term>`` and
        ``weighted/<term>``, and the stage's metrics.
    """
    with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        terms, metrics = stage.losses(batch)
    weighted = stage.weigh(terms)
    loss = torch.stack(list(weighted.values())).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    figures = {"loss": loss}
    figures |= {f"loss/{name}": term for name, term in terms.items()}
    figures |= {f"weighted/{name}": term for name, term in weighted.items()}
    return figures | metrics
