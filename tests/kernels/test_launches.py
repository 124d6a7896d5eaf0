"""How many operators a site launches in inference on a GPU, counted on shapes, beside LoRA's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "launches.py"
MORE_THAN_LORA = {"PT1": 9, "PT2": 3, "PT3": 1, "PT4": 7}  # in float32 and bfloat16


def test_no_method_launches_more_than_it_is_said_to() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", BENCHMARK, "--print-only"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    found = {(name, dtype): int(more) for name, dtype, what, _, more in rows if what == "inference" and name != "LoRA"}
    assert {name for name, _ in found} == set(MORE_THAN_LORA)
    for (name, dtype), more in found.items():
        assert more <= MORE_THAN_LORA[name], (name, dtype)
