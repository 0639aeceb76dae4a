"""Train one network alone; `python train_teacher.py --help` tells how."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from sskd import CONF
from sskd.commands.job import run_command, run_job
from train_student import train_composed


@hydra.main(version_base=None, config_path=str(CONF), config_name="teacher")
def main(composed: DictConfig) -> float:
    """Train the run that Hydra composed: the story is train_student.py's, without a teacher."""
    return run_job(train_composed, composed)


if __name__ == "__main__":
    sys.exit(run_command(main))
