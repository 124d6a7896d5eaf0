"""The parity tables of the kernels: operator x dtype x tensor, the largest errors against float64 over odd sizes.

    TRITON_INTERPRET=1 python benchmarks/kernel_parity.py        # Triton on a CPU, in its interpreter
    python benchmarks/kernel_parity.py --device cuda             # on a GPU
    python benchmarks/kernel_parity.py --form cpp                # the C++ operators, method by method; wants the tests

Written to benchmarks/results/kernel_parity.csv and cpp_parity.csv. Exits with 1 where an error is more than twice the
torch form's own.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
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


def cpp_table() -> list[list[str]]:
    """As `table`, for whole methods with a backward, on the cases of tests/kernels/test_cpp_training.py."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.kernels.test_cpp_operators import CASES
    from tests.kernels.test_cpp_training import deviations as of_method

    warnings.simplefilter("ignore", UserWarning)  # num_groups that were moved to a divisor
    worst: dict[tuple[str, str, str], tuple[float, float, bool]] = {}
    sizes = [(name, width, rows, out) for name, case in CASES.items() for width in case[2]
             for rows in (1, 7, 33, 130) for out in (5, 65, 200)]  # fmt: skip
    for name, width, rows, out in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            for tensor, own, error, allowed in of_method(name, width, rows, out, dtype):
                key = (name, str(dtype)[6:], tensor if tensor == "output" else f"d{tensor}")
                before = worst.get(key, (0.0, 0.0, True))
                worst[key] = (max(before[0], own), max(before[1], error), before[2] and error <= allowed)
    return [
        [*key, f"{own:.3g}", f"{error:.3g}", "kept" if is_kept else "BROKEN"]
        for key, (own, error, is_kept) in worst.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--form", default="triton", choices=["triton", "cpp"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = cpp_table() if args.form == "cpp" else table(torch.device(args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    name = "cpp_parity.csv" if args.form == "cpp" else "kernel_parity.csv"
    with (args.out / name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("operator", "dtype", "tensor", "torch_error", f"{args.form}_error", "twice_torchs_own"))
        writer.writerows(rows)
    for row in rows:
        print("{:16s} {:9s} {:18s} torch {:>9s}  {} {:>9s}  {}".format(*row[:4], args.form, *row[4:]))
    broken = sum(row[-1] != "kept" for row in rows)
    print(f"{len(rows)} tensors, {broken} broken")
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
