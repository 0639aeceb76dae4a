"""What checkpoints from elsewhere look like: where their weights are, and what wraps the names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sskd.models.recognition import recognise

State = Mapping[str, Tensor]
# Of torch.compile, DataParallel, Lightning and the like, and SSKD's student.
PREFIXES = ("_orig_mod.", "module.", "model.", "network.", "net.", "backbone.")
# Beside a network's own tensors: SSKD's student has a head, AveragedModel a counter.
WRAPPERS = {"backbone.": "proj_head.", "module.": "n_averaged"}
# Of a profiler (thop), which registers them as buffers of every layer.
PROFILED = ("total_ops", "total_params")
ACCURACY_KEYS = ("accuracy", "acc", "best_acc", "top1", "acc1", "best_acc1", "best_top1")
# SSKD's MobileNetV2 has its classifier bare, the CRD benchmark's inside a Sequential.
BARE_CLASSIFIER = {
    "classifier.weight": "classifier.0.weight",
    "classifier.bias": "classifier.0.bias",
}
VARIANCE, COUNTER = "running_var", "num_batches_tracked"
_DEPTH = 2  # of dicts in dicts, which may also hold themselves
_MOST_EPOCHS = 10**9
_MOST_WRAPPERS = 10  # around each other


def state_dicts(content: Mapping[Any, Any]) -> dict[str, State]:
    """Return each dict of nothing but named tensors in ``content``, by its keys joined by dots.

    A dict that is there under several keys, as a small file can have a million, is returned once.
    """
    states: dict[str, State] = {}
    level: list[tuple[list[str], Mapping[Any, Any]]] = [([], content)]
    seen = {id(content)}
    for _ in range(_DEPTH + 1):
        deeper: list[tuple[list[str], Mapping[Any, Any]]] = []
        for keys, each in level:
            if each and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in each.items()):
                name = ".".join(keys)
                # The key "a.b", and the key "b" in the dict "a", have one name.
                states[f"{name} ({len(states)})" if name in states else name] = each
                continue
            for key, value in each.items():
                if isinstance(value, dict) and id(value) not in seen:
                    seen.add(id(value))
                    deeper.append(([*keys, str(key)], value))
        level = deeper
    return states


def own_names(raw: State) -> State:
    """Return ``raw`` by the network's own names, which wrappers have put their own in front of.

    A wrapper's prefix, of whatever name, is one that all tensors share: of a network beside other
    tensors nothing says that it is the one that is meant. A known network gets the counters of
    batches that files of old versions lack, at 0.
    """
    state: State = {name: raw[name] for name in raw if name.rpartition(".")[2] not in PROFILED}
    for _ in range(_MOST_WRAPPERS):
        prefix = _wrappers_prefix(state)
        if prefix is None:
            break
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
    return _known(state) or state


def _known(state: State) -> State | None:
    """Return ``state`` with an architecture's very names, or None if it is of none."""
    counters = {
        name.removesuffix(VARIANCE) + COUNTER: torch.tensor(0)
        for name in state
        if name.endswith(VARIANCE)
    }
    renamed = {BARE_CLASSIFIER.get(name, name): tensor for name, tensor in state.items()}
    for known in (state, renamed, {**counters, **state}, {**counters, **renamed}):
        if recognise(known):
            return known
    return None


def _wrappers_prefix(state: State) -> str | None:
    """Return what a wrapper has put in front of the names in ``state``, if one has.

    No architecture's own names all begin with one part.
    """
    first = f"{next(iter(state), '').partition('.')[0]}."
    return next((prefix for prefix in (*PREFIXES, first) if _wraps(prefix, state)), None)


def _wraps(prefix: str, state: State) -> bool:
    """Return whether every name in ``state`` has ``prefix``, but for what comes beside it."""
    own = [name for name in state if name.startswith(prefix)]
    beside = WRAPPERS.get(prefix)
    rest = [name for name in state if not (beside and name.startswith(beside))]
    return bool(own) and own == rest


def own_numbers(state: State) -> dict[str, Tensor]:
    """Return ``state`` in float32, and counters of batches as the whole numbers that they are.

    The digest of half-precision weights is then that of the float32 network that they load into.
    """
    return {
        name: _own_number(name, tensor.detach().resolve_neg()) for name, tensor in state.items()
    }


def _own_number(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(COUNTER) and tensor.isfinite().all():
        return tensor.long()
    return tensor.float() if tensor.is_floating_point() else tensor


def stated_accuracy(facts: Mapping[Any, Any], depth: int = _DEPTH) -> float | None:
    """Return the top-1 in percent that ``facts`` state.

    None if that is not a single number up to 100, or if it is more than ``depth`` dicts deep. A
    number above 0 and up to 1 counts as none: it may be a share.
    """
    stated = (_number(facts[key], depth) for key in ACCURACY_KEYS if key in facts)
    percent = (each for each in stated if each is not None and (each == 0 or 1 < each <= 100))
    return next(percent, None)


def stated_epoch(facts: Mapping[Any, Any]) -> int | None:
    """Return the epoch that ``facts`` state; None if that is no count."""
    epoch = _number(facts.get("epoch"))
    return int(epoch) if epoch is not None and 0 <= epoch <= _MOST_EPOCHS else None


def _number(value: Any, depth: int = 0) -> float | None:
    if isinstance(value, Mapping):
        return stated_accuracy(value, depth - 1) if depth else None
    if isinstance(value, list | tuple) and len(value) == 1:
        (value,) = value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
