"""The methods as one C++ operator a site, for inference on a CPU; built by torch's own tools on first use.

The torch forms in the methods' files are the specification (`tests/kernels`). An operator takes rows in float32 or
bfloat16, with wide weights of the same dtype, and sums in float32; small weights are float32, padded to 16 columns.
Each has a form that writes into y (`film_`), for a y that nobody else holds.

Building takes half a minute, a C++ compiler (g++ or clang++) and ninja, once; torch keeps the result in its folder of
extensions (`TORCH_EXTENSIONS_DIR`).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

SOURCE = Path(__file__).with_name("csrc") / "operators.cpp"
LANES = 16
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def build() -> Any:
    """The operators, `torch.ops.bem_peft_cpu`, built if they are not yet.

    Raises:
        RuntimeError: no compiler or no ninja, or the compiler's own error.
    """
    from torch.utils.cpp_extension import load

    load(
        name="bem_peft_cpu",
        sources=[str(SOURCE)],
        extra_cflags=["-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno"],
        is_python_module=False,
    )
    formulas = {
        "film": _film_flops, "kronecker": _kronecker_flops, "rank_mask": _rank_mask_flops,
        "head_gating": _head_gating_flops,
    }  # fmt: skip
    for name, count in formulas.items():
        for form, fake in ((name, _like_y), (f"{name}_", _y_itself)):
            torch.library.register_fake(f"bem_peft_cpu::{form}", fake)
            register_flop_formula(getattr(torch.ops.bem_peft_cpu, form))(count)
    return torch.ops.bem_peft_cpu


def padded(weight: torch.Tensor) -> torch.Tensor:
    """(n, r) -> contiguous float32 (n, r rounded up to 16), zeros in the new columns."""
    return torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % LANES)).contiguous()


def _y_itself(x: torch.Tensor, y: torch.Tensor, *rest: Any) -> torch.Tensor:
    return y


def _like_y(x: torch.Tensor, y: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


# FLOPs of the products, without the padding: what the torch forms are counted as


def _rows(y: Any) -> int:
    return math.prod(y[:-1])


def _film_flops(x: Any, y: Any, w: Any, bias: Any, gamma: Any, beta: Any, *rest: Any, **options: Any) -> int:
    return 2 * _rows(y) * (x[-1] * w[0] + y[-1] * (gamma[0] + beta[0]))


def _kronecker_flops(x: Any, y: Any, u: Any, v_t: Any, b: Any, v_rank: int, *rest: Any, **options: Any) -> int:
    return 2 * _rows(y) * (u[0] * x[-1] + u[0] * v_t[0] * v_rank + b[0] * y[-1])


def _rank_mask_flops(x: Any, y: Any, a_t: Any, b: Any, gate_t: Any, mask_t: Any, active: int, is_task_mask: bool,
                     *rest: Any, **options: Any) -> int:  # fmt: skip
    rank = b[0]
    control = (rank if gate_t[0] else 0) + (0 if is_task_mask else rank)
    return 2 * _rows(y) * (rank * (x[-1] + y[-1]) + rank * control)


def _head_gating_flops(
    x: Any, y: Any, a_t: Any, b: Any, gate_w: Any, bias: Any, heads: int, ranks: Any, *rest: Any, **options: Any
) -> int:
    return 2 * _rows(y) * (x[-1] * max(ranks) + b[0] * y[-1] + gate_w[0] * len(ranks))
