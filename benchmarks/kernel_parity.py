"""The parity tables of the kernels: operator x dtype x tensor, the largest errors against float64 over odd sizes.

    TRITON_INTERPRET=1 python benchmarks/kernel_parity.py        # Triton on a CPU, in its interpreter
    python benchmarks/kernel_parity.py --device cuda             # on a GPU
    python benchmarks/kernel_parity.py --form cpp                # the C++ operators, method by method; wants the tests

Adds rows to benchmarks/results/kernel_parity.csv and cpp_parity.csv. Exits with 1 where an error is more than twice the
torch form's own.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from results_table import ResultsTable, add_output, device_name

from bem_peft.kernels import cpp
from bem_peft.kernels.parity import DTYPES, cases, deviations

Found = tuple[str, torch.dtype, str, float, float, bool]  # operator, dtype, tensor, torch's error, the form's, verdict


def of_triton(device: torch.device) -> Iterator[Found]:
    for case in cases((1, 7, 33), (5, 65), (1, 3, 12)):
        for dtype in DTYPES:
            for found in deviations(case, dtype, device):
                yield case.name, dtype, found.tensor, found.torch_error, found.error, found.is_kept


def of_cpp() -> Iterator[Found]:
    """Of whole methods with a backward, on the cases of tests/kernels/test_cpp_training.py."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.kernels.test_cpp_operators import CASES
    from tests.kernels.test_cpp_training import deviations as of_method

    cpp.build()
    warnings.simplefilter("ignore", UserWarning)  # num_groups that were moved to a divisor
    sizes = [(name, width, rows, out) for name, case in CASES.items() for width in case[2]
             for rows in (1, 7, 33, 130) for out in (5, 65, 200)]  # fmt: skip
    for name, width, rows, out in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            for tensor, own, error, allowed in of_method(name, width, rows, out, dtype):
                yield name, dtype, tensor if tensor == "output" else f"d{tensor}", own, error, error <= allowed


def worst(form: str, found: Iterator[Found]) -> list[dict[str, str]]:
    """A row for each operator, dtype and tensor: the largest errors of all sizes."""
    errors: dict[tuple[str, str, str], tuple[float, float, bool]] = {}
    for operator, dtype, tensor, own, error, is_kept in found:
        key = (operator, str(dtype)[6:], tensor)
        before = errors.get(key, (0.0, 0.0, True))
        errors[key] = (max(before[0], own), max(before[1], error), before[2] and is_kept)
    return [
        dict(zip(columns(form), (*key, f"{own:.3g}", f"{error:.3g}", "kept" if kept else "BROKEN"), strict=True))
        for key, (own, error, kept) in errors.items()
    ]


def columns(form: str) -> tuple[str, ...]:
    return "operator", "dtype", "tensor", "torch_error", f"{form}_error", "twice_torchs_own"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--form", default="triton", choices=["triton", "cpp"])
    add_output(parser)
    args = parser.parse_args()
    name = "cpp_parity.csv" if args.form == "cpp" else "kernel_parity.csv"
    where = device_name(args.device)
    if args.form == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        where += ", Triton's interpreter"
    depends_on = ("tests/kernels",) if args.form == "cpp" else ()
    table = ResultsTable(args.out, name, columns(args.form), device=where, depends_on=depends_on)
    rows = worst(args.form, of_cpp() if args.form == "cpp" else of_triton(torch.device(args.device)))
    table.append(rows)
    for row in rows:
        operator, dtype, tensor, own, error, verdict = row.values()
        print(f"{operator:16s} {dtype:9s} {tensor:18s} torch {own:>9s}  {args.form} {error:>9s}  {verdict}")
    broken = sum(row["twice_torchs_own"] != "kept" for row in rows)
    print(f"{len(rows)} tensors, {broken} broken")
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
