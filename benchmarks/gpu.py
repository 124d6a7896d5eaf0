"""Torch form against Triton form of each operator on a GPU: parity first, then times.

    python benchmarks/gpu.py [--rounds 20] [--rows 1 256 4096] [--prove]

`--prove` ends after the parity and marks the kernels as right on this device with these versions, so that `auto` takes
them there; `bem-peft kernels --prove` is the same for who has the package alone.

We have no GPU: this has never been run on one, and no GPU timing of these kernels exists. Its parts that need none
(sizes, refusal, marks, parity in Triton's interpreter) are tested. Shapes are those of Llama-3.2-1B and Llama-3-8B,
bfloat16, forward and forward + backward. Rounds are interleaved; a cell is the median time in milliseconds over rounds,
and the median ratio with its quartiles, one row of benchmarks/results/gpu.csv. Nothing is timed if one parity case
fails.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from results_table import ResultsTable, add_output, device_name

from bem_peft.kernels.parity import Case, cases, kronecker_case, operators, proof
from bem_peft_cli.kernels import prove

# hidden size, and the factors of the MLP's width that PT3 takes
SHAPES = {"llama-3.2-1b": (2048, (128, 64)), "llama-3-8b": (4096, (128, 112))}
COLUMNS = (
    "model", "operator", "rows", "pass", "torch_ms", "triton_ms", "ratio", "quartile_1", "quartile_3",
)  # fmt: skip


def workloads(rows: list[int]) -> Iterator[tuple[str, Case]]:
    """(model, case) at the sizes of real models, rank 8: one of each operator."""
    for model, (hidden, factors) in SHAPES.items():
        for n in rows:
            for case in cases((n,), (hidden,), (8,)):
                if case.name in ("gate", "mask", "film"):
                    yield model, case
            yield model, kronecker_case({"rows": n, "out": hidden}, n, hidden, factors, (8, 8))


def runner(form: Callable[..., torch.Tensor], given: list[Any], is_training: bool) -> Callable[[], object]:
    if not is_training:
        tensors = [a.detach() if isinstance(a, torch.Tensor) else a for a in given]
        return lambda: form(*tensors)
    leaves = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in given]

    def run() -> None:
        out = form(*leaves)
        out.backward(torch.ones_like(out))
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                leaf.grad = None

    return run


def timed(run: Callable[[], object], repeats: int = 10) -> float:
    """Milliseconds a run, by events on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def measure(device: torch.device, rows: list[int], rounds: int) -> Iterator[dict[str, str]]:
    forms = operators()
    for model, case in workloads(rows):
        torch.manual_seed(0)
        given = case.arguments(torch.bfloat16, device)
        given = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in given]
        for is_training in (False, True):
            runs = [runner(form, given, is_training) for form in (case.reference, forms[case.operator])]
            for run in runs:  # compiles and tunes
                timed(run)
            pairs = [tuple(timed(run) for run in runs) for _ in range(rounds)]
            low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
            medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
            cells = (
                model, case.name, str(case.sizes["rows"]), "training" if is_training else "forward",
                *(f"{v:.4f}" for v in medians), f"{middle:.3f}", f"{low:.3f}", f"{high:.3f}",
            )  # fmt: skip
            yield dict(zip(COLUMNS, cells, strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 256, 4096])
    parser.add_argument("--prove", action="store_true", help="no times: compare, and mark the kernels as right here")
    add_output(parser)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA or ROCm device, and torch sees none.")
    device = torch.device("cuda")
    if args.prove:
        raise SystemExit(0 if prove() else 1)
    _, failed = proof(device)
    if failed:
        lines = "\n".join(map(str, failed[:20]))
        raise SystemExit(f"{len(failed)} parity cases fail, so nothing is timed:\n{lines}")
    table = ResultsTable(args.out, "gpu.csv", COLUMNS, device=device_name("cuda"))
    for row in measure(device, args.rows, args.rounds):
        table.append([row])
        print(
            "{model:13s} {operator:10s} rows {rows:>5s} {pass:9s} torch {torch_ms} ms, triton {triton_ms} ms, "
            "ratio {ratio} [{quartile_1}, {quartile_3}]".format_map(row)
        )


if __name__ == "__main__":
    main()
