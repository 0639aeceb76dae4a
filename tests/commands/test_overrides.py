"""Words of a command line that Hydra reads back as what was meant."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from sskd.overrides import as_override, flatten

STRINGS = ["runs/a-b.c", "2024", "1e5", "true", "NULL", "", "a,b", "x(1)", "é", "it's", "[x]",
           "~/x", "a=b", "C:\\x\\", "\\", "\\'", "a b", "50%"]  # fmt: skip


@pytest.mark.parametrize("value", [*STRINGS, 1, 0.05, 5e-4, True, None, [0.5, 0.75]])
def test_an_override_reads_back_as_its_value(value: Any) -> None:
    found = OverridesParser.create().parse_override(as_override("a.b", value))
    assert found.key_or_group == "a.b"
    assert found.value() == value
    assert type(found.value()) is type(value)


def test_flatten_keeps_lists_and_joins_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {
        "a.b.c": 1,
        "a.d": [2],
        "e": None,
    }
