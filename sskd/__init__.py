"""Knowledge distillation meets self-supervision: an experiment suite configured with Hydra."""

import warnings
from pathlib import Path

__version__ = "0.1.0"

CONF = Path(__file__).resolve().parent.parent / "conf"
"""The folder of the configuration files, which the two training commands share."""

# What Hydra 1.4 and OmegaConf 2.4 ask for instead, 1.3 and 2.3 do not have.
for _warning in ("The version_base parameter is deprecated", r"register_new_resolver\(\)"):
    warnings.filterwarnings("ignore", _warning)
