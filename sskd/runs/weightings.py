"""The weightings of CE and KD: their names, and those of earlier recipes."""

from __future__ import annotations

from collections.abc import Mapping

CE, KD = "method.weights.ce", "method.weights.kd"
WEIGHTING = "weighting"
# The weights (CE, KD) of each option of ``conf/weighting`` that differs from ``sskd`` in more than
# one weight. ``imagenet`` is ``method.weights.ce=1.0``: its runs stand in a study of that weight.
WEIGHTINGS = {"sskd": (0.1, 0.9), "crd_benchmark": (1.0, 0.0), "common": (1.0, 1.0)}
USUAL = WEIGHTINGS["sskd"]
# The suite's methods whose weights of CE and KD come from a weighting; the others have weights in
# their own files. Those of an extension are found in its file (sskd.runs.recipe.follows_weighting).
WEIGHTED_METHODS = {
    *("fitnet", "at", "sp", "vid", "rkd", "pkt", "ab", "ft", "crd"),
    *("cc", "nst", "fsp"),
}
# The version of the recipe, which a result records beside its ``difference`` from the recipe.
RECIPE = 2
# The default weights (CE, KD) of WEIGHTED_METHODS in earlier versions of the recipe.
FORMER = {1: WEIGHTINGS["common"]}


def find_weighting(
    method: str, recipe: int, difference: Mapping[str, str], *, follows: bool = False
) -> dict[str, str]:
    """Return the weights of CE and KD of a run with this ``difference`` from version ``recipe``.

    The weights of an option are returned as ``weighting=OPTION``, others as two weights. A method
    with its own weights returns nothing.

    Args:
        follows: the weights of ``method``, which may be an extension's, come from a weighting.
    """
    if not follows and method not in WEIGHTED_METHODS:
        return {}
    former = FORMER.get(recipe, USUAL)
    texts = {k: difference.get(k, str(weight)) for k, weight in zip((CE, KD), former, strict=True)}
    weights = tuple(map(_number, texts.values()))
    names = (name for name, option in WEIGHTINGS.items() if option == weights)
    return next(({WEIGHTING: name} for name in names), texts)


def name_weighting(
    method: str, recipe: int, difference: Mapping[str, str], *, follows: bool = False
) -> dict[str, str]:
    """Return the difference from today's recipe, with the name of its weighting if it has one.

    If the default weights of ``method`` in version ``recipe`` are not today's, they are added.
    Today's default is left out. ``follows`` is as in ``find_weighting``.
    """
    found = find_weighting(method, recipe, difference, follows=follows)
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
