"""Knowledge distillation meets self-supervision: an experiment suite configured with Hydra."""

import warnings
from pathlib import Path

__version__ = "0.1.0"

_PACKAGE = Path(__file__).resolve().parent
IN_CHECKOUT = not (_PACKAGE / "conf").is_dir()
"""Whether this is the source tree; an installed package holds ``conf`` and ``sweeps`` itself."""

_DATA = _PACKAGE.parent if IN_CHECKOUT else _PACKAGE
CONF = _DATA / "conf"
"""The folder of the configuration files, which the two training commands share."""
SWEEPS = _DATA / "sweeps"
"""The folder of the suite's sweeps, primary configurations of multiruns."""

# Hydra 1.4 and OmegaConf 2.4 warn about arguments whose replacement 1.3 and 2.3 do not have.
for _warning in ("The version_base parameter is deprecated", r"register_new_resolver\(\)"):
    warnings.filterwarnings("ignore", _warning)
