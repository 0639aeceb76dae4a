"""The weights of CE and KD by name, and what an earlier recipe had in their place."""

from __future__ import annotations

from collections.abc import Mapping

CE, KD = "method.weights.ce", "method.weights.kd"
WEIGHTING = "weighting"
# The weights (CE, KD) of each option of ``conf/weighting``.
WEIGHTINGS = {"sskd": (0.1, 0.9), "crd_benchmark": (1.0, 0.0), "common": (1.0, 1.0)}
USUAL = WEIGHTINGS["sskd"]
# The methods whose weights of CE and KD come from there, to which an extension may add its own; the
# others have weights in their own files.
METHODS = {
    *("fitnet", "at", "sp", "vid", "rkd", "pkt", "ab", "ft", "crd"),
    *("cc", "nst", "fsp"),
}
# What earlier versions had, and what to type now.
_RENAMED = {
    "kd_weight": "weighting=crd_benchmark (0), weighting=common (1), or another value as "
    "method.weights.ce=1 method.weights.kd=VALUE"
}
# The version of the default settings, which a run records beside its ``difference`` from them.
RECIPE = 2
# The default weights (CE, KD) of METHODS in earlier versions, none of which had other methods.
FORMER = {1: WEIGHTINGS["common"]}


def about_renamed(key: str) -> str | None:
    """Return the line about the dotted ``key`` if it is a setting of an earlier version."""
    name = key.rpartition(".")[2]
    return f"{key}: is now {_RENAMED[name]}" if name in _RENAMED else None


def find_weighting(method: str, recipe: int, difference: Mapping[str, str]) -> dict[str, str]:
    """Return the weights of CE and KD of a run whose ``difference`` is one from ``recipe``.

    Exactly the weights of an option are ``weighting=OPTION``; others are both given. It is empty
    for a method that has its own.
    """
    if method not in METHODS:
        return {}
    former = FORMER.get(recipe, USUAL)
    texts = {k: difference.get(k, str(weight)) for k, weight in zip((CE, KD), former, strict=True)}
    weights = tuple(map(_number, texts.values()))
    names = (name for name, option in WEIGHTINGS.items() if option == weights)
    return next(({WEIGHTING: name} for name in names), texts)


def name_weighting(method: str, recipe: int, difference: Mapping[str, str]) -> dict[str, str]:
    """Return ``difference`` from today's recipe, with the name of its weighting if it has one.

    The weights of CE and KD that ``method`` had by default in ``recipe`` are added if they are
    others today, and today's default leaves nothing.
    """
    found = find_weighting(method, recipe, difference)
    if not found:
        return dict(difference)
    others = {key: text for key, text in difference.items() if key not in (CE, KD)}
    usual = dict(zip((CE, KD), USUAL, strict=True))
    if WEIGHTING in found:
        return others if WEIGHTINGS[found[WEIGHTING]] == USUAL else others | found
    return others | {key: text for key, text in found.items() if _number(text) != usual[key]}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
