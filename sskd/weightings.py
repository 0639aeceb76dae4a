"""The weights of CE and KD by name, and what an earlier recipe had in their place."""

from __future__ import annotations

from collections.abc import Mapping

CE, KD = "method.weights.ce", "method.weights.kd"
WEIGHTING = "weighting"
# The weights (CE, KD) of each option of ``conf/weighting``.
WEIGHTINGS = {"sskd": (0.1, 0.9), "crd_benchmark": (1.0, 0.0), "common": (1.0, 1.0)}
USUAL = WEIGHTINGS["sskd"]
# The methods whose weights of CE and KD come from there; the others have their own.
METHODS = frozenset(
    {
        *("fitnet", "at", "sp", "vid", "rkd", "pkt", "ab", "ft", "crd"),
        *("cc", "nst", "fsp"),
    }
)
# The version of the default settings, which a run records beside its ``difference`` from them.
RECIPE = 2
# The default weights (CE, KD) of METHODS in earlier versions, none of which had other methods.
FORMER = {1: WEIGHTINGS["common"]}


def name_weighting(method: str, recipe: int, difference: Mapping[str, str]) -> dict[str, str]:
    """Return ``difference`` from today's recipe, with the name of its weighting if it has one.

    The weights of CE and KD that ``method`` had by default in ``recipe`` are added if they are
    others today. Exactly the weights of an option become ``weighting=OPTION``, and today's default
    leaves nothing.
    """
    if method not in METHODS:
        return dict(difference)
    former = FORMER.get(recipe, USUAL)
    texts = [difference.get(key, str(weight)) for key, weight in zip((CE, KD), former, strict=True)]
    others = {key: text for key, text in difference.items() if key not in (CE, KD)}
    weights = tuple(map(_number, texts))
    if weights == USUAL:
        return others
    for name, named in WEIGHTINGS.items():
        if weights == named:
            return others | {WEIGHTING: name}
    changed = zip((CE, KD), texts, weights, USUAL, strict=True)
    return others | {key: text for key, text, weight, usual in changed if weight != usual}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
