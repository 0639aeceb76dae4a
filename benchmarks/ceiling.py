"""Which share of the hardware's ceiling a training step reaches.

`measure_hardware` takes the ceilings from the device itself: the rate at which it multiplies
matrices and the bandwidth of its memory. `count_work` counts what a step asks of them, op by op.
Beside the step's time they give two shares:

- `flop_share`, the time that the step's matrix products and convolutions take at the measured rate,
  over its actual time. All else that a step does counts as lost.
- `roofline_share`, the time in which the eager ops can be done one after the other, each at the
  rate or at the bandwidth, whichever holds it up, over the actual time. What is missing to one
  goes to ops below their own ceiling, launches, Python and waiting.

Their limits:

- A tensor that an op leaves in a cache need not come from memory for the next: with small batches
  `roofline_share` can exceed what memory allows, and one.
- A compiled step fuses ops and leaves out the traffic between them, so it can go beyond one of
  `roofline_share`, too. Count its eager form: a compiled one cannot be looked into.
- FLOPs are those of the direct algorithm. A convolution by Winograd's needs fewer, in the step as
  in the measurement.
- All products of a dtype have one ceiling, although a depthwise convolution cannot come near it.
  Ops other than products and convolutions have no FLOPs here, memory alone holds them up.
- Traffic is the least possible: every input once, every output once, no workspace. Batch
  normalisation in training really reads its input twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from benchmarks.methods import seconds

SPAN = 0.3  # seconds spent on each size
LEAST = 3  # calls of each size at least
IMAGES, SIDE = 64, 8  # of the convolutions measured, a late stage's
SIZES = {"cpu": (512, 1024, 2048)}
LARGE_SIZES = (2048, 4096, 8192)
COPIED = {"cpu": 2**28}
LARGE_COPY = 2**30

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
}  # fmt: skip
OVERWRITING = {
    aten.copy_, aten.fill_, aten.zero_, aten.uniform_, aten.normal_, aten.random_,
    aten._foreach_copy_, aten._foreach_zero_,
}  # fmt: skip
INDEXING = {
    aten.index, aten.index_select, aten.gather, aten.index_put_, aten.index_copy_,
    aten.index_add_, aten.scatter_, aten.scatter_add_,
}  # fmt: skip


@dataclass(frozen=True)
class Hardware:
    """What a device reaches at best.

    ``fp32`` and ``bf16`` are FLOP/s of matrix products and convolutions of tensors of that dtype
    (``bf16`` is None where it was not measured), ``bandwidth`` bytes/s, read and written together.
    """

    fp32: float
    bf16: float | None
    bandwidth: float

    def rate(self, dtype: torch.dtype) -> float:
        """Return the FLOP/s of products of ``dtype``.

        Raises:
            ValueError: that rate was not measured.
        """
        rate = {torch.float32: self.fp32, torch.bfloat16: self.bf16}.get(dtype)
        if rate is None:
            raise ValueError(f"no rate of products of {dtype} was measured")
        return rate


@dataclass(frozen=True)
class Work:
    """What a step asks of the hardware.

    ``flops`` are those of its products and convolutions, ``bytes`` those read and written.
    ``flop_seconds`` is the least time for the FLOPs alone; ``attainable_seconds`` that for the
    ops one after the other, each limited by its FLOPs or by its bytes.
    """

    flops: int
    bytes: int
    flop_seconds: float
    attainable_seconds: float


def flop_share(work: Work, seconds: float) -> float:
    """Return the attained FLOP/s over the measured rate, for a step of ``seconds``.

    A step of two dtypes is held to the rate of each for that dtype's FLOPs.
    """
    return work.flop_seconds / seconds


def roofline_share(work: Work, seconds: float) -> float:
    """Return the attainable seconds over the actual ``seconds`` of a step."""
    return work.attainable_seconds / seconds


def measure_hardware(
    device: torch.device,
    precision: str,
    sizes: Sequence[int] | None = None,
    copied: int | None = None,
) -> Hardware:
    """Measure what ``device`` reaches with its present number of threads.

    It takes some 3 s on a CPU, 5 s with bfloat16, and nothing else may run there meanwhile. On a
    GPU the present settings of TF32 hold.

    Args:
        precision: ``fp32``, or ``bf16`` to measure bfloat16 too.
        sizes: rows of the square matrices to multiply, of which the best counts. Multiples
            of 8; as a rule from 512 on a CPU and 2048 on a GPU.
        copied: bytes to copy; as a rule far more than any cache holds.
    """
    sizes = sizes or SIZES.get(device.type, LARGE_SIZES)
    copied = copied or COPIED.get(device.type, LARGE_COPY)
    fp32 = _product_rate(device, torch.float32, sizes)
    bf16 = _product_rate(device, torch.bfloat16, sizes) if precision == "bf16" else None
    return Hardware(fp32, bf16, _bandwidth(device, copied))


def count_work(step: Callable[[], object], hardware: Hardware) -> Work:
    """Run ``step`` once, eager, and return what it asks of ``hardware``.

    Its first call may do more than the rest: make that before.

    Raises:
        ValueError: it multiplies tensors of a dtype whose rate ``hardware`` lacks.
    """
    with _Counter(hardware) as counter:
        step()
    return Work(
        flops=sum(op.flops for op in counter.ops),
        bytes=sum(op.bytes for op in counter.ops),
        flop_seconds=math.fsum(op.flop_seconds for op in counter.ops),
        attainable_seconds=math.fsum(op.attainable_seconds for op in counter.ops),
    )


def _product_rate(device: torch.device, dtype: torch.dtype, sizes: Sequence[int]) -> float:
    """Return the best FLOP/s over matrix products and convolutions of ``sizes``.

    Both, for neither is a ceiling of the other: they may come from two libraries, of which one
    does not use all of the processor, and have a setting of TF32 each.
    """
    kinds = (_matrix_product, _convolution)
    return max(_rate(device, *kind(device, dtype, size)) for kind in kinds for size in sizes)


def _matrix_product(
    device: torch.device, dtype: torch.dtype, size: int
) -> tuple[int, Callable[[], object]]:
    """Return the FLOPs of a product of matrices [size, size], and a function that takes it."""
    left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    # Into a tensor that is there: a CPU's new pages would take time.
    return 2 * size**3, lambda: torch.mm(left, right, out=out)


def _convolution(
    device: torch.device, dtype: torch.dtype, size: int
) -> tuple[int, Callable[[], object]]:
    """Return the FLOPs of a 3x3 convolution of size/8 channels, and a function that takes it."""
    channels = size // 8
    images = torch.randn(IMAGES, channels, SIDE, SIDE, device=device)
    weight = torch.randn(channels, channels, 3, 3, device=device)
    # Channels last: the layout that needs no reordering, neither in oneDNN nor on tensor cores.
    x, w = (each.to(dtype, memory_format=torch.channels_last) for each in (images, weight))
    flops = conv_flop_count(list(x.shape), list(w.shape), list(x.shape))
    return flops, lambda: F.conv2d(x, w, padding=1)


def _bandwidth(device: torch.device, copied: int) -> float:
    """Return the bytes/s of copying ``copied`` bytes, each read once and written once."""
    source, target = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in range(2))
    return _rate(device, 2 * copied, lambda: target.copy_(source))


def _rate(device: torch.device, amount: int, call: Callable[[], object]) -> float:
    """Return ``amount`` over the least time of several calls: chance only ever adds to it."""
    seconds(call, device)
    times: list[float] = []
    end = time.perf_counter() + SPAN
    while len(times) < LEAST or time.perf_counter() < end:
        times.append(seconds(call, device))
    return amount / min(times)


class _Counter(TorchDispatchMode):
    """Keeps the work of every ATen op that runs under it, in ``ops``.

    Those of the backward pass too. On a GPU, autograd runs them in a thread of its own, but a
    backward pass takes the modes of the thread that started it along (ATen's ThreadLocalState).
    """

    def __init__(self, hardware: Hardware) -> None:
        super().__init__()
        self.hardware = hardware
        self.ops: list[Work] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # inference mode hands over composite ops whole, without their parts
            out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
            self._keep(func, args, kwargs, out)
        return out

    def _keep(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        flops, traffic = _flops(func, args, kwargs, out), _traffic(func, args, kwargs, out)
        rate = self.hardware.rate(next(_tensors(args)).dtype) if flops else math.inf
        bound = flops / rate
        self.ops.append(Work(flops, traffic, bound, max(bound, traffic / self.hardware.bandwidth)))


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the FLOPs of an op, zero where it is neither a product nor a convolution."""
    packet = func.overloadpacket
    if packet is aten.convolution_backward:
        # Torch's formula takes the weight's gradient of a grouped convolution for an ungrouped
        # one's. Each gradient pairs the same elements as the forward pass.
        gradient, x, weight, transposed, mask = (args[place] for place in (0, 1, 2, 7, 10))
        shapes = list(x.shape), list(weight.shape), list(gradient.shape)
        return sum(mask[:2]) * conv_flop_count(*shapes, transposed)
    formula = flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=out) if formula else 0


