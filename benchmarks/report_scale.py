"""How long a report takes, and how much memory: 10 systems x 5 seeds x 100,000 items, 3 metrics, 4 slices, from
Parquet.

    python benchmarks/report_scale.py [--items 100000] [--systems 10] [--seeds 5]

The table of scores is made first and not counted; `bem-peft compare` then runs in a process of its own, of which the
seconds and the largest resident memory are taken. Adds a row to benchmarks/results/report_scale.csv.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet
from results_table import ResultsTable, add_output

COLUMNS = ("systems", "seeds", "items", "metrics", "slices", "rows", "seconds", "peak_mib")
METRICS = ("nll", "exact_match", "f1")
SLICES = 4


def write_table(path: Path, systems: int, seeds: int, items: int) -> int:
    """A Parquet table of scores; items of 7 share a cluster, and each is in one of 4 slices. Returns its rows."""
    rng = np.random.default_rng(0)
    ease = rng.normal(2.0, 0.5, items)
    names = pyarrow.array([f"item-{i}" for i in range(items)])
    clusters = pyarrow.array([f"document-{i // 7}" for i in range(items)])
    slices = pyarrow.array([f"slice {i % SLICES}" for i in range(items)])
    schema = pyarrow.schema(
        [("system", "string"), ("seed", "int64"), ("item", "string"), ("metric", "string"), ("value", "float64"),
         ("cluster", "string"), ("slice", "string")]
    )  # fmt: skip
    with parquet.ParquetWriter(path, schema) as writer:
        for system in range(systems):
            for seed in range(seeds):
                loss = ease + 0.01 * system + rng.normal(0.0, 0.01) + rng.normal(0.0, 0.3, items)
                values = {"nll": loss, "exact_match": (loss < 2.0).astype(float), "f1": np.clip(1 - loss / 4, 0, 1)}
                for metric in METRICS:
                    columns = [
                        pyarrow.array([f"system {system}"] * items), pyarrow.array(np.full(items, seed)), names,
                        pyarrow.array([metric] * items), pyarrow.array(values[metric]), clusters, slices,
                    ]  # fmt: skip
                    writer.write_table(pyarrow.table(columns, schema=schema))
    return systems * seeds * items * len(METRICS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--items", type=int, default=100_000)
    add_output(parser)
    options = parser.parse_args()
    table = ResultsTable(options.out, "report_scale.csv", COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "scores.parquet", Path(folder) / "out"
        rows = write_table(path, options.systems, options.seeds, options.items)
        command = [
            sys.executable,
            "-m",
            "bem_peft_cli",
            "compare",
            str(path),
            "--anchor",
            "system 0",
            "--held-out",
        ]
        start = time.perf_counter()
        subprocess.run([*command, "--out", str(out)], check=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    compared = sum(len(found) for found in report["comparisons"].values())
    print(f"{rows:,} scores, {compared} comparisons: {seconds:.1f} s, {peak:,.0f} MiB at most")
    table.append(
        [{"systems": options.systems, "seeds": options.seeds, "items": options.items, "metrics": len(METRICS),
          "slices": SLICES, "rows": rows, "seconds": f"{seconds:.1f}", "peak_mib": f"{peak:.0f}"}]
    )  # fmt: skip


if __name__ == "__main__":
    main()
