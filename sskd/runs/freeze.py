"""Add the options and settings that the recipe lacks to its file: ``python -m sskd.runs.freeze``.

Entries that the file has are kept, because finished runs are named after them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sskd import CONF
from sskd.config import ArchSettings
from sskd.files import write_text
from sskd.output import say
from sskd.runs.recipe import FROZEN

_HEADER = """\
# The default settings that folders of runs are named after (sskd/runs/recipe.py). Do not change
# an entry: that would rename finished runs. `python -m sskd.runs.freeze` adds new options.
"""


def freeze(frozen: dict[str, Any]) -> dict[str, Any]:
    """Return ``frozen`` with an entry for each network, method and dataset of ``conf/``."""
    with initialize_config_dir(str(CONF), version_base=None):
        return {
            "common": _with_missing(frozen.get("common", {}), _common()),
            "arch": {
                name: {**dict.fromkeys(ArchSettings.model_fields), **settings}
                for name, settings in _section("arch", frozen, "teacher", "arch={}").items()
            },
            "dataset": _section("dataset", frozen, "student", "dataset={}"),
            "method": _section("method", frozen, "student", "method={}"),
        }


def _common() -> dict[str, Any]:
    values: Any = OmegaConf.to_container(compose("student"))
    own = ("student", "method", "dataset", "wandb", "weighting")
    common = {key: value for key, value in values.items() if key not in own}
    teacher = values["teacher"].items()
    common["teacher"] = {k: v for k, v in teacher if k not in ArchSettings.model_fields}
    return common | {"weighting": values["weighting"]}


def _section(group: str, frozen: dict[str, Any], primary: str, override: str) -> dict[str, Any]:
    known = frozen.get(group, {})
    names = sorted({*known, *(path.stem for path in (CONF / group).glob("*.yaml"))})
    found: dict[str, Any] = {}
    for name in names:
        current: Any = {}
        if (CONF / group / f"{name}.yaml").is_file():
            current = OmegaConf.to_container(compose(primary, [override.format(name)])[group])
        found[name] = _with_missing(known.get(name, {}), current)
    return found


def _with_missing(frozen: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """Return ``frozen`` with the keys of ``current`` that it lacks, at every level."""
    merged = {**current, **frozen}
    for key in frozen.keys() & current.keys():
        if isinstance(frozen[key], dict) and isinstance(current[key], dict):
            merged[key] = _with_missing(frozen[key], current[key])
    return merged


_DESCRIPTION = (
    "Add the options and settings that the recipe lacks to its file. Existing entries are kept, "
    "because finished runs are named after them."
)


def main() -> None:
    """Update the recipe's file."""
    argparse.ArgumentParser(
        prog="python -m sskd.runs.freeze", description=_DESCRIPTION
    ).parse_args()
    path = Path(str(FROZEN))
    known: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    frozen = freeze(known)
    write_text(path, _HEADER + OmegaConf.to_yaml(OmegaConf.create(frozen)))
    added = [f"{k}={n}" for k in frozen for n in frozen[k] if n not in known.get(k, {})]
    say(f"{path}: added {', '.join(added) or 'nothing'}")


if __name__ == "__main__":
    main()
