"""Open runs in W&B: online if there is a login, else on disk, and never with a prompt."""

from __future__ import annotations

import contextlib
import hashlib
import re
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import requests
import wandb

from sskd.errors import UserError, one_line
from sskd.files import StillOurs, is_regular_file, read_bounded_text, write_text
from sskd.output import say
from sskd.tracking.environment import (
    FINISH_TIMEOUT,
    INIT_TIMEOUT,
    check_environment,
    hide_foreign_variables,
    requested_mode,
    timeout,
)
from sskd.turns import shares_process

_ID = "wandb_id"
_ID_LENGTH = 16  # characters
_ANSWER_TIMEOUT = 10  # seconds


def open_run(
    mode: str,
    folder: Path,
    name: str,
    *,
    under_agent: bool = False,
    still_ours: StillOurs | None = None,
    **arguments: Any,
) -> wandb.Run:
    """Return the W&B run named ``name``, whose id and offline files are kept in ``folder``.

    If W&B cannot be reached, the run is kept on disk.

    Args:
        mode: see ``choose_mode``.
        under_agent: use the run of ``wandb agent``, which has chosen its id and project.
        still_ours: as in ``sskd.files.write_atomically``.
        arguments: arguments of ``wandb.init``.

    Raises:
        UserError: the run cannot be kept on disk either.
    """
    mode = requested_mode(mode)
    check_environment(mode)
    arguments |= {"name": name, "dir": str(folder), "resume": "allow"}
    if under_agent:
        wandb.teardown()  # an earlier run of this process hid the agent's variables
    else:
        arguments["id"] = run_id(folder, name, still_ours=still_ours)
    another_id = partial(new_run_id, folder, name, still_ours=still_ours)
    with hide_foreign_variables(mode, under_agent=under_agent):
        return _open(mode, arguments, another_id)


def _open(asked: str, arguments: dict[str, Any], another_id: Callable[[], str]) -> wandb.Run:
    mode = "online"
    try:
        mode = choose_mode(asked)
        run = _init(mode, arguments)
        if mode == "online":
            say(f"W&B: {run.url}")
        return run
    except (wandb.Error, ValueError, OSError) as error:
        if mode not in ("online", "shared", "run"):
            raise _unusable(error) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        say(f"W&B cannot be used online ({reason}); this run stays offline")
        end_service()
    try:
        try:
            return _init("offline", arguments)
        except Exception:
            if not shares_process():
                raise
        # W&B's process, which other jobs use, holds the id of the run that it could not start.
        return _init("offline", arguments | {"id": another_id()})
    except Exception as error:  # W&B's own process raises undeclared types too
        raise _unusable(error) from None


def _unusable(error: Exception) -> UserError:
    reason = one_line(error)
    return UserError(f"W&B: {reason}; use wandb.mode=disabled to train without W&B")


def _init(mode: str, arguments: dict[str, Any]) -> wandb.Run:
    settings = wandb.Settings(
        init_timeout=timeout(INIT_TIMEOUT),
        finish_timeout=timeout(FINISH_TIMEOUT),
        finish_timeout_raises=True,
        console="off",
        silent=True,
        reinit="create_new" if shares_process() else "default",  # else there is one for all jobs
    )
    return wandb.init(mode=mode, settings=settings, **arguments)  # type: ignore[arg-type]


def end_service() -> None:
    """End W&B's process, so that nothing waits for it.

    If several jobs share this process, do nothing: their launcher ends it after the last job.
    """
    if not shares_process():
        with contextlib.suppress(Exception):
            wandb.teardown()


def offline_folder(run: wandb.Run) -> Path:
    """Return the folder of ``run`` that ``wandb sync`` uploads."""
    return Path(run.dir).parent


def sync_later(run: wandb.Run) -> str:
    """Return the message for a server that has not received all of ``run`` in time."""
    return f"W&B did not answer; `wandb sync {offline_folder(run)}` uploads the rest later"


def choose_mode(mode: str) -> str:
    """Return W&B's mode for ``wandb.mode``; WANDB_MODE applies if that is ``auto``.

    The mode is online only if there is a login already, because W&B would prompt for one.
    """
    mode = requested_mode(mode)
    if mode not in ("auto", "online"):
        return mode
    if wandb.login(prompt=False, verify=False):
        _require_answer(wandb.setup().settings.base_url)
        wandb.login(prompt=False)  # now the key is verified
        return "online"
    say("W&B: no login, so this run is kept offline; `wandb sync` uploads it later")
    return "offline"


def _require_answer(url: str) -> None:
    """Raise ``wandb.Error`` if no server answers at ``url``: W&B itself may wait for minutes."""
    try:
        requests.head(url, timeout=min(_ANSWER_TIMEOUT, timeout(INIT_TIMEOUT)))
    except (requests.exceptions.SSLError, requests.exceptions.ProxyError):
        pass  # W&B has its own settings for these
    except requests.RequestException as error:
        raise wandb.Error(f"{url} does not answer: {type(error).__name__}") from None


def run_id(folder: Path, name: str, *, still_ours: StillOurs | None = None) -> str:
    """Return the W&B id of the run in ``folder``: created once, then kept there.

    A resumed run keeps its id. A run of the same name in another folder, or one started from
    scratch, gets another id.
    """
    path = folder / _ID
    known = ""
    if is_regular_file(path):
        with contextlib.suppress(ValueError):  # not a W&B id
            known = read_bounded_text(path, _ID_LENGTH)
    if not re.fullmatch("[0-9a-f]+", known) or len(known) != _ID_LENGTH:
        return new_run_id(folder, name, still_ours=still_ours)
    return known


def new_run_id(folder: Path, name: str, *, still_ours: StillOurs | None = None) -> str:
    """Return a new W&B id for the run in ``folder``, which is kept there."""
    text = f"{name} {uuid.uuid4()}"
    created = hashlib.sha256(text.encode()).hexdigest()[:_ID_LENGTH]
    write_text(folder / _ID, created, still_ours=still_ours)
    return created
