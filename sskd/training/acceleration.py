"""What makes a step faster and leaves what it computes as it is, but for rounding."""

from __future__ import annotations

from dataclasses import replace

import torch

from sskd.config import Config
from sskd.data import Batch
from sskd.device import to_device
from sskd.errors import UserError
from sskd.methods import LossOutput, Method, Phase
from sskd.models import fold_batch_norms


def fold_teacher(method: Method, device: torch.device) -> None:
    """Give ``method`` a teacher, if it has one, that computes the same in fewer operations."""
    if method.needs_teacher:
        method.teacher = fold_batch_norms(method.teacher).requires_grad_(False)
        to_device(method.teacher, device)


def compile_loss(phase: Phase, config: Config) -> Phase:
    """Return ``phase`` with its loss compiled by ``torch.compile``, if ``config`` asks for that.

    Networks, method and losses are one graph, for full batches: the epoch's last one, which may
    be smaller, is computed as it is written, for compiling again costs more than a step an epoch.
    ``auto`` compiles where it has been measured to pay, which so far is nowhere: on a CPU it
    does not, and no GPU has been timed (benchmarks/LOG.md). Random draws are those of PyTorch's
    own generators either way.
    """
    if config.compile in ("auto", "off"):
        return phase
    torch.compiler.reset()  # of a cell before this one, which counts against a limit
    options = {**torch._inductor.list_mode_options(config.compile), "fallback_random": True}
    compiled = torch.compile(phase.losses, dynamic=False, options=options)

    def loss(batch: Batch) -> LossOutput:
        if len(batch.y) < config.batch_size:
            return phase.loss(batch)
        try:
            step: LossOutput = compiled(batch)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"compile={config.compile}: phase {phase.name} cannot be compiled here "
                f"({reason}); use compile=off"
            ) from error
        return step

    return replace(phase, loss=loss)
