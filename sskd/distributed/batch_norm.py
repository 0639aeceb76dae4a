"""BatchNorm over the parts of a batch that several ranks have, on a CPU.

Ioffe & Szegedy, "Batch Normalization", ICML 2015, with the mean and the variance of the whole
batch. ``torch.nn.SyncBatchNorm`` needs a GPU.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from sskd.distributed import ranks


class _Summed(torch.autograd.Function):
    """The sum of a tensor over the ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm(_BatchNorm):
    """A BatchNorm of [N, C, ...] whose statistics in training are those of all ranks' rows.

    It has weights, biases, running statistics and a momentum.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least two dimensions, not {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` [N, C, ...]; every rank has the same N."""
        if not self.training:
            return super().forward(input)
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        x = input.float()
        others = [dim for dim in range(x.dim()) if dim != 1]
        rows = x.numel() // x.shape[1] * ranks.count()
        mean = _Summed.apply(x.sum(others)) / rows
        shape = (1, -1, *(1,) * (x.dim() - 2))
        centred = x - mean.view(shape)
        variance = _Summed.apply(centred.square().sum(others)) / rows
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (rows / max(rows - 1, 1)), self.momentum)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(input.dtype)
