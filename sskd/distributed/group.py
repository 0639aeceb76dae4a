"""The group of the ranks: how they meet, and how the first one lets the others take part in jobs.

The first rank runs the command: it composes the configuration, chooses the jobs of a sweep and
reports. The others wait for the configuration of each job, train it together with the first rank,
and end when it does. They meet in the key-value store of torchrun.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from sskd.config import Config
from sskd.distributed.environment import RANK, WORLD_SIZE, started_ranks
from sskd.distributed.ranks import await_key
from sskd.errors import UserError, one_line
from sskd.output import complain

# Of the first contact, for a rank on a machine that starts late.
_MEETING = timedelta(minutes=5)
# Of a step's exchanges. A rank that dies ends all others at once; this ends those of a deadlock.
_TIMEOUT = timedelta(hours=1)
# Seconds in which the other ranks report the failure of a job that failed in one of them.
_FAILURE_WINDOW = 10.0
_END_WINDOW = 5.0
_numbers, _jobs = itertools.count(), itertools.count()


@functools.cache
def _store() -> dist.Store:
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=_MEETING))
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the ranks cannot meet at {address} ({one_line(error)[:120]}); use another port, as "
            "torchrun --master_port=PORT"
        ) from None
    return store


def meet() -> None:
    """Connect this rank with the others; raise UserError if they cannot meet."""
    _store()


def announce(config: Mapping[str, Any] | None) -> None:
    """Let the other ranks carry out the job of a plain ``config``; None lets them end."""
    _store().set(f"job/{next(_numbers)}", json.dumps(config))


def await_job() -> dict[str, Any] | None:
    """Return the configuration of the next job of the first rank; None, at last, if it ends."""
    key = f"job/{next(_numbers)}"
    config: dict[str, Any] | None = json.loads(await_key(_store(), key))
    if config is None:
        _store().add("ended", 1)
        _leave()
    return config


@contextmanager
def led(config: Config) -> Iterator[None]:
    """Let all ranks carry out the job of ``config`` inside a ``with`` block of the first one."""
    if started_ranks() > 1:
        announce(config.model_dump(mode="json"))
    with joined():
        yield


@contextmanager
def joined() -> Iterator[None]:
    """Take part in the exchanges of ``sskd.distributed.ranks`` inside a ``with`` block.

    If the block raises an error that not all ranks raise, the process ends: the others wait for it
    in an exchange, and torchrun ends them.
    """
    if started_ranks() == 1:
        yield
        return
    job = next(_jobs)
    if not dist.is_initialized():
        _join()
    try:
        yield
    except Exception as error:
        if not _all_fail(job):
            _end_alone(error)
        raise


def _join() -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", _store()),
        rank=int(os.environ[RANK]),
        world_size=int(os.environ[WORLD_SIZE]),
        timeout=_TIMEOUT,
    )


def end() -> None:
    """Let the other ranks end, and wait for that: this process may be the server of the store."""
    announce(None)
    _count_up_to(started_ranks(), "ended", patience=_END_WINDOW)
    _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _all_fail(job: int) -> bool:
    """Report that ``job`` failed here, and return whether it fails in all ranks."""
    return _count_up_to(started_ranks(), f"failed/{job}", patience=_FAILURE_WINDOW)


def _count_up_to(most: int, key: str, *, patience: float) -> bool:
    """Count this rank at ``key``; return whether ``most`` ranks are counted within ``patience``."""
    deadline = time.monotonic() + patience
    counted = _store().add(key, 1)
    while counted < most and time.monotonic() < deadline:
        time.sleep(0.05)
        counted = _store().add(key, 0)
    return counted >= most


def _end_alone(error: Exception) -> NoReturn:
    """Report ``error`` of this rank alone and end the process, without waiting for the others."""
    sys.stderr = sys.__stderr__  # the ranks behind the first one are silent
    if not isinstance(error, UserError):
        complain("".join(traceback.format_exception(error)))
    complain(f"error: rank {os.environ[RANK]}: {one_line(error)}")
    sys.stdout.flush()
    os._exit(1)
