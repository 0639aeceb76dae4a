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
    """Return the value of the pair of networks, ``teacher-student``, of the student or ``default``.

    ``values`` has values by pair and by student; that of the pair has precedence.
    """
    teacher, student = _root_.get("teacher"), _root_.student.name
    pair: Any = teacher and f"{teacher.name}-{student}"
    return values.get(pair, values.get(student, default))


# For the folder that Hydra makes for a sweep; a run's own is expanded with its configuration.
OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)
# For the text of --help.
OmegaConf.register_new_resolver("command", command_line, replace=True)
OmegaConf.register_new_resolver("tool", tool_command, replace=True)
# For settings that authors have chosen for each pair.
OmegaConf.register_new_resolver("by_pair", by_pair, replace=True)
