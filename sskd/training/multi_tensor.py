"""Work on many small tensors by one kernel instead of one for each tensor.

On a GPU a kernel of a few thousand numbers takes as long as its start, some microseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sskd.models.fusing import FusedConvolution

# Layers that autocast computes in bf16 (torch.amp, "CUDA Ops that can autocast to float16"). A
# subclass may use its weights in another way.
_CAST_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, FusedConvolution)


class Batching:
    """The small work of a step of ``trained``, a part of ``module``, on many tensors at once.

    Args:
        casts: the step computes in bf16.
    """

    def __init__(self, module: nn.Module, trained: nn.Module, *, casts: bool) -> None:
        self._trained = trained
        self._weights = CastWeights(module, trained) if casts else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Batch this work in the forward and backward pass inside a ``with`` block."""
        cast = self._weights.in_place() if self._weights else nullcontext()
        with cast, batch_norms_counted_together(self._trained):
            yield


class CastWeights:
    """Copies in bf16 of the weights of ``module``'s layers, which are cast all at once.

    Autocast casts each weight by a kernel of its own, and each gradient back by another one. The
    results are the same bits. The weights of ``trained`` get gradients.
    """

    def __init__(self, module: nn.Module, trained: nn.Module) -> None:
        trainable = {id(parameter) for parameter in trained.parameters()}
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        self._layers: dict[nn.Module, dict[str, nn.Parameter]] = {}
        for layer in module.modules():
            if type(layer) in _CAST_LAYERS:
                # Not a weight that something computes before each forward, such as weight_norm.
                own = {k: p for k, p in layer._parameters.items() if p is not None}
                self._layers[layer] = {k: own[k] for k in ("weight", "bias") if k in own}
                for weight in self._layers[layer].values():
                    copy = torch.empty_like(weight, dtype=torch.bfloat16)
                    self._copies.setdefault(weight, nn.Parameter(copy, id(weight) in trainable))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Cast the weights; let the layers compute with the copies inside a ``with`` block.

        A layer does so where autocast is on. The weights then have the gradients of a backward
        pass inside the block.
        """
        if self._copies:
            with torch.no_grad():
                torch._foreach_copy_(list(self._copies.values()), list(self._copies))
        hooks = [layer.register_forward_pre_hook(self._swap_in) for layer in self._layers]
        hooks += [
            layer.register_forward_hook(self._swap_out, always_call=True) for layer in self._layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._return_gradients()

    def _swap_in(self, layer: nn.Module, *_: object) -> None:
        for name, weight in self._layers[layer].items():
            if torch.is_autocast_enabled(weight.device.type):
                layer._parameters[name] = self._copies[weight]

    def _swap_out(self, layer: nn.Module, *_: object) -> None:
        layer._parameters.update(self._layers[layer])

    @torch.no_grad()
    def _return_gradients(self) -> None:
        found = {w: copy.grad for w, copy in self._copies.items() if copy.grad is not None}
        if found:
            gradients = [torch.empty_like(weight) for weight in found]
            torch._foreach_copy_(gradients, list(found.values()))
            for weight, gradient in zip(found, gradients, strict=True):
                # A loss that reads a weight itself has given it a gradient already.
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
                self._copies[weight].grad = None


@contextmanager
def batch_norms_counted_together(module: nn.Module) -> Iterator[None]:
    """Count the batches of all BatchNorms of ``module`` at once, at the end of a ``with`` block."""
    counters = {
        layer: counter
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and (counter := _counter(layer)) is not None
    }
    calls: Counter[_BatchNorm] = Counter()
    try:
        for layer in counters:
            layer._buffers["num_batches_tracked"] = _Calls(layer, calls)  # type: ignore[assignment]
        yield
    finally:
        for layer, counter in counters.items():
            layer._buffers["num_batches_tracked"] = counter
    if calls:
        torch._foreach_add_([counters[layer] for layer in calls], list(calls.values()))


def _counter(layer: _BatchNorm) -> Tensor | None:
    """Return the tensor that counts the batches of ``layer``, unless its forward reads it."""
    return None if layer.momentum is None else layer.num_batches_tracked


class _Calls:
    """Takes the place of ``num_batches_tracked``, and records the calls of its ``add_``."""

    def __init__(self, layer: _BatchNorm, calls: Counter[_BatchNorm]) -> None:
        self._layer, self._calls = layer, calls

    def add_(self, batches: int) -> None:
        self._calls[self._layer] += batches
