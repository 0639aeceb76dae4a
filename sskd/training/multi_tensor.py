"""Work on many small tensors by one kernel instead of one for each tensor.

On a GPU a kernel of a few thousand numbers takes as long as its start, some microseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# The layers whose weights autocast casts to bf16 (torch.amp, "CUDA Ops that can autocast").
_CAST_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class CastWeights:
    """Copies in bf16 of the weights of ``module``'s layers, which are cast all at once.

    Autocast casts each weight by a kernel of its own, and each gradient back by another one. The
    results are the same bits. The weights of ``trained`` get gradients.
    """

    def __init__(self, module: nn.Module, trained: nn.Module) -> None:
        trainable = {id(parameter) for parameter in trained.parameters()}
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        for layer in module.modules():
            if isinstance(layer, _CAST_LAYERS):
                for name, weight in layer.named_parameters(recurse=False):
                    copy = torch.empty_like(weight, dtype=torch.bfloat16)
                    self._copies.setdefault(weight, nn.Parameter(copy, id(weight) in trainable))
                    self._places.append((layer, name, weight))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Cast the weights; let the layers compute with the copies inside a ``with`` block.

        The weights then have the gradients of a backward pass inside the block.
        """
        with torch.no_grad():
            torch._foreach_copy_(list(self._copies.values()), list(self._copies))
        try:
            for layer, name, weight in self._places:
                layer._parameters[name] = self._copies[weight]
            yield
        finally:
            for layer, name, weight in self._places:
                layer._parameters[name] = weight
        self._return_gradients()

    @torch.no_grad()
    def _return_gradients(self) -> None:
        found = {w: copy.grad for w, copy in self._copies.items() if copy.grad is not None}
        if found:
            gradients = [torch.empty_like(weight) for weight in found]
            torch._foreach_copy_(gradients, list(found.values()))
            for weight, gradient in zip(found, gradients, strict=True):
                weight.grad, self._copies[weight].grad = gradient, None


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
    """Return the tensor that counts the batches of ``layer``, if nothing else reads it."""
    return None if layer.momentum is None else layer.num_batches_tracked


class _Calls:
    """Takes the place of ``num_batches_tracked``, and records the calls of its ``add_``."""

    def __init__(self, layer: _BatchNorm, calls: Counter[_BatchNorm]) -> None:
        self._layer, self._calls = layer, calls

    def add_(self, batches: int) -> None:
        self._calls[self._layer] += batches
