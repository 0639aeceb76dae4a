"""The process group: how the ranks connect, and how rank 0 has jobs run on all of them.

Rank 0 runs the command: it composes the configuration, chooses the jobs of a sweep and reports. The
others wait for the configuration of each job, train it together with rank 0, and end when it does.
They connect by the key-value store of torchrun.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from sskd.distributed import ranks
from sskd.distributed.environment import (
    RANK,
    RESTART_COUNT,
    WORLD_SIZE,
    local_rank,
    world_size,
)
from sskd.errors import UserError, one_line
from sskd.output import complain

# To connect: a rank on another machine may start late.
_CONNECT_TIMEOUT = timedelta(minutes=5)
# Of a collective. A rank that dies ends all others at once; this ends a deadlock.
_TIMEOUT = timedelta(hours=1)
# Seconds within which a job that fails on all ranks has failed on each of them.
_FAILURE_WINDOW = 10.0
_END_WINDOW = 5.0
_announced = itertools.count()


@functools.cache
def _store() -> dist.Store:
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=_CONNECT_TIMEOUT))
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the processes cannot connect to {address} ({one_line(error)[:120]}); use another "
            "port with torchrun --master_port=PORT"
        ) from None
    # After a restart torchrun's store still has the keys of the processes that died.
    return dist.PrefixStore(f"restart/{os.environ.get(RESTART_COUNT, 0)}", store)


def connect() -> None:
    """Connect this rank with the others; raise UserError if it cannot."""
    _store()


def _announce(config: Mapping[str, Any] | None) -> None:
    _store().set(f"job/{next(_announced)}", json.dumps(config))


def await_job() -> dict[str, Any] | None:
    """Return the plain configuration of rank 0's next job; None if there are no more jobs."""
    key = f"job/{next(_announced)}"
    config: dict[str, Any] | None = json.loads(ranks.await_key(_store(), key))
    if config is None:
        _store().add("ended", 1)
        _leave()
    return config


def end() -> None:
    """Let the other ranks end, and wait for that: this process may be the server of the store."""
    _announce(None)
    _count_up_to(world_size(), "ended", patience=_END_WINDOW)
    _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def on_all_ranks(config: Mapping[str, Any]) -> Iterator[None]:
    """Let the other ranks carry out the job of a plain ``config`` too, in a block of rank 0.

    Raises:
        UserError: this process or thread is one that a launcher started.
    """
    if world_size() > 1:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not (in_main_thread and _store.cache_info().currsize):
            raise UserError(
                "hydra/launcher: torchrun's processes train the jobs one after the other; use "
                "hydra/launcher=basic"
            )
        _announce(config)
    with process_group():
        yield


class _Job:
    """The job that this process works on: its number, and whether it has reported a failure."""

    number = -1
    failed = False


@contextmanager
def process_group() -> Iterator[None]:
    """Use the functions of ``sskd.distributed.ranks`` for one job, inside a ``with`` block.

    If the block raises an error that not all ranks raise, the process ends: the others wait for it
    in a collective, and torchrun ends them.
    """
    if world_size() == 1:
        yield
        return
    _Job.number, _Job.failed = _Job.number + 1, False
    if not dist.is_initialized():
        _initialise()
    try:
        with failure_reported():
            yield
    except Exception as error:
        if _is_lost_connection(error) or not _fails_everywhere():
            _end_alone(error)
        raise


@contextmanager
def failure_reported() -> Iterator[None]:
    """Report an error inside the ``with`` block to the other ranks, before it is raised.

    What follows the block may take longer than the others wait.
    """
    try:
        yield
    except Exception as error:
        if dist.is_initialized() and not _Job.failed and not _is_lost_connection(error):
            _Job.failed = True
            _store().add(f"failed/{_Job.number}", 1)
        raise


def _fails_everywhere() -> bool:
    key = f"failed/{_Job.number}"
    return _count_up_to(world_size(), key, patience=_FAILURE_WINDOW, add=0)


def _initialise() -> None:
    has_gpus = torch.cuda.is_available()
    if has_gpus and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())  # otherwise each rank has a context on the first one
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
        store=dist.PrefixStore("group", _store()),
        rank=int(os.environ[RANK]),
        world_size=int(os.environ[WORLD_SIZE]),
        timeout=_TIMEOUT,
    )
    ranks.use(dist.PrefixStore("values", _store()))


def _count_up_to(most: int, key: str, *, patience: float, add: int = 1) -> bool:
    """Add to the number at ``key``; return whether it is at least ``most`` within ``patience``."""
    deadline = time.monotonic() + patience
    counted = _store().add(key, add)
    while counted < most and time.monotonic() < deadline:
        time.sleep(0.05)
        counted = _store().add(key, 0)
    return counted >= most


def _is_lost_connection(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _end_alone(error: Exception) -> NoReturn:
    """Print the ``error`` of this rank alone and end the process; do not wait for the others."""
    sys.stderr = sys.__stderr__  # the other ranks are silent
    message = one_line(error)
    if _is_lost_connection(error):
        message = f"lost the connection to another rank, which has ended ({message[:120]})"
    elif not isinstance(error, UserError):
        complain("".join(traceback.format_exception(error)))
    complain(f"error: rank {os.environ[RANK]}: {message}")
    sys.stdout.flush()
    os._exit(1)
