"""What a configuration file can compute: ``${NAME:ARGUMENTS}``.

Importing this takes no time: the commands answer ``--help`` before torch is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sskd.invocation.names import command_line, tool_command


def by_pair(default: Any, values: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """Return the value of the run's pair of networks, ``teacher-student``, or ``default``."""
    teacher = _root_.get("teacher")
    pair: Any = teacher and f"{teacher.name}-{_root_.student.name}"
    return values.get(pair, default)


# For the folder that Hydra makes for a sweep; a run's own is expanded with its configuration.
OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)
# For the text of --help.
OmegaConf.register_new_resolver("command", command_line, replace=True)
OmegaConf.register_new_resolver("tool", tool_command, replace=True)
# For settings that authors have chosen for each pair.
OmegaConf.register_new_resolver("by_pair", by_pair, replace=True)
