"""Seconds until something is there: `bem-peft --help`, and `import bem_peft` beyond `import peft`.

    python benchmarks/startup.py [--rounds 10]          alone on the machine

Each in a fresh process, in turn and back again; medians with the quartiles. A row each is added to
benchmarks/results/startup.csv.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from results_table import ResultsTable, add_output

COMMANDS = {
    "python": ["-c", "pass"],
    "bem-peft --help": ["-m", "bem_peft_cli", "--help"],
    "import peft": ["-c", "import peft"],
    "import peft, bem_peft": ["-c", "import peft, bem_peft"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    add_output(parser)
    options = parser.parse_args()
    table = ResultsTable(
        options.out, "startup.csv", ("what", "median_s", "lower_s", "upper_s", "rounds"), depends_on=("bem_peft_cli",)
    )
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for name in COMMANDS:  # from the disk's cache from here on
        seconds(COMMANDS[name])
    for i in range(options.rounds):
        for name in list(COMMANDS)[:: 1 if i % 2 == 0 else -1]:
            found[name].append(seconds(COMMANDS[name]))
    pairs = zip(found["import peft, bem_peft"], found["import peft"], strict=True)
    found["bem_peft beyond peft"] = [a - b for a, b in pairs]
    rows = []
    for name, times in found.items():
        lower, median, upper = statistics.quantiles(times, n=4)
        rows.append({
            "what": name, "median_s": f"{median:.3f}", "lower_s": f"{lower:.3f}", "upper_s": f"{upper:.3f}",
            "rounds": options.rounds,
        })  # fmt: skip
        print(f"{name}: {median:.3f} s [{lower:.3f}, {upper:.3f}]")
    table.append(rows)


if __name__ == "__main__":
    main()
