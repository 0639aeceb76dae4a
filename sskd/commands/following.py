"""The ranks behind the first one: they train what it asks for, and report nothing but their errors.

Importing this takes no time; ``follow`` imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from sskd.distributed.environment import started_ranks
from sskd.errors import Interrupted, UserError


def follow() -> int:
    """Take part in the jobs of the first rank until it ends; return the exit status."""
    from torch.distributed import DistNetworkError

    from sskd.config import parse_config
    from sskd.distributed import group
    from sskd.invocation.extensions import load_extensions
    from sskd.train import carry_out
    from sskd.training.signals import raise_on_sigterm

    try:
        with _silent(), raise_on_sigterm():
            load_extensions()
            while (config := group.await_job()) is not None:
                with suppress(UserError), group.joined():  # the first rank reports it
                    carry_out(parse_config(config))
    except Interrupted as stop:
        return 128 + stop.signum
    except DistNetworkError:  # the first rank has ended
        return 1
    return 0


@contextmanager
def _silent() -> Iterator[None]:
    """Print nothing inside a ``with`` block: the first rank prints the same."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def meet_followers() -> None:
    """Connect the first rank with the others, if there are some."""
    if started_ranks() > 1:
        from sskd.distributed import group

        group.meet()


def end_followers() -> None:
    """Let the other ranks end, if there are some."""
    if started_ranks() > 1:
        from sskd.distributed import group

        group.end()
