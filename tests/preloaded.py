"""What the server of tests/commands.py imports before it forks.

Never imported by a test: the server alone imports it, in the folder of the tests.
"""

from __future__ import annotations

import atexit
import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import few_digits
from hydra.core.plugins import Plugins

few_digits.install()
Plugins.instance()  # looks for launchers in all that is installed
gc.collect()
gc.freeze()  # a collection in a child would copy every page that it looks at
atexit.register(gc.unfreeze)  # else C++ modules print what they take for leaks
