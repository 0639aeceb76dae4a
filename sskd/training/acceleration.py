"""Faster steps with the same result, apart from rounding."""

from __future__ import annotations

from dataclasses import replace

import torch

from sskd.config import Config
from sskd.data import Batch
from sskd.distributed import ranks
from sskd.errors import UserError, one_line
from sskd.methods import LossOutput, Method, Phase
from sskd.models import fold_batch_norms, fuse_layers
from sskd.turns import shares_process


def fold_teacher(method: Method) -> None:
    """Replace the teacher of ``method``, if it has one, by an equal one with fewer operations.

    On the CPU, the folded weights are the same for every device.
    """
    if method.needs_teacher:
        method.teacher = fold_batch_norms(method.teacher).requires_grad_(False)


def fuse_teacher(method: Method, config: Config, device: torch.device) -> None:
    """Let the folded teacher of ``method``, which is on ``device``, use fused kernels of a GPU."""
    if method.needs_teacher and device.type == "cuda":
        images = ranks.share().size(config.batch_size) * method.views.count
        fused = fuse_layers(method.teacher, config.precision, images)
        method.teacher = fused.requires_grad_(False)


def compile_loss(phase: Phase, config: Config) -> Phase:
    """Return ``phase`` with its loss compiled by ``torch.compile``, if ``config`` asks for that.

    Networks, method and losses become one graph for full batches. The last batch of an epoch may be
    smaller and is not compiled, because a second compilation costs more than one step per epoch.
    ``auto`` currently never compiles: it is not faster on a CPU, and no GPU has been timed
    (benchmarks/LOG.md). Random numbers come from PyTorch's own generators in both cases.
    """
    if config.compile in ("auto", "off"):
        return phase
    if shares_process():  # what torch.compile keeps is global, and is reset below
        raise UserError(
            f"compile={config.compile}: is not possible for jobs in threads; use compile=off, or "
            "hydra/launcher=processes"
        )
    torch.compiler.reset()  # graphs of an earlier job count against a limit
    options = {**torch._inductor.list_mode_options(config.compile), "fallback_random": True}
    compiled = torch.compile(phase.losses, dynamic=False, options=options)

    def loss(batch: Batch) -> LossOutput:
        if len(batch.y) < ranks.share().size(config.batch_size):
            return phase.loss(batch)
        try:
            step: LossOutput = compiled(batch)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = one_line(error)[:200]
            raise UserError(
                f"compile={config.compile}: phase {phase.name} cannot be compiled here "
                f"({reason}); use compile=off"
            ) from error
        return step

    return replace(phase, loss=loss)
