"""Broken files for every reader, for a given time: each must give records or an error that is meant for a user.

    python tests/fuzz/readers.py [--seconds 60] [--seed N]                                          `make fuzz` runs 60
    seconds

Files that are right (experiments of this repository, JSON lines, CSV, results of other tools) are changed at random:
bytes flipped, cut, doubled, joined with another file's. Anything but ValueError, OSError or yaml.YAMLError ends the
run with code 1; the file that caused it is kept, and its path printed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import yaml

from bem_peft.evaluation.formats.read import read_results
from bem_peft.experiments.experiment import read_experiment
from bem_peft.experiments.records import read_records

ROOT = Path(__file__).parents[2]
FOREIGN = ROOT / "tests" / "evaluation" / "foreign"
TOKENS = (
    b"[", b"{", b"}", b'"', b",", b":", b"\n", b"\\ud800", b"NaN", b"1e999", b"null", b"\xff", b"\xef\xbb\xbf",
    b"&a *a", b"!!x", b"\0",
)  # fmt: skip
MEANT = (ValueError, OSError, yaml.YAMLError)


def corpus() -> list[tuple[str, bytes]]:
    """(name that tells the reader, content) of files that are right."""
    rows = [b"s,%d,i%d,nll,1.5,c%d\n" % (k, i, i) for k in range(2) for i in range(4)]
    found = [
        ("x.jsonl", b'{"a": "x", "n": 3.50}\n{"a": "y", "n": null}\n'), ("x.csv", b'a,n\nx,1\n"y\n",2\n'),
        ("x.tsv", b"a\tn\nx\t1\n"), ("x.json", b'[{"a": 1}, {"a": [2]}]'),
        ("table.csv", b"system,seed,item,metric,value,cluster\n" + b"".join(rows)),
    ]  # fmt: skip
    found += [("x.yaml", path.read_bytes()) for path in sorted((ROOT / "experiments").glob("*.yaml"))]
    found += [("samples.jsonl", path.read_bytes()[:4_000]) for path in sorted(FOREIGN.rglob("samples_*.jsonl"))[:2]]
    found += [("x.eval", path.read_bytes()) for path in sorted(FOREIGN.rglob("*.eval"))[:1]]
    return found


def changed(raw: bytes, other: bytes, rng: random.Random) -> bytes:
    """`raw` with one to six changes."""
    for _ in range(rng.randint(1, 6)):
        at, to = sorted((rng.randint(0, len(raw)), rng.randint(0, len(raw))))
        kind = rng.randrange(5)
        if kind == 0:
            raw = raw[:at] + rng.choice(TOKENS) + raw[at:]
        elif kind == 1:
            raw = raw[:at] + raw[to:]
        elif kind == 2:
            raw = raw[:to] + raw[at:to] * rng.randint(1, 3) + raw[to:]
        elif kind == 3:
            raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
        else:
            raw = raw[:at] + other[rng.randint(0, len(other)) :]
    return raw


def read(path: Path) -> None:
    """Give the file to the reader of its kind."""
    if path.suffix == ".yaml":
        read_experiment(path)
    elif path.name in ("table.csv", "x.eval"):
        read_results([path])
    else:
        for _ in read_records(str(path)):
            pass


def fuzz(seconds: float, seed: int, report: Callable[[str], None] = print) -> Path | None:
    """Run for `seconds`; returns the file that was not read as it should be, or None."""
    rng, files, counts = random.Random(seed), corpus(), Counter[str]()
    folder, end = Path(tempfile.mkdtemp(prefix="fuzz-")), time.monotonic() + seconds
    while time.monotonic() < end:
        name, raw = rng.choice(files)
        path = folder / name
        path.write_bytes(changed(raw, rng.choice(files)[1], rng))
        is_meant = False
        try:
            read(path)
            is_meant = True
            counts[f"{name}: read"] += 1
        except MEANT as error:
            is_meant = str(path) in str(error)
            counts[f"{name}: refused"] += 1
            if not is_meant:
                report(f"the message does not name the file: {error}")
                return path
        finally:
            if not is_meant:  # any other error goes on, with its traceback
                report(f"not read as it should be: {path}")
    for name, count in sorted(counts.items()):
        report(f"{name} {count:,}")
    report(f"{sum(counts.values()):,} files in {seconds:g} s, seed {seed}")
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.exit(fuzz(options.seconds, options.seed) is not None)
