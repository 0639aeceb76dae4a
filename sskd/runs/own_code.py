"""The user's own code that a run uses, which is not part of its identity."""

from __future__ import annotations

from pathlib import Path

from sskd.config import Config
from sskd.invocation.extensions import extension_digests
from sskd.output import complain
from sskd.runs.result import RunResult


def code_digests(config: Config) -> dict[str, str]:
    """Return the SHA-256 of the code that the run of ``config`` uses of extensions.

    The keys are those of the command line, such as ``method=dist``.
    """
    return code_before_student(config) | extension_digests([("arch", config.student.name)])


def code_before_student(config: Config) -> dict[str, str]:
    """Return ``code_digests`` without that of the student's network."""
    teacher = [("arch", config.teacher.name)] if config.teacher else []
    choices = [("method", config.method.name), *teacher, ("dataset", config.dataset.source)]
    return extension_digests(choices)


def warn_of_changed_code(folder: Path, config: Config, result: RunResult) -> None:
    """Warn if code of the user has changed since the run in ``folder`` reached its ``result``."""
    now = code_digests(config)
    for name in sorted(now.keys() & result.extensions.keys()):
        if now[name] != result.extensions[name]:
            complain(
                f"warning: {folder}: the code of {name} has changed since this run was trained; "
                "force=true trains it from scratch"
            )
