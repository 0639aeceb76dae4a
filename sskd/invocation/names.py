"""How this process was started, and so which commands its messages name."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sskd import IN_CHECKOUT, SWEEPS

Role = Literal["teacher", "student"]


def _uses_console_scripts() -> bool:
    return not IN_CHECKOUT or Path(sys.argv[0]).name.startswith("sskd-")


def command_words(role: Role) -> list[str]:
    """Return the words that start the command which trains a ``role``, without its arguments.

    They are ``sskd-teacher`` in an installed package or if this process is a console script, else
    ``python train_teacher.py``, which a checkout has.
    """
    return [f"sskd-{role}"] if _uses_console_scripts() else ["python", f"train_{role}.py"]


def command_line(role: Role) -> str:
    """Return ``command_words`` as they are typed."""
    return " ".join(command_words(role))


def command_name(role: Role) -> str:
    """Return the name of the command that trains a ``role``: ``train_teacher.py``."""
    return command_words(role)[-1]


def tool_command(module: str) -> str:
    """Return the command that starts the tool ``module``, such as ``report``."""
    return f"sskd-{module}" if _uses_console_scripts() else f"python -m sskd.{module}"


def tool_parser(module: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser for the tool ``module``; ``{command}`` in ``examples`` is its command."""
    command = tool_command(module)
    return argparse.ArgumentParser(
        prog=command,
        description=description,
        epilog=examples.format(command=command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def current_role() -> Role:
    """Return which of the two networks this process, a training command, trains."""
    return "teacher" if re.split("[-_]", Path(sys.argv[0]).stem)[-1] == "teacher" else "student"


def rerun_hint() -> str:
    """Return how to name, in a message, the command that resumes this one."""
    return "the same command" + " without force=true" * ("force=true" in sys.argv)


def _hydra_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("--config-name", "-cn", default=current_role())
    return parser.parse_known_args()[0]


def config_dir() -> Path | None:
    """Return the folder of configuration files that the command line adds, if it adds one."""
    folder: Path | None = _hydra_options().config_dir
    return folder


def config_name() -> str:
    """Return the name of the primary configuration that the command line composes."""
    return str(_hydra_options().config_name)


def with_packaged_sweeps(words: Sequence[str]) -> list[str]:
    """Return a command's ``words`` with ``-cd sweeps`` as the packaged folder.

    A folder ``sweeps`` that the current folder has comes first.
    """
    words = list(words)
    if Path("sweeps").is_dir():
        return words
    for place, word in enumerate(words):
        match = re.fullmatch(r"((?:-cd|--config-dir)=)?sweeps/?", word)
        if match and (match[1] or words[place - 1] in ("-cd", "--config-dir")):
            words[place] = f"{match[1] or ''}{SWEEPS}"
    return words
