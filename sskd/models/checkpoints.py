"""Weights in files: the published layouts read, checked, digested and written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sskd.errors import UserError
from sskd.files import StillOurs, expanded, write_atomically
from sskd.models.layouts import (
    State,
    own_names,
    own_numbers,
    state_dicts,
    stated_accuracy,
    stated_epoch,
)
from sskd.models.recognition import recognise, tensor_shapes
from sskd.models.safe_load import load_torch_file, unreadable

# The second ones count if a folder has none of the first: a .bin may hold anything.
SUFFIXES = ((".pth", ".pt", ".safetensors"), (".tar", ".th", ".ckpt", ".bin"))  # .tar: of .pth.tar
EPOCHS = ("best", "last")
# What to explain of a file in which nothing fits: the CRD benchmark's files, and SSKD's.
STATE_KEYS = ("model", "state_dict")
ABOUT = "about"
# What networks are made of. A file may hold other tensors (sparse, quantised, complex, in 4 bits),
# which most operations do not take.
NUMBERS = frozenset(
    {
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    }
)
# A view may show a few values as terabytes, which a copy of it would take: how much larger than
# its file a network may be, and what is small whatever the file.
MOST_EXPANSION, SMALL = 10, 64 << 20
# The largest network takes 100 MB in float32, with copies and an optimizer's state some times that.
MOST_BYTES = 2 << 30
_MOST_NETWORKS = 100  # in one file; each is named, compared and perhaps hashed
_LONGEST_KEY = 100  # characters of a key in a message


@dataclass(frozen=True)
class Checkpoint:
    """A network's own tensors, on the CPU, and what their file says about them.

    ``accuracy`` stands as the file has it (percent in the published ones); it and ``epoch``
    are None if the file states none, or none that is a single number.
    """

    state: dict[str, Tensor]
    accuracy: float | None
    epoch: int | None
    path: Path


def find_checkpoint(path: str | Path, epoch: str = "best") -> Path:
    """Return ``path`` if it is a file, else the one checkpoint of ``epoch`` in that folder.

    Looked for is a file with ``epoch`` (``best`` or ``last``) in its name, in the folder itself
    or else in its ``ckpt`` folder; a folder's only checkpoint need not name an epoch. Raises
    ``UserError`` where there is none, or more than one.
    """
    path = expanded(path)
    if not path.is_dir():
        _require_file(path)
        return path
    for suffixes, folder in product(SUFFIXES, (path, path / "ckpt")):
        files = sorted(file for file in folder.glob("[!.]*") if file.suffix.lower() in suffixes)
        found = [file for file in files if epoch in file.name]
        if len(files) == 1 and not any(each in files[0].name for each in EPOCHS):
            found = files
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise UserError(
                f"{folder} holds more than one {epoch} checkpoint: {names}; name one file"
            )
    present = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
    raise UserError(
        f"no {epoch} checkpoint ({', '.join(chain(*SUFFIXES))}) in {path} or its ckpt folder; "
        f"it holds {present}; name the file"
    )


def is_known(state: State) -> bool:
    """Return whether ``state`` is of an architecture of this suite."""
    return recognise(state) is not None


def read_checkpoint(path: str | Path, fits: Callable[[State], bool] = is_known) -> Checkpoint:
    """Read weights from a safetensors or torch file, whichever of the known layouts it has.

    Args:
        path: the file; its content tells which of the two it is.
        fits: which network is wanted, of several in one file.

    Raises ``UserError`` if the file is missing, too large, damaged, without weights, or asks for
    code, or if several networks in it fit and differ.
    """
    path = expanded(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a checkpoint; name the file in it")
    _require_file(path)
    _refuse_large(path)
    content, facts = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    found_states = state_dicts(content)
    if len(found_states) > _MOST_NETWORKS:
        raise UserError(
            f"{path} holds {len(found_states)} state dicts, more than {_MOST_NETWORKS}; save the "
            "one that you mean in a file of its own"
        )
    networks = {key: own_names(state) for key, state in found_states.items()}
    if not networks:
        found = ", ".join(str(key)[:_LONGEST_KEY] for key in list(content)[:5]) or "nothing"
        raise UserError(
            f"{path} holds no state dict, neither by itself nor under a key such as "
            f"'model' or 'state_dict' (found: {found})"
        )
    chosen = networks[_choose(networks, fits, path)]
    if problem := _problem(chosen, path):
        raise UserError(f"{path} {problem}; save it as an ordinary tensor")
    accuracy, epoch = stated_accuracy(facts), stated_epoch(facts)
    return Checkpoint(own_numbers(chosen), accuracy, epoch, path)


def _choose(networks: Mapping[str, State], fits: Callable[[State], bool], path: Path) -> str:
    """Return the key of the network that ``fits``, or of the one to explain if none does."""
    sound = [key for key in networks if not _problem(networks[key], path)]
    fitting = [key for key in sound if fits(networks[key])]
    several = fitting if len(fitting) > 1 else []
    if len({weights_digest(own_numbers(networks[key])) for key in several}) > 1:
        found = ", ".join(
            f"'{key[:_LONGEST_KEY]}' "
            f"({' with '.join(map(str, recognise(networks[key]) or ()))} classes)"
            for key in fitting[:5]
        )
        raise UserError(
            f"{path} holds several networks that fit: {found}; save the one that you mean in a "
            "file of its own"
        )
    known = [key for key in sound if is_known(networks[key])]
    usual = [key for key in STATE_KEYS if key in networks]
    return [*fitting, *known, *usual, *networks][0]


def load_weights(model: nn.Module, path: str | Path) -> Checkpoint:
    """Load a file's weights into ``model``: every tensor, no more and no less.

    Raises ``UserError`` where the file cannot be read, holds another network or other
    classes, or holds weights that are not finite; the model then stays as it was.
    """
    own_state = model.state_dict()
    shapes = tensor_shapes(own_state)
    checkpoint = read_checkpoint(path, lambda state: tensor_shapes(state) == shapes)
    if tensor_shapes(checkpoint.state) != shapes:
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
    write_atomically(path, lambda stream: stream.write(content), still_ours=still_ours)


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


def _refuse_large(path: Path) -> None:
    """Raise UserError if the file has more bytes than any checkpoint; nothing is read."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise UserError(
            f"{path} has {size >> 20} MiB, more than the limit of {MOST_BYTES >> 20} MiB for a "
            "checkpoint; save the state dict alone"
        )


def _is_safetensors(path: Path) -> bool:
    """Return whether the file begins like a safetensors file: 8 bytes, then JSON."""
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: permission denied") from error


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


def _read_torch(path: Path) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Return what the file holds, as weights and as facts about them."""
    content = load_torch_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content, content


def _problem(state: State, path: Path) -> str:
    """Say which tensor is no plain one, or is shown larger than it is; "" for sound tensors."""
    whole, limit = 0, max(MOST_EXPANSION * path.stat().st_size, SMALL)
    for name, tensor in state.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.dtype not in NUMBERS:
            return (
                f"holds '{name}' as no plain numbers ({tensor.dtype}, {tensor.layout}, on "
                f"'{tensor.device.type}')"
            )
        whole += tensor.numel() * max(tensor.element_size(), 4)  # as it is in float32
        if whole > limit:
            return (
                f"holds fewer values for '{name}' than its shape {tuple(tensor.shape)} says: "
                f"{whole >> 20} MiB so far, far more than the file's own size"
            )
    return ""


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
        f"{what}: {len(names)} (first '{names[0][:_LONGEST_KEY]}')"
        for what, names in groups.items()
        if names
    )
