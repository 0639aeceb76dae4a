"""The precision that a run computes in: float32, TF32 or bfloat16.

TF32 is how NVIDIA's GPUs multiply float32 numbers faster: with 10 bits of their mantissas instead
of 23. PyTorch uses it for cuDNN's convolutions by default, so every computation sets it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.backends import cuda, cudnn

from sskd.errors import UserError

PRECISIONS = ("fp32", "tf32", "bf16")


def resolve_precision(precision: str, device: torch.device, setting: str = "precision") -> str:
    """Return the precision that a run on ``device`` computes in, one of ``PRECISIONS``.

    ``auto`` is ``bf16`` if the device multiplies in it, else ``fp32``.

    Raises:
        UserError: ``precision`` is ``tf32`` and the device does not support it; the message names
            ``setting``.
    """
    if precision == "auto":
        return "bf16" if _HAS_BF16.get(device.type, _lacks)(device) else "fp32"
    if precision == "tf32" and not _HAS_TF32.get(device.type, _lacks)(device):
        raise UserError(
            f"{setting}=tf32: the device '{device}' has no TF32, which needs an NVIDIA GPU of the "
            f"Ampere generation or later; use {setting}=fp32"
        )
    return precision


def _lacks(device: torch.device) -> bool:
    return False


def _cpu_has_bf16(device: torch.device) -> bool:
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # since torch 2.10
    known: Mapping[str, Any] = get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def _gpu_has_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere; AMD's are all above


def _gpu_has_tf32(device: torch.device) -> bool:
    return torch.version.hip is None and _gpu_has_bf16(device)


_HAS_BF16: dict[str, Callable[[torch.device], bool]] = {
    "cpu": _cpu_has_bf16,
    "cuda": _gpu_has_bf16,
}
_HAS_TF32: dict[str, Callable[[torch.device], bool]] = {"cuda": _gpu_has_tf32}


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in ``precision`` inside the ``with`` block, which has no backward pass."""
    with multiplying(precision), autocast(precision, device):
        yield


def exact(device: torch.device) -> AbstractContextManager[None]:
    """Compute in float32 with TF32 off inside the ``with`` block, even inside another one."""
    return computing("fp32", device)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast of ``precision``; a backward pass belongs outside of its block."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def multiplying(precision: str) -> AbstractContextManager[None]:
    """Multiply float32 numbers as ``precision`` says inside the ``with`` block.

    In ``tf32`` convolutions use TF32 and matrix products do not, as PyTorch does by default. In
    ``fp32`` and ``bf16`` neither does. A GPU's convolution reads the setting when it is called, so
    the backward pass belongs in the block too.
    """
    return tf32(convolutions=precision == "tf32", products=False)


@contextmanager
def tf32(*, convolutions: bool, products: bool) -> Iterator[None]:
    """Switch TF32 of convolutions and of matrix products on or off inside the ``with`` block."""
    before = _tf32_is_on()
    _switch_tf32(convolutions, products)
    try:
        yield
    finally:
        _switch_tf32(*before)


# PyTorch 2.9 added ``fp32_precision`` to the flags ``allow_tf32``. Writing an older flag sets both.
# Reading one raises an error if other code has written the newer one.
_CONVOLUTIONS: Any = getattr(cudnn, "conv", None)


def _tf32_is_on() -> tuple[bool, bool]:
    """Return whether convolutions use TF32, and whether matrix products do."""
    if _CONVOLUTIONS is None:
        return cudnn.allow_tf32, cuda.matmul.allow_tf32
    return _CONVOLUTIONS.fp32_precision == "tf32", cuda.matmul.fp32_precision == "tf32"


def _switch_tf32(convolutions: bool, products: bool) -> None:
    cudnn.allow_tf32 = convolutions
    cuda.matmul.allow_tf32 = products
    if _CONVOLUTIONS is not None and not convolutions:
        # The older flag would leave the choice to torch.backends.fp32_precision.
        _CONVOLUTIONS.fp32_precision = "ieee"
