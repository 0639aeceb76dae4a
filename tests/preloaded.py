"""What the server of tests/starting.py imports and computes once, before it forks.

Only the server imports this module, in the folder of the tests.
"""

from __future__ import annotations

import atexit
import gc
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "pytest",  # often the main module of the process that starts a command
    "sklearn.datasets",
    "torch._dynamo",  # the first optimizer imports it
    "torchvision.transforms",
    "wandb",
    "wandb.cli.cli",
    *(f"sskd.training.{name}" for name in ("acceleration", "trainer", "result")),
    *(f"sskd.teachers.{name}" for name in ("phases", "precompute")),
    "sskd.commands.sweep",
    "sskd.train",
    "sskd.tracking.tracker",
    "train_student",
    "train_teacher",
)


def prepare() -> None:
    """Import what a command imports, and fill the caches of the suite."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/robustness")]
    for name in MODULES:
        import_module(name)

    import bf16_convolutions
    import composing
    import few_digits
    import torch
    from faults import JOBS
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from sskd import CONF
    from sskd.config import read_config
    from sskd.models.recognition import recognise
    from sskd.runs.recipe import recipe

    torch.set_num_threads(1)  # a child would wait for OpenMP threads, which do not survive a fork
    bf16_convolutions.install()
    composing.install()
    few_digits.install()
    with initialize_config_dir(str(CONF), version_base=None):
        for words in JOBS.values():
            config = read_config(compose("student", list(words)))
            recipe(config)
            started = GlobalHydra.instance().hydra
            assert started is not None
            started.get_mode("student", list(words))  # each command does it
    few_digits.load(config.dataset)
    recognise({})


prepare()
gc.collect()
gc.freeze()  # otherwise a garbage collection in a child copies every page
atexit.register(gc.unfreeze)  # otherwise C++ modules report leaks at exit
