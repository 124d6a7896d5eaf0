"""The parity table of the Triton kernels: operator x dtype x tensor, the largest errors against float64 over odd sizes.

    TRITON_INTERPRET=1 python benchmarks/kernel_parity.py        # on a CPU, in Triton's interpreter
    python benchmarks/kernel_parity.py --device cuda             # on a GPU

Written to benchmarks/results/kernel_parity.csv. Exits with 1 where an error is more than twice the torch form's own.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

from bem_peft.kernels.parity import DTYPES, cases, deviations


def table(device: torch.device) -> list[list[str]]:
    """Rows (operator, dtype, tensor, torch's error, Triton's error, verdict), the worst of all sizes."""
    worst: dict[tuple[str, str, str], tuple[float, float, bool]] = {}
    for case in cases((1, 7, 33), (5, 65), (1, 3, 12)):
        for dtype in DTYPES:
            for found in deviations(case, dtype, device):
                key = (case.name, str(dtype)[6:], found.tensor)
                own, error, is_kept = worst.get(key, (0.0, 0.0, True))
                worst[key] = (max(own, found.torch_error), max(error, found.error), is_kept and found.is_kept)
    return [
        [*key, f"{own:.3g}", f"{error:.3g}", "kept" if is_kept else "BROKEN"]
        for key, (own, error, is_kept) in worst.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = table(torch.device(args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "kernel_parity.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("operator", "dtype", "tensor", "torch_error", "triton_error", "twice_torchs_own"))
        writer.writerows(rows)
    for row in rows:
        print("{:16s} {:9s} {:10s} torch {:>9s}  triton {:>9s}  {}".format(*row))
    broken = sum(row[-1] != "kept" for row in rows)
    print(f"{len(rows)} tensors, {broken} broken")
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
