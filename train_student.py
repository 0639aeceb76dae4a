"""Distil a student from a teacher; `python train_student.py --help` lists the settings."""

from __future__ import annotations

import sys

from sskd.commands.student import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
