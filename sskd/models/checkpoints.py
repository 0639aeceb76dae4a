"""Files of weights: find them, read the published layouts, load, digest and write them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sskd.errors import UserError
from sskd.files import StillOurs, expanded, write_atomically
from sskd.models.layouts import (
    State,
    convert_dtypes,
    find_state_dicts,
    stated_accuracy,
    stated_epoch,
    strip_wrappers,
)
from sskd.models.recognition import recognise, tensor_shapes
from sskd.models.safe_load import METADATA_KEY, find_unsupported_tensor, load_weights_file

# The second group counts only if a folder has no file of the first: a .bin may hold anything.
SUFFIXES = ((".pth", ".pt", ".safetensors"), (".tar", ".th", ".ckpt", ".bin"))  # .tar: of .pth.tar
EPOCHS = ("best", "last")
# Keys of the network in the files of the CRD benchmark and of SSKD. If no network in a file fits,
# the error describes the one under these keys.
STATE_KEYS = ("model", "state_dict")
_MAX_NETWORKS = 100  # in one file; each one is matched with every architecture, and maybe hashed
_MAX_SHOWN = 100  # characters of a key in a message


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a network, on the CPU, and what their file says about them.

    ``accuracy`` is the top-1 accuracy in percent. ``accuracy`` and ``epoch`` are None if the file
    does not state a single valid number for them (``stated_accuracy``, ``stated_epoch``).
    """

    state: dict[str, Tensor]
    accuracy: float | None
    epoch: int | None
    path: Path


