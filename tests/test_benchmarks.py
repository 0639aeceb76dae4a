"""The benchmarks run and tell what they measured; how fast it was is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_cost_of_methods_is_a_table_and_figures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.methods", "--pairs", "vgg13-MobileNetV2"]
    small = ["--methods", "kd", "ft", "fsp", "--batch", "2", "--rounds", "2", "--images", "20"]
    out = ["--device", "cpu", "--out", str(tmp_path / "new" / "cost")]
    done = subprocess.run([*command, *small, *out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "method=fsp vgg13-MobileNetV2: needs the same channels" in done.stderr
    costs = json.loads((tmp_path / "new" / "cost.json").read_text())["costs"]
    assert [(cost["method"], cost["stage"]) for cost in costs] == [
        ("kd", "distill"), ("ft", "paraphraser"), ("ft", "distill"),
    ]  # fmt: skip
    assert all(cost[key] > 0 for cost in costs for key in ("seconds", "base_seconds", "memory"))
    table = (tmp_path / "new" / "cost.md").read_text()
    assert [line for line in table.splitlines() if line] == [
        line for line in done.stdout.splitlines() if line
    ]
