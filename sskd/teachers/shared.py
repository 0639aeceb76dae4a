"""Results that depend on a teacher alone: computed by one run and reused by the others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from sskd.config import Config
from sskd.distributed import ranks
from sskd.errors import UserError
from sskd.files import read_bounded, safe_join
from sskd.models import weights_digest
from sskd.output import say
from sskd.runs.result import SharedResult
from sskd.runs.run import Run


def find_or_compute(
    config: Config, settings: Mapping[str, Any], compute: Callable[[Run], None]
) -> tuple[Run, SharedResult]:
    """Return the run of a shared phase with these ``settings``, finished, and its result.

    ``compute`` trains and finishes it if no run has done so. Another process that needs it waits.
    """
    with Run(shared_folder(config, settings), settings).open(wait=True) as run:
        if ranks.from_first(lambda: run.finished(SharedResult)) is None:
            compute(run)
        else:
            say(f"{run.folder}: reused")
        result = ranks.from_first(lambda: run.finished(SharedResult))
        assert result is not None
        return run, result


def shared_folder(config: Config, settings: Mapping[str, Any]) -> Path:
    """Return the folder of a shared phase; its name has a hash of the ``settings``."""
    assert config.teacher is not None
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = f"seed{settings['seed']}-{digest}" if "seed" in settings else digest
    parts = ["phases", config.teacher.name, settings["phase"], name]
    return safe_join(Path(config.runs), config.dataset.name, *parts)


def read_intact(path: Path, most: int, digest: str | None) -> dict[str, Tensor] | None:
    """Return the tensors of a safetensors file of up to ``most`` bytes; None if it is not intact.

    ``digest`` is the SHA-256 that they have; None if that is not known.
    """
    try:
        state: dict[str, Tensor] = load(read_bounded(path, most))
    except (OSError, ValueError, SafetensorError):
        return None
    return state if digest in (None, weights_digest(state)) else None


def corrupt_file_error(path: Path) -> UserError:
    """Return the error that a file of a shared phase is corrupt."""
    return UserError(
        f"{path}: is corrupt; delete the folder {path.parent} and rerun the same command"
    )