def find_checkpoint(path: str | Path, epoch: str = "best") -> Path:
    """Return ``path`` if it is a file, else the checkpoint of ``epoch`` in that folder.

    The name of the checkpoint must contain ``epoch`` (``best`` or ``last``), unless it is the only
    one in the folder. The folder itself is searched first, then its ``ckpt`` folder.

    Raises:
        UserError: there is no such file, or more than one.
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
    """Return whether ``state`` belongs to an architecture of ``ARCHITECTURES``."""
    return recognise(state) is not None


def read_checkpoint(path: str | Path, fits: Callable[[State], bool] = is_known) -> Checkpoint:
    """Read weights from a safetensors or torch file, in any of the known layouts.

    Args:
        path: the file; its content decides which of the two formats it is.
        fits: returns whether a network is the expected one, if the file holds several.

    Raises:
        UserError: the file is missing, too large, corrupt, without weights, or would run code; or
            several networks in it fit and differ.
    """
    path = expanded(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a checkpoint; name the file in it")
    _require_file(path)
    content, metadata = load_weights_file(path)
    networks = _find_networks(content, path)
    chosen = networks[_choose(networks, fits, path)]
    if problem := find_unsupported_tensor(chosen, path):
        raise UserError(f"{path} {problem}; save it as an ordinary tensor")
    accuracy, epoch = stated_accuracy(metadata), stated_epoch(metadata)
    return Checkpoint(convert_dtypes(chosen), accuracy, epoch, path)


def _find_networks(content: Mapping[Any, Any], path: Path) -> dict[str, State]:
    """Return each state dict in ``content`` by its key, without the prefixes of wrappers."""
    found = find_state_dicts(content)
    if not found:
        keys = ", ".join(str(key)[:_MAX_SHOWN] for key in list(content)[:5]) or "nothing"
        raise UserError(
            f"{path} holds no state dict, neither at the top level nor under a key such as "
            f"'model' or 'state_dict' (found: {keys})"
        )
    if len(found) > _MAX_NETWORKS:
        raise UserError(
            f"{path} holds {len(found)} state dicts, more than {_MAX_NETWORKS}; save the one that "
            "you need to a separate file"
        )
    return {key: strip_wrappers(state) for key, state in found.items()}


def _choose(networks: Mapping[str, State], fits: Callable[[State], bool], path: Path) -> str:
    """Return the key of the network that ``fits``; if none does, of the one to show in errors."""
    regular = [key for key in networks if not find_unsupported_tensor(networks[key], path)]
    fitting = [key for key in regular if fits(networks[key])]
    several = fitting if len(fitting) > 1 else []
    if len({weights_digest(convert_dtypes(networks[key])) for key in several}) > 1:
        found = ", ".join(
            f"'{key[:_MAX_SHOWN]}' "
            f"({' with '.join(map(str, recognise(networks[key]) or ()))} classes)"
            for key in fitting[:5]
        )
        raise UserError(
            f"{path} holds several networks that fit: {found}; save the one that you need to a "
            "separate file"
        )
    known = [key for key in regular if is_known(networks[key])]
    usual = [key for key in STATE_KEYS if key in networks]
    return [*fitting, *known, *usual, *networks][0]


def load_weights(model: nn.Module, path: str | Path) -> Checkpoint:
    """Load the weights of a file into ``model``, strictly: the same names and shapes.

    Raises:
        UserError: the file cannot be read, holds another network or other classes, or holds weights
            that are not finite; ``model`` is then unchanged.
    """
    expected = model.state_dict()
    shapes = tensor_shapes(expected)
    checkpoint = read_checkpoint(path, lambda state: tensor_shapes(state) == shapes)
    if tensor_shapes(checkpoint.state) != shapes:
        raise UserError(_explain_mismatch(checkpoint, expected))
    for name, tensor in checkpoint.state.items():
        if expected[name].is_floating_point() and not tensor.is_floating_point():
            raise UserError(
                f"{checkpoint.path} holds integers ({tensor.dtype}) instead of weights in "
                f"'{name}'; download or train it again"
            )
        if not tensor.isfinite().all():
            raise UserError(
                f"{checkpoint.path} holds values that are not finite, in '{name}'; download or "
                "train it again"
            )
    model.load_state_dict(checkpoint.state)
    return checkpoint


def save_weights(
    path: str | Path,
    model: nn.Module,
    about: Mapping[str, Any],
    *,
    still_ours: StillOurs | None = None,
) -> None:
    """Write the tensors of ``model`` to a safetensors file atomically.

    ``about`` is stored in the metadata as JSON under a single key: the format does not fix the
    order of several keys, and equal weights must give equal files.
    """
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = save(state, metadata={METADATA_KEY: json.dumps(about)})
    write_atomically(expanded(path), lambda stream: stream.write(content), still_ours=still_ours)


def weights_digest(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of all tensors: their names, types, shapes and values.

    It does not depend on the order of the tensors, their device or their memory format.
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


def _explain_mismatch(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> str:
    found, known = recognise(checkpoint.state), recognise(expected)
    if found is None or known is None:
        differences = _differences(checkpoint.state, expected)
        return (
            f"{checkpoint.path} does not fit: {differences}; name a file that contains the "
            "weights of this network"
        )
    if found == known:
        return (
            f"{checkpoint.path} holds a {found[0]} whose first layers are those for images of "
            "another size; set dataset.size to the size of the images that it was trained on, "
            "such as 224"
        )
    if found[0] != known[0]:
        advice = f"name the architecture {found[0]}, for a teacher with arch@teacher={found[0]}"
    else:
        advice = f"use weights for {known[1]} classes, or a dataset with {found[1]}"
    return (
        f"{checkpoint.path} holds a {found[0]} with {found[1]} classes, "
        f"not a {known[0]} with {known[1]} classes: {advice}"
    )


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    common = [name for name in expected if name in found]
    groups = {
        "missing": [name for name in expected if name not in found],
        "not expected": [name for name in found if name not in expected],
        "of another shape": [name for name in common if found[name].shape != expected[name].shape],
    }
    return "; ".join(
        f"{kind}: {len(names)} (first '{names[0][:_MAX_SHOWN]}')"
        for kind, names in groups.items()
        if names
    )
