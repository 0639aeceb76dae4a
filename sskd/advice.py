"""What to type instead of a word of the command line that Hydra refuses."""

from __future__ import annotations

import re
import shlex
import sys
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from sskd import CONF
from sskd.errors import nearest, printable
from sskd.nested import as_override, flatten

# What earlier versions had, and what to type now.
_RENAMED = {"kd_weight": "weighting=crd_benchmark (0) or weighting=common (1)"}


def about_quotes(word: str) -> str:
    """Return how to quote ``KEY=VALUE`` for the shell and for Hydra; nothing for other words."""
    match = re.fullmatch(r"([+~]*[\w./@-]+)=([^\[{'\"].*)", word, re.DOTALL)
    if match is None or not word.isprintable():
        return ""
    quoted = as_override(match[1], match[2])
    # In double quotes a shell reads on in these only.
    for_shell = shlex.quote(quoted) if re.search(r'["$`\\!]', quoted) else f'"{quoted}"'
    return f"; a value with such signs is quoted twice, for the shell and for Hydra: {for_shell}"


def about_plus(error: Exception) -> str | None:
    """Return the line about a plus in front of a key that is missing or too many, if it is that."""
    told = str(error)
    if match := re.match(r"Could not override '([^']+)'\.\s*To append", told):
        return _unknown_setting(match[1])
    if match := re.match(r"Could not override '([^']+)'\. No match in the defaults list", told):
        return _group_without_plus(match[1])
    if match := re.search(r"An item is already at '([^']+)'", told):
        return f"{match[1]}: already exists; write it without a plus: {_without_plus(match[1])}"
    match = re.match(r"Multiple values for ([^\s]+)\. ", told) or re.match(
        r"force-add of config groups is not supported: '\+\+([^=]+)=", told
    )
    if match and _word_of(match[1], "+"):
        return f"{match[1]}: is already chosen; write it without a plus: {_without_plus(match[1])}"
    return None


def _unknown_setting(key: str) -> str:
    if key in _RENAMED:
        return f"{key}: is now {_RENAMED[key]}"
    known = _known_settings()
    if key in known:
        word = _word_of(key) or f"{key}=VALUE"
        return f"{key}: is not in the chosen files; add it with a plus: +{shlex.quote(word)}"
    return f"{key}: no such setting{nearest(key, known)}"


def _group_without_plus(group: str) -> str | None:
    """Return the line about a group of the user's own; the suite's are chosen by default."""
    if group.partition("@")[0] in [path.name for path in CONF.iterdir()]:
        return None
    word = _word_of(group) or f"{group}=NAME"
    return f"{group}: no option of this group is chosen yet; add it with a plus: +{word}"


def _word_of(key: str, sign: str = "") -> str | None:
    """Return the command line's word that sets ``key``, after any of ``sign`` before it."""
    words = (re.match(rf"{re.escape(sign)}\+*{re.escape(key)}=", word) for word in sys.argv[1:])
    found = next((match.string for match in words if match), None)
    return None if found is None else printable(found)


def _without_plus(key: str) -> str:
    word = _word_of(key)
    return shlex.quote(word.lstrip("+")) if word else f"{key}=VALUE"


def _known_settings() -> list[str]:
    """Return the dotted names of all settings of what is chosen, and of the groups."""
    from sskd.config import config_model, fields_of

    chosen = {"method": "sskd", "optimizer": "sgd"}
    for group in chosen:
        options = [path.stem for path in (CONF / group).iterdir()]
        asked = re.split("[=,]", _word_of(group) or "=")[1]
        chosen[group] = asked if asked in options else chosen[group]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose("student", [f"{group}={name}" for group, name in chosen.items()])
    values: Any = OmegaConf.to_container(composed)
    fields = fields_of(config_model({group: {"name": name} for group, name in chosen.items()}))
    groups = ["arch@teacher", "arch@student", *(path.stem for path in CONF.iterdir())]
    return list(dict.fromkeys([*groups, *flatten(values), *fields]))
