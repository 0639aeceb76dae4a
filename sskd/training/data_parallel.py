"""The same step on every rank: averaged gradients, and BatchNorms with the same statistics."""

from __future__ import annotations

import warnings
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from sskd.config import Config
from sskd.data import Batch
from sskd.distributed import ranks
from sskd.distributed.batch_norm import SyncBatchNorm
from sskd.distributed.environment import world_size
from sskd.errors import UserError
from sskd.methods import LossOutput, Method, Phase


class _Losses(nn.Module):
    """The losses of a phase as a module, whose parameters are those that the phase trains.

    The teacher is not a part of it: its parameters have no gradients to average.
    """

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.trains = phase.trains
        self._phase = phase

    def forward(self, batch: Batch) -> LossOutput:
        return self._phase.losses(batch)


def parallel(phase: Phase) -> Phase:
    """Return ``phase`` with gradients that are averaged over the ranks.

    The parts of a batch have the same size, so the average is the gradient of the whole batch's
    mean. Buffers are not broadcast: ``running_statistics`` are averaged after each step.
    """
    if ranks.count() == 1:
        return phase
    # The strides of a 1x1 kernel that is channels last are ambiguous.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    phase.trains.requires_grad_(True)  # DistributedDataParallel averages no others
    with warnings.catch_warnings():
        # The newest PyTorch renames ``broadcast_buffers``; the older ones lack the new name.
        warnings.simplefilter("ignore", FutureWarning)
        losses = DistributedDataParallel(
            _Losses(phase),
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            # Parameters of a term with a weight of 0 get no gradient.
            find_unused_parameters=not all(phase.weights.values()),
        )
    return replace(phase, loss=losses)


def check_division(config: Config) -> None:
    """Raise UserError if several ranks cannot divide the work of ``config`` among them."""
    count, batch = ranks.count(), config.batch_size
    if count < world_size():
        raise UserError(
            f"torchrun has started {world_size()} processes, which this program does not connect; "
            "start it with python, or train_student.py with torchrun"
        )
    if batch % count:
        nearest = [size for size in (batch // count * count, -(-batch // count) * count) if size]
        raise UserError(
            f"batch_size={batch}: {count} processes cannot divide it evenly; use batch_size="
            f"{' or '.join(map(str, nearest))}"
        )
    if count > 1 and config.teacher and config.teacher.precompute:
        raise UserError(
            "teacher.precompute=true: needs a single process; use teacher.precompute=false, or "
            "start without torchrun"
        )


def divide(method: Method, config: Config) -> None:
    """Let ``method`` compute BatchNorm statistics and terms over all ranks if ``config`` says so.

    Raises:
        UserError: a BatchNorm cannot be synchronised.
    """
    if ranks.count() == 1:
        return
    if config.sync_batch_norm:
        for name, part in method.named_children():
            if name != "teacher":
                synchronise_batch_norms(part)
    if config.gather_batch:
        method.gather = ranks.gather_with_gradient


def synchronise_batch_norms(module: nn.Module) -> None:
    """Let the BatchNorms of ``module`` normalise by the statistics of the whole batch.

    They change their class and stay the same objects, which a phase may list on their own.
    """
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            if not layer.affine or layer.running_mean is None or layer.momentum is None:
                raise UserError(
                    f"sync_batch_norm=true: {layer} needs weights, running statistics and a "
                    "momentum; use sync_batch_norm=false"
                )
            if layer.weight.is_cuda:  # PyTorch's own layer needs a GPU
                layer.__class__ = nn.SyncBatchNorm  # type: ignore[assignment]
                layer.process_group = None  # type: ignore[assignment]
            else:
                layer.__class__ = SyncBatchNorm  # type: ignore[assignment]


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Return the running means and variances of the BatchNorms in ``module`` that train."""
    found: list[Tensor] = []
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None:
            assert layer.running_var is not None
            found += [layer.running_mean, layer.running_var]
    return found


def average_step(module: nn.Module, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average the running statistics of ``module``, in place, and ``metrics`` over the ranks.

    An average of moving averages is the moving average of the averages, so the statistics are those
    of the parts of all ranks.
    """
    if ranks.count() == 1:
        return metrics
    averaged = {name: value.detach().float().clone() for name, value in metrics.items()}
    ranks.average_([*averaged.values(), *running_statistics(module)])
    return averaged
