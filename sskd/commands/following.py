"""Ranks other than 0: they train the jobs of rank 0, and print nothing but errors of their own.

Importing this takes no time; a command of one process does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from sskd.distributed.environment import world_size
from sskd.errors import Interrupted


def follow() -> int:
    """Take part in the jobs of rank 0 until it ends; return the exit status."""
    from torch.distributed import DistNetworkError

    from sskd.config import parse_config
    from sskd.distributed import group
    from sskd.invocation.extensions import load_extensions
    from sskd.train import carry_out
    from sskd.training.signals import raise_on_sigterm

    try:
        with _silent(), raise_on_sigterm():
            while (config := group.await_job()) is not None:
                # An error that is raised here is one of all ranks, and rank 0 prints it.
                with suppress(Exception), group.process_group():
                    load_extensions()
                    carry_out(parse_config(config))
    except Interrupted as stop:
        return 128 + stop.signum
    except DistNetworkError:  # rank 0 has ended
        return 1
    return 0


@contextmanager
def _silent() -> Iterator[None]:
    """Print nothing inside a ``with`` block: rank 0 prints the same."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def other_ranks() -> Iterator[None]:
    """Connect rank 0 with the other ranks, if there are some, and let them end after the block.

    A signal ends each rank by itself.
    """
    if world_size() == 1:
        yield
        return
    from sskd.distributed import group

    group.connect()
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException:
        group.end()
        raise
    group.end()
