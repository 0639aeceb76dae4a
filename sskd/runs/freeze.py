"""Add the options that the recipe lacks to its file: ``python -m sskd.runs.freeze``.

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
            "common": frozen.get("common") or _common(),
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
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    new = [name for name in names if name not in known]
    found = {
        name: OmegaConf.to_container(compose(primary, [override.format(name)])[group])
        for name in new
    }
    return {**known, **found}


_DESCRIPTION = (
    "Add the options that the recipe lacks to its file. Existing entries are kept, because "
    "finished runs are named after them."
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
