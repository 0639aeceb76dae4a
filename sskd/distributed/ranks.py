"""What the ranks of a run exchange: decisions of the first one, sums, and parts of a batch.

Without other ranks there is nothing to exchange, and every function returns at once. All ranks must
call the same functions in the same order.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from sskd.distributed.share import WHOLE, Share
from sskd.errors import UserError, one_line

T = TypeVar("T")

_POLL = 0.05  # seconds
_DONE = "done"
_numbers = itertools.count()
_store: dist.Store | None = None


def use(store: dist.Store) -> None:
    """Exchange values by ``store``, which all ranks have."""
    global _store
    _store = store


class FirstRankError(UserError):
    """The first rank failed, and has reported why."""


def count() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Return whether this rank is the one that writes."""
    return rank() == 0


def share() -> Share:
    """Return this rank's part of each batch."""
    return Share(rank(), count()) if count() > 1 else WHOLE


def from_first(compute: Callable[[], T]) -> T:
    """Return on every rank what ``compute`` returns on the first one, which alone calls it.

    The others wait for it as long as it takes. The value must be one that pickle can copy.

    Raises:
        FirstRankError: on the other ranks, if ``compute`` raised an exception.
    """
    if count() == 1:
        return compute()
    assert _store is not None
    store, key = _store, str(next(_numbers))
    values: list[T | None] = [None]
    if is_first():
        try:
            values = [compute()]
        except Exception as error:
            store.set(key, one_line(error))
            raise
        store.set(key, _DONE)
    else:
        if (answer := await_key(store, key).decode()) != _DONE:
            raise FirstRankError(answer)
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]  # type: ignore[return-value]


def await_key(store: dist.Store, key: str) -> bytes:
    """Return the value of ``key`` in the ranks' ``store``; wait for it as long as it takes."""
    while not store.check([key]):
        time.sleep(_POLL)  # not ``store.wait``, during which Python handles no signal
    value: bytes = store.get(key)
    return value


def after_first(compute: Callable[[], T]) -> T:
    """Return what ``compute`` returns on this rank; the others call it after the first one.

    Raises:
        FirstRankError: on the other ranks, if ``compute`` raised an exception on the first one.
    """
    kept: list[T] = []
    from_first(lambda: kept.append(compute()))
    return kept[0] if kept else compute()


def largest(*values: int) -> tuple[int, ...]:
    """Return, for each of the integers, the largest one of all ranks."""
    if count() == 1:
        return values
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tuple(tensor.tolist())


@torch.no_grad()
def average_(tensors: Sequence[Tensor]) -> None:
    """Replace float32 ``tensors``, of one device, by their means over all ranks."""
    if count() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= count()
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(
        list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]
    )


@torch.no_grad()
def gather(rows: Tensor) -> Tensor:
    """Return the ``rows`` [N, ...] of all ranks, in the order of the ranks: [ranks * N, ...]."""
    if count() == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(count())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def gather_uneven(rows: Tensor) -> Tensor:
    """Return what ``gather`` does, for ranks whose numbers of rows differ by 1 or 0."""
    if count() == 1:
        return rows
    (most,) = largest(len(rows))
    padded = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])[:most]
    sizes = gather(torch.tensor([len(rows)])).tolist()
    parts = gather(padded).split(most)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _Gathered(torch.autograd.Function):
    """``gather`` with a gradient: the sum over the ranks of their gradients of this rank's rows."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor) -> Tensor:
        return gather(rows)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(count())[rank()]


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Return what ``gather`` does; a loss of the result has a gradient for the rows of each rank.

    If every rank computes the same loss from the result, DistributedDataParallel, which averages
    the ranks' gradients, gets the gradient of that loss.
    """
    gathered: Tensor = _Gathered.apply(rows)
    return gathered


def part_of(total: int) -> Tensor:
    """Return the numbers below ``total`` that belong to this rank; parts differ by 1 at most."""
    return torch.arange(total).tensor_split(count())[rank()]
