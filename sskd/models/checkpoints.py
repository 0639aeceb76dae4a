"""Weights in files: the published layouts read, checked, digested and written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sskd.errors import UserError
from sskd.models.recognition import recognise, tensor_shapes
from sskd.models.safe_load import load_torch_file, unreadable
from sskd.paths import expanded
from sskd.storage import StillOurs, write_whole

SUFFIXES = (".pth", ".pt", ".safetensors")
# Where a torch file may hold the state dict: the CRD benchmark's files, and SSKD's.
STATE_KEYS = ("model", "state_dict")
ACCURACY_KEYS = ("accuracy", "acc", "best_acc")
ABOUT = "about"
# What networks are made of. A file may hold other tensors (sparse, quantised, complex, in 4 bits),
# which most operations do not take.
NUMBERS = frozenset(
    {
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    }
)
# SSKD's MobileNetV2 has its classifier bare, the CRD benchmark's inside a Sequential.
BARE_CLASSIFIER = {
    "classifier.weight": "classifier.0.weight",
    "classifier.bias": "classifier.0.bias",
}


@dataclass(frozen=True)
class Checkpoint:
    """A network's own tensors, on the CPU, and what their file says about them.

    ``accuracy`` stands as the file has it (percent in the published ones); it and ``epoch``
    are None where the file is silent.
    """

    state: dict[str, Tensor]
    accuracy: float | None
    epoch: int | None
    path: Path


def find_checkpoint(path: str | Path, epoch: str = "best") -> Path:
    """Return ``path`` if it is a file, else the one checkpoint of ``epoch`` in that folder.

    Looked for is a file with ``epoch`` (``best`` or ``last``) in its name, in the folder itself
    or else in its ``ckpt`` folder. Raises ``UserError`` where there is none, or more than one.
    """
    path = expanded(path)
    if not path.is_dir():
        _require_file(path)
        return path
    for folder in (path, path / "ckpt"):
        files = sorted(file for file in folder.glob("*") if file.suffix in SUFFIXES)
        found = [file for file in files if epoch in file.name]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise UserError(
                f"{folder} holds more than one {epoch} checkpoint: {names}; name one file"
            )
    present = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
    raise UserError(
        f"no {epoch} checkpoint ({', '.join(SUFFIXES)}) in {path} or its ckpt folder; "
        f"it holds {present}; name the file"
    )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read weights from a safetensors or torch file, whichever of the known layouts it has.

    Raises ``UserError`` where the file is missing, damaged, without weights, or asks for code.
    """
    path = expanded(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a checkpoint; name the file in it")
    _require_file(path)
    raw, facts = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not _is_state_dict(raw):
        found = ", ".join(str(key) for key in list(raw)[:5]) or "nothing"
        raise UserError(
            f"{path} holds no state dict, neither by itself nor under "
            f"'model' or 'state_dict' (found: {found})"
        )
    _refuse_odd_tensors(raw, path)
    state = _own_tensors(raw)
    accuracy = next((facts[key] for key in ACCURACY_KEYS if key in facts), None)
    epoch = facts.get("epoch")
    try:
        return Checkpoint(
            state=state,
            accuracy=None if accuracy is None else _finite(accuracy),
            epoch=None if epoch is None else int(epoch),
            path=path,
        )
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{path} states an accuracy or epoch that is no number: {error}") from error


def load_weights(model: nn.Module, path: str | Path) -> Checkpoint:
    """Load a file's weights into ``model``: every tensor, no more and no less.

    Raises ``UserError`` where the file cannot be read, holds another network or other
    classes, or holds weights that are not finite; the model then stays as it was.
    """
    checkpoint = read_checkpoint(path)
    own_state = model.state_dict()
    if tensor_shapes(checkpoint.state) != tensor_shapes(own_state):
        raise UserError(_explain_mismatch(checkpoint, own_state))
    for name, tensor in checkpoint.state.items():
        if own_state[name].is_floating_point() and not tensor.is_floating_point():
            raise UserError(
                f"{checkpoint.path} holds whole numbers ({tensor.dtype}) in '{name}', where "
                "weights should be; fetch or train it again"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{checkpoint.path} holds values that are not finite, in '{name}'")
    model.load_state_dict(checkpoint.state)
    return checkpoint


def save_weights(
    path: Path,
    model: nn.Module,
    about: Mapping[str, Any],
    *,
    still_ours: StillOurs | None = None,
) -> None:
    """Write the model's tensors to a safetensors file, whole or not at all.

    ``about`` stands in the file's metadata as JSON, under one key: of several keys the format
    does not fix the order, and equal weights are to be equal files.
    """
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = save(state, metadata={ABOUT: json.dumps(about)})
    write_whole(path, lambda stream: stream.write(content), still_ours=still_ours)


def weights_digest(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of all tensors: their names, types, shapes and values.

    It depends neither on the order of the tensors nor on their device or memory format.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"no checkpoint at {path} (looked for {path.absolute()})")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = file.metadata() or {}
        about = json.loads(facts[ABOUT]) if ABOUT in facts else facts
        return state, about if isinstance(about, dict) else {}
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: permission denied") from error
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise unreadable(path) from error


def _read_torch(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state dict and the dict that it stood in (empty where it stood alone)."""
    content = load_torch_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    for key in STATE_KEYS:
        if isinstance(content.get(key), dict):
            return content[key], content
    return content, {}


def _is_state_dict(raw: dict[Any, Any]) -> bool:
    return bool(raw) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in raw.items()
    )


def _refuse_odd_tensors(raw: dict[str, Tensor], path: Path) -> None:
    for name, tensor in raw.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.dtype not in NUMBERS:
            raise UserError(
                f"{path} holds '{name}' as no plain numbers ({tensor.dtype}, {tensor.layout}, on "
                f"'{tensor.device.type}'); save it as an ordinary tensor"
            )
        # Views may show a few values as terabytes, which a copy of them would take.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(
                f"{path} holds fewer values for '{name}' than its shape {tuple(tensor.shape)} "
                "says; save it as an ordinary tensor"
            )


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"it says {number}")
    return number


def _own_tensors(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop what wrappers added to the network's own names: DataParallel, SSKD's student."""
    # Half-precision files load into float32 networks; their digest is that of the network.
    state = {
        name: tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
        for name, tensor in raw.items()
    }
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if any(name.startswith("backbone.") for name in state):
        state = {
            name.removeprefix("backbone."): tensor
            for name, tensor in state.items()
            if not name.startswith("proj_head.")
        }
    if "classifier.weight" in state:
        renamed = {BARE_CLASSIFIER.get(name, name): tensor for name, tensor in state.items()}
        return renamed if recognise(renamed) else state
    return state


def _explain_mismatch(checkpoint: Checkpoint, own_state: dict[str, Tensor]) -> str:
    found, wanted = recognise(checkpoint.state), recognise(own_state)
    if found is None or wanted is None:
        return f"{checkpoint.path} does not fit: {_differences(checkpoint.state, own_state)}"
    if found[0] != wanted[0]:
        advice = f"name the architecture {found[0]}, for a teacher with arch@teacher={found[0]}"
    else:
        advice = f"take weights for {wanted[1]} classes, or a dataset with {found[1]}"
    return (
        f"{checkpoint.path} holds a {found[0]} with {found[1]} classes, "
        f"not a {wanted[0]} with {wanted[1]} classes: {advice}"
    )


def _differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    groups = {
        "missing": [name for name in wanted if name not in found],
        "not expected": [name for name in found if name not in wanted],
        "of another shape": [
            name for name in wanted if name in found and found[name].shape != wanted[name].shape
        ],
    }
    return "; ".join(
        f"{what}: {len(names)} (first '{names[0]}')" for what, names in groups.items() if names
    )
