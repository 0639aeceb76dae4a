"""Train one network alone; `python train_teacher.py --help` lists the settings."""

from __future__ import annotations

import sys

from sskd.commands.teacher import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
