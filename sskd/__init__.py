"""Knowledge distillation meets self-supervision: an experiment suite configured with Hydra."""

from pathlib import Path

__version__ = "0.1.0"

CONF = Path(__file__).resolve().parent.parent / "conf"
"""The folder of the configuration files, which the two training commands share."""
