"""The command that distils a student from a teacher."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from sskd import CONF
from sskd.commands.job import run_job
from sskd.commands.process import run_command


@hydra.main(version_base=None, config_path=str(CONF), config_name="student")
def main(composed: DictConfig) -> float:
    """Train the run that Hydra composed; return the accuracy that a search maximises."""
    return run_job(composed)


def command() -> int:
    """Run the command of this process and return its exit status."""
    return run_command(main)
