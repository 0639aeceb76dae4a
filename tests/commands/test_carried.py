"""Training needs no package but PyTorch, torchvision and those that docs/gpu.md lists."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from faults import SMALL
from image_folders import write_images
from pages import read, shell_lines
from starting import run

# Runs a script without the modules that are not in its first argument; some were imported before.
WITHOUT_OTHERS = """
import runpy, sys

allowed = {*sys.argv[1].split(), *sys.stdlib_module_names}

class OthersMissing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

for name in list(sys.modules):
    if name.partition(".")[0] not in allowed or name.startswith("sskd"):
        del sys.modules[name]
sys.meta_path.insert(0, OthersMissing)
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OWN = ("__main__", "sskd", "hydra_plugins", "sitecustomize")


def carried() -> list[str]:
    """Return the packages that docs/gpu.md lists."""
    (words,) = (words for words in shell_lines(read("docs/gpu.md")) if "--no-deps" in words)
    return words[words.index("requirements.lock") + 1 :]


def with_requirements(names: list[str]) -> set[str]:
    """Return the distributions ``names`` and those that they require, in lower case."""
    found: set[str] = set()
    left = [name.lower() for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            required = requires(name) or []
        except PackageNotFoundError:  # of another platform
            continue
        plain = [line for line in required if "extra ==" not in line]
        left += [re.split(r"[^\w.-]", line)[0].lower() for line in plain]
    return found


def modules_of(names: set[str]) -> set[str]:
    """Return the modules and packages of the distributions ``names``."""
    same = {name.lower().replace("_", "-") for name in names}
    return {
        module
        for module, distributions in packages_distributions().items()
        if any(name.lower().replace("_", "-") in same for name in distributions)
    }


def test_a_run_needs_only_the_packages_that_are_listed(tmp_path: Path) -> None:
    allowed = modules_of({*carried(), *with_requirements(["torch", "torchvision"])}) | {*OWN}
    assert not allowed & {"wandb", "requests", "matplotlib", "sklearn", "psutil", "pandas"}
    small = [word for word in SMALL if not word.startswith(("dataset", "teacher.fraction"))]
    data = ["dataset=folder", f"dataset.root={write_images(tmp_path, 9)}"]
    more = ["method=sskd", "schedule.epochs=1", f"runs={tmp_path / 'runs'}"]
    script = ["train_student.py", *small, *data, *more]
    done = run("-c", WITHOUT_OTHERS, " ".join(sorted(allowed)), *script, "wandb.mode=disabled")
    assert done.returncode == 0, done.stderr
    assert "last top-1" in done.stdout
    logged = [*script, "wandb.mode=offline", "force=true"]
    refused = run("-c", WITHOUT_OTHERS, " ".join(sorted(allowed)), *logged)
    assert "No module named 'wandb'" in refused.stderr
