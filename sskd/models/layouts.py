"""Layouts of checkpoints from other code: their state dicts, names, dtypes and metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sskd.models.recognition import recognise

State = Mapping[str, Tensor]
# Prefixes that torch.compile, DataParallel, Lightning and similar wrappers add, and SSKD's student.
PREFIXES = ("_orig_mod.", "module.", "model.", "network.", "net.", "backbone.")
# Names without the prefix that a wrapper adds: a head in SSKD's student, AveragedModel's counter.
WRAPPER_EXTRAS = {"backbone.": "proj_head.", "module.": "n_averaged"}
# A profiler (thop) registers these buffers in every layer.
PROFILER_BUFFERS = ("total_ops", "total_params")
ACCURACY_KEYS = ("accuracy", "acc", "best_acc", "top1", "acc1", "best_acc1", "best_top1")
# The classifier of MobileNetV2 is a plain layer in SSKD's code, in a Sequential in the CRD
# benchmark's.
PLAIN_CLASSIFIER = {
    "classifier.weight": "classifier.0.weight",
    "classifier.bias": "classifier.0.bias",
}
RUNNING_VAR, BATCH_COUNTER = "running_var", "num_batches_tracked"
_MAX_DEPTH = 2  # of nested dicts; a dict can also contain itself
_MAX_EPOCHS = 10**9
_MAX_WRAPPERS = 10  # around each other


def find_state_dicts(content: Mapping[Any, Any]) -> dict[str, State]:
    """Return each dict in ``content`` that holds only named tensors, by its keys joined by dots.

    A dict under several keys is returned once: a small file can refer to it a million times.
    """
    states: dict[str, State] = {}
    level: list[tuple[list[str], Mapping[Any, Any]]] = [([], content)]
    seen = {id(content)}
    for _ in range(_MAX_DEPTH + 1):
        deeper: list[tuple[list[str], Mapping[Any, Any]]] = []
        for keys, each in level:
            if each and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in each.items()):
                name = ".".join(keys)
                # The key "a.b" and the key "b" in the dict "a" have the same joined name.
                states[f"{name} ({len(states)})" if name in states else name] = each
                continue
            for key, value in each.items():
                if isinstance(value, dict) and id(value) not in seen:
                    seen.add(id(value))
                    deeper.append(([*keys, str(key)], value))
        level = deeper
    return states


def strip_wrappers(raw: State) -> State:
    """Return ``raw`` with the names of the network itself, without the prefixes of wrappers.

    Any prefix that all names share is the prefix of a wrapper. If only a part of the tensors has
    a prefix, it stays, because it is not known which network is meant. A known network gets the
    batch counters that old files lack, with the value 0.
    """
    state: State = {
        name: raw[name] for name in raw if name.rpartition(".")[2] not in PROFILER_BUFFERS
    }
    for _ in range(_MAX_WRAPPERS):
        prefix = _wrapper_prefix(state)
        if prefix is None:
            break
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
    return _as_architecture(state) or state


def _as_architecture(state: State) -> State | None:
    """Return ``state`` with exactly the names of an architecture; None if it matches none."""
    counters = {
        name.removesuffix(RUNNING_VAR) + BATCH_COUNTER: torch.tensor(0)
        for name in state
        if name.endswith(RUNNING_VAR)
    }
    renamed = {PLAIN_CLASSIFIER.get(name, name): tensor for name, tensor in state.items()}
    for candidate in (state, renamed, {**counters, **state}, {**counters, **renamed}):
        if recognise(candidate):
            return candidate
    return None


def _wrapper_prefix(state: State) -> str | None:
    """Return the prefix that a wrapper added to the names in ``state``; None without a wrapper.

    The names of an architecture itself never share their first part.
    """
    first = f"{next(iter(state), '').partition('.')[0]}."
    return next((prefix for prefix in (*PREFIXES, first) if _is_shared(prefix, state)), None)


def _is_shared(prefix: str, state: State) -> bool:
    """Return whether every name in ``state`` has ``prefix``, except the extras of its wrapper."""
    prefixed = [name for name in state if name.startswith(prefix)]
    extra = WRAPPER_EXTRAS.get(prefix)
    rest = [name for name in state if not (extra and name.startswith(extra))]
    return bool(prefixed) and prefixed == rest


def convert_dtypes(state: State) -> dict[str, Tensor]:
    """Return ``state`` with weights in float32 and batch counters in int64.

    So half-precision weights have the same digest as the float32 network that loads them.
    """
    return {
        name: _convert_dtype(name, tensor.detach().resolve_neg()) for name, tensor in state.items()
    }


def _convert_dtype(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(BATCH_COUNTER) and tensor.isfinite().all():
        return tensor.long()
    return tensor.float() if tensor.is_floating_point() else tensor


def stated_accuracy(metadata: Mapping[Any, Any], depth: int = _MAX_DEPTH) -> float | None:
    """Return the top-1 accuracy in percent that ``metadata`` state.

    None if it is not a single number up to 100, or is nested in more than ``depth`` dicts. A number
    above 0 and up to 1 is ignored, because it may be a fraction.
    """
    stated = (_as_number(metadata[key], depth) for key in ACCURACY_KEYS if key in metadata)
    percent = (each for each in stated if each is not None and (each == 0 or 1 < each <= 100))
    return next(percent, None)


def stated_epoch(metadata: Mapping[Any, Any]) -> int | None:
    """Return the epoch that ``metadata`` state; None if it is not a valid count."""
    epoch = _as_number(metadata.get("epoch"))
    return int(epoch) if epoch is not None and 0 <= epoch <= _MAX_EPOCHS else None


def _as_number(value: Any, depth: int = 0) -> float | None:
    if isinstance(value, Mapping):
        return stated_accuracy(value, depth - 1) if depth else None
    if isinstance(value, list | tuple) and len(value) == 1:
        (value,) = value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
