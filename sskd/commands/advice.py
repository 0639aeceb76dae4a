"""Lines that say what to type instead of a word of the command line that Hydra refuses."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from sskd import CONF
from sskd.errors import UserError, mask_unprintable, shortened
from sskd.invocation.composition import compose_config
from sskd.invocation.extensions import load_extensions
from sskd.invocation.names import command_name, config_dir, current_role
from sskd.overrides import about_unknown, as_override, flatten
from sskd.runs.weightings import WEIGHTING

# The only group without a default option.
_OPTIONAL_GROUP = "pair"


def refuse_missing_keys(words: Iterable[str]) -> None:
    """Refuse a word of the command line that names no key; Hydra's message would not show it.

    Raises:
        UserError: one of ``words`` is empty, or has nothing before its equals sign.
    """
    for word in words:
        if re.fullmatch(r"\s*[+~]*\s*(=.*)?", word, re.DOTALL):
            raise UserError(f"{shortened(word)}: should be KEY=VALUE, such as seed=1")


def refuse_invalid_choices(words: Iterable[str]) -> None:
    """Refuse a word of the command line that sets a group of the suite to anything but an option.

    Hydra merges the options of a list, and its error about other values does not name the group.

    Raises:
        UserError: one of ``words`` sets a group to a list or to no text, or deletes it.
    """
    words = list(words)
    added = {match[1] for word in words if (match := re.match(r"\+([\w@/]+)=", word))}
    for word in words:
        match = re.fullmatch(r"(~|\+*)([\w@]+)(?:=(.*))?", word, re.DOTALL)
        group = match[2].partition("@")[0] if match else ""
        if match is None or not group or not any((CONF / group).glob("*.yaml")):
            continue
        key, value = match[2], match[3]
        deleted = match[1] == "~" and key != _OPTIONAL_GROUP and key not in added
        if deleted or (value is not None and _is_no_option(value)):
            raise UserError(
                f"{mask_unprintable(word)}: {key} needs one option (there are: {_options(group)}); "
                f"a sweep takes several: -m {key}=OPTION,OPTION"
            )


def _options(group: str) -> str:
    folders = [CONF, *_config_folders()]
    names = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
    return mask_unprintable(", ".join(sorted(names)))


def _is_no_option(value: str) -> bool:
    """Return whether Hydra reads ``value`` as something else than a name, such as a list."""
    number = r"[+-]?[\d.]+(e[+-]?\d+)?"
    other = rf"\s*(\[.*|\{{.*|null|true|false|{number})\s*"
    return bool(re.fullmatch(other, value, re.IGNORECASE | re.DOTALL))


def about_weighting(method: str, words: Iterable[str]) -> str:
    """Return a line if one of ``words`` chooses a weighting that ``method`` does not follow."""
    from sskd.runs.recipe import weights_of_weighting

    given = [word for word in words if re.match(rf"\+*{WEIGHTING}[.=]", word)]
    if not given or weights_of_weighting(method):
        return ""
    return (
        f"{mask_unprintable(given[0])}: has no effect on method={method}, which has weights of its "
        "own (method.weights.KEY=VALUE changes them)"
    )


def about_quotes(word: str) -> str:
    """Return how to quote ``KEY=VALUE`` for the shell and for Hydra; nothing for other words."""
    match = re.fullmatch(r"([+~]*[\w./@-]+)=([^\[{'\"].*)", word, re.DOTALL)
    if match is None or not word.isprintable():
        return ""
    quoted = as_override(match[1], match[2])
    # The characters that a shell interprets inside double quotes.
    for_shell = shlex.quote(quoted) if re.search(r'["$`\\!]', quoted) else f'"{quoted}"'
    return (
        f"; a value with such characters is quoted twice, for the shell and for Hydra: {for_shell}"
    )


def about_commas(error: Exception) -> str | None:
    """Return the line about several values without ``-m``; None for another ``error``."""
    match = re.match(r"Ambiguous value for argument '(.*?)'\n1\. To use", str(error), re.DOTALL)
    if match is None:
        return None
    key, _, value = match[1].partition("=")
    line = f"{match[1]}: has several values; add -m to sweep over them"
    if (CONF / key.partition("@")[0]).is_dir():
        return line
    as_list = shlex.quote(f"{key}=[{value}]")
    return f"{line}; a list takes brackets: {as_list}{about_quotes(match[1])}"


def about_plus(error: Exception) -> str | None:
    """Return the line about a plus that a key lacks or should not have; None for another error."""
    text = str(error)
    if match := re.match(r"Could not override '([^']+)'\.\s*To append", text):
        return _unknown_setting(match[1])
    if match := re.match(r"Could not override '([^']+)'\. No match in the defaults list", text):
        return _group_without_plus(match[1])
    if match := re.search(r"An item is already at '([^']+)'", text):
        return f"{match[1]}: already exists; write it without a plus: {_without_plus(match[1])}"
    match = re.match(r"Multiple values for ([^\s]+)\. ", text) or re.match(
        r"force-add of config groups is not supported: '\+\+([^=]+)=", text
    )
    if match and _word_of(match[1], "+"):
        return f"{match[1]}: is already chosen; write it without a plus: {_without_plus(match[1])}"
    return None


def _unknown_setting(key: str) -> str:
    known = _known_settings()
    if key in known:
        word = _word_of(key) or f"{key}=VALUE"
        return f"{key}: is not in the chosen files; add it with a plus: +{shlex.quote(word)}"
    return about_unknown(key, known)


def _group_without_plus(group: str) -> str | None:
    """Return the line about a group that the user added; the suite's are chosen by default."""
    if group.partition("@")[0] in [path.name for path in CONF.iterdir()]:
        return _group_of_the_student(group)
    word = _word_of(group) or f"{group}=NAME"
    return f"{group}: no option of this group is chosen yet; add it with a plus: +{word}"


