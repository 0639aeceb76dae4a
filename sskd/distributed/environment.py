"""The variables by which torchrun numbers the processes that it starts.

Importing this takes no time: a command reads them before torch is loaded.
"""

from __future__ import annotations

import os

from sskd.errors import UserError, shortened

WORLD_SIZE, RANK, LOCAL_RANK, LOCAL_WORLD_SIZE = (
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
)
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # with --max-restarts
_OTHERS = (RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """Return how many processes torchrun has started for this command; 1 without torchrun.

    Raises:
        UserError: only a part of torchrun's variables is set, or one is not a number.
    """
    count = _number(WORLD_SIZE) if os.environ.get(WORLD_SIZE) else 1
    if count > 1 and (missing := [name for name in _OTHERS if not os.environ.get(name)]):
        raise UserError(
            f"{WORLD_SIZE}={count} is set, but not {missing[0]}, which torchrun sets too; start "
            f"with torchrun --nproc_per_node={count}, or unset {WORLD_SIZE}"
        )
    return count


def is_distributed() -> bool:
    """Return whether torchrun has started several processes."""
    return world_size() > 1


def is_follower() -> bool:
    """Return whether this process only trains what the first rank asks for."""
    return world_size() > 1 and _number(RANK) > 0


def local_rank() -> int:
    """Return the number of this process among those of torchrun on this machine."""
    return _number(LOCAL_RANK)


def local_ranks() -> int:
    """Return how many processes torchrun has started on this machine."""
    return _number(LOCAL_WORLD_SIZE)


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal() or (name == WORLD_SIZE and int(text) == 0):
        raise UserError(
            f"{name}={shortened(text)} is not a valid number; start with torchrun, or unset "
            f"{WORLD_SIZE}"
        )
    return int(text)
