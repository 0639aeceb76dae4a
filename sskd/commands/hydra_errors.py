"""Turn each error of Hydra, a launcher or the disk into one readable line."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from pathlib import Path

import yaml
from hydra.errors import CompactHydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from sskd import CONF
from sskd.commands.advice import about_commas, about_plus, about_quotes
from sskd.errors import UserError, did_you_mean, mask_unprintable, one_line, shortened
from sskd.invocation.extensions import extension_names, load_extensions
from sskd.invocation.names import config_dir, config_name, rerun_hint

# The suite's own errors, a configuration that Hydra refuses, and a full or forbidden disk.
USER_ERRORS = (UserError, CompactHydraException, OmegaConfBaseException, OSError, yaml.YAMLError)

# The modules of Hydra that read files. They take for granted that files are text and that their
# defaults are lists, and raise any exception if they are not.
_READERS = ("hydra._internal.config_", "hydra._internal.defaults_list")

# The extra that installs a plugin, by the file that Hydra misses without it.
_EXTRAS = {
    "hydra/launcher/joblib": "cluster",
    "hydra/launcher/submitit_slurm": "cluster",
    "hydra/sweeper/optuna": "optuna",
}
_APPENDING = "To append to your"  # Hydra's advice, which the suite's next check would refuse


def user_message(error: Exception) -> str:
    """Return the line about ``error``, one of ``USER_ERRORS`` or of a launcher."""
    try:
        lines = (about(error) for about in _PATTERNS)
        return mask_unprintable(next(filter(None, lines), ""))
    except UserError as cause:  # an extension that cannot be imported
        return str(cause)


def crash_message(error: Exception) -> str | None:
    """Return the line about another exception that a user's mistake caused.

    None if ``error`` is a fault of the suite.
    """
    if isinstance(error, ValueError) and _was_raised_in_hydra(error):
        return _long_number() or one_line(error)
    if not _was_raised_in_reading(error):
        return None
    cause = "cannot be composed (" + one_line(error) + ")"
    if isinstance(error, RecursionError):
        cause = "its defaults lead back to itself"
    return _long_number() or f"{_primary_file()}: {cause}"


def _about_user_error(error: Exception) -> str | None:
    return str(error) if isinstance(error, UserError) else None


def _about_disk(error: Exception) -> str | None:
    if not isinstance(error, OSError) or not error.strerror:
        return None
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return line + f"; free some space there; {rerun_hint()} then resumes the run" * is_full


def _about_missing_file(error: Exception) -> str | None:
    """Return the line about an option of a group that has no file."""
    missing = error.missing_cfg_file if isinstance(error, MissingConfigException) else None
    if missing in _EXTRAS:
        return f"{missing} is not installed; install it with pip install '.[{_EXTRAS[missing]}]'"
    if not isinstance(error, MissingConfigException) or not missing or not error.options:
        return None
    group, _, name = missing.rpartition("/")
    load_extensions()
    if name in extension_names(group):
        return (
            f"{group}={name}: has no {group}/{name}.yaml; name the folder that holds it with "
            "--config-dir FOLDER"
        )
    hint, options = did_you_mean(name, error.options), ", ".join(error.options)
    return f"{group}={name}: no such {group}{hint} (there are: {options})"


def _about_launcher(error: Exception) -> str | None:
    if not type(error).__module__.startswith("submitit."):
        return None
    # The third line begins a copy of everything that the job has printed.
    return " ".join(str(error).splitlines()[:2]) + "; the other jobs continue (see squeue)"


def _about_yaml(error: Exception) -> str | None:
    if not isinstance(error, yaml.YAMLError):
        return None
    return f"not readable as YAML: {' '.join(str(error).split())}"


def _about_word(error: Exception) -> str | None:
    """Return the line about a word of the command line that Hydra cannot parse."""
    if not isinstance(error, OverrideParseException):
        return None
    word = str(error.override)
    return f"{word}: cannot be read as KEY=VALUE ({str(error).splitlines()[0]}){about_quotes(word)}"


def _about_defaults(error: Exception) -> str | None:
    if "No match in the defaults list" not in str(error):
        return None
    line = " ".join(str(error).split(_APPENDING)[0].split())
    return f"{line} (a sweep's file begins with 'defaults: [student]')"


def _about_other(error: Exception) -> str:
    causes = [str(error).split(_APPENDING)[0]]
    if isinstance(error.__cause__, OmegaConfBaseException):
        causes.append(str(error.__cause__).splitlines()[0])
    return " ".join(" ".join(causes).split())


# The first one that returns a line is taken.
_PATTERNS = (
    _about_user_error,
    _about_disk,
    _about_missing_file,
    _about_launcher,
    about_plus,
    about_commas,
    _about_yaml,
    _about_word,
    _about_defaults,
    _about_other,
)


def _was_raised_in_reading(error: Exception) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").startswith(_READERS) for frame in frames)


def _was_raised_in_hydra(error: Exception) -> bool:
    """Return whether Hydra's own code raised ``error``, such as for two conflicting options."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return str(innermost.f_globals.get("__name__", "")).startswith("hydra.")


def _primary_file() -> Path:
    """Return the file that the command line composes: a sweep's, or the command's."""
    return (config_dir() or CONF) / f"{config_name().removesuffix('.yaml')}.yaml"


def _long_number() -> str:
    """Return the line about a number on the command line that Python refuses to read, or ""."""
    most = sys.get_int_max_str_digits()
    for key, _, value in (word.partition("=") for word in sys.argv):
        if 0 < most < len(value) and re.fullmatch(r"[+-]?[\d_]+", value):
            number = shortened(int(value[:100]))
            return f"{key}: {number} has {len(value)} digits; give at most {most}"
    return ""