def _group_of_the_student(group: str) -> str | None:
    if current_role() != "teacher":
        return None
    student, teacher = command_name("student"), command_name("teacher")
    return f"{group}: is a group of {student}; {teacher} trains one network, arch=NAME"


def _word_of(key: str, prefix: str = "") -> str | None:
    """Return the word of the command line that sets ``key``, with ``prefix`` in front of it."""
    words = (re.match(rf"{re.escape(prefix)}\+*{re.escape(key)}=", word) for word in sys.argv[1:])
    found = next((match.string for match in words if match), None)
    return None if found is None else mask_unprintable(found)


def _without_plus(key: str) -> str:
    word = _word_of(key)
    return shlex.quote(word.lstrip("+")) if word else f"{key}=VALUE"


def _config_folders() -> list[Path]:
    """Return the folders of configuration files that the command line adds."""
    added = re.findall(r"file://([^,'\"\]]+)", _word_of("hydra.searchpath") or "")
    folder = config_dir()
    return [*([folder] if folder else []), *map(Path, added)]


def _known_settings() -> list[str]:
    """Return the groups, and the dotted names of all settings of the chosen options.

    Raises:
        UserError: an option is of an extension that is not loaded.
    """
    from sskd.config import config_model, fields_of

    load_extensions()
    folders, role = _config_folders(), current_role()
    words = []
    for group in ("method", "optimizer"):
        option = re.split("[=,]", _word_of(group) or "=")[1]
        if any((folder / group / f"{option}.yaml").is_file() for folder in [CONF, *folders]):
            words.append(f"{group}={option}")
    GlobalHydra.instance().clear()
    values: Any = OmegaConf.to_container(compose_config(role, words, folders))
    fields = fields_of(config_model(values))
    if role == "teacher":
        fields = {key: field for key, field in fields.items() if not key.startswith("teacher")}
    groups = ["arch@teacher", "arch@student", *(path.stem for path in CONF.iterdir())]
    return list(dict.fromkeys([*groups, *flatten(values), *fields]))