def _traffic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the bytes that an op reads and writes, each once; a view's are none."""
    packet = func.overloadpacket
    if packet in ALLOCATIONS or torch.Tag.inplace_view in func.tags:
        return 0
    declared = func._schema.arguments
    given = dict(zip((each.name for each in declared), args, strict=False)) | kwargs
    changed = {each.name for each in declared if each.alias_info and each.alias_info.is_write}
    written = _distinct([value for name, value in given.items() if name in changed])
    storages = {each.untyped_storage().data_ptr() for each in _tensors(list(given.values()))}
    # What shares an input's storage is a view, or the tensor that an in-place op returns.
    made = [each for each in _tensors([out]) if each.untyped_storage().data_ptr() not in storages]
    if not made and not written:
        return 0
    if _only_shapes(packet):
        return sum(_distinct(made).values())
    unread = changed if packet in OVERWRITING else set()
    read = _distinct([value for name, value in given.items() if name not in unread])
    if packet in INDEXING:
        return _indexed(args[0], read, made, written)
    return sum(sum(each.values()) for each in (read, written, _distinct(made)))


def _only_shapes(packet: Any) -> bool:
    """Return whether an op takes no more than the shape of its input: ones_like, new_zeros."""
    name = packet.__name__
    return name.endswith("_like") or name.startswith("new_")


Places = dict[tuple[int, int], int]  # bytes by where they start and how many they are


def _indexed(table: Tensor, read: Places, made: list[Tensor], written: Places) -> int:
    """Return the traffic of an op that goes to some rows of ``table`` alone.

    As many bytes of it as come out, or, where it is changed in place, as go in.
    """
    results = sum(_distinct(made).values())
    whole = _extent(table)
    others = sum(read.values()) - whole
    touched = min(whole, results or others)
    return others + touched + (touched if written else results)


def _distinct(values: Sequence[Any]) -> Places:
    """Return the tensors among ``values`` by place: one given twice is read once."""
    sized = ((each.data_ptr(), _extent(each)) for each in _tensors(values))
    return {(start, size): size for start, size in sized}


def _extent(tensor: Tensor) -> int:
    """Return the bytes of a tensor that are really there.

    Expanded dimensions repeat their elements, and windows as ``unfold`` makes them overlap.
    """
    if not tensor.numel():
        return 0
    sides = [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s]
    elements = math.prod(length for length, _ in sides)
    span = 1 + sum((length - 1) * stride for length, stride in sides)
    return min(elements, span) * tensor.element_size()


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the tensors among an op's arguments, those in its lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
