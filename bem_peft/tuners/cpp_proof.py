"""The C++ operators against the torch forms in float64: output and every gradient of each method, at odd sizes.

An operator may be at most twice as far from float64 as the torch form is in its own dtype, and some units in the last
place of the largest number where that is exact by chance. `bem-peft kernels --build` asks this once, in a process of
its own (`proof`), and `make wheel` of each library; `tests/kernels` hold the operators to formulas that are written out
once more, at many more sizes.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bem_peft.kernels import backend, cpp
from bem_peft.tuners.base.adapter import Adapter, SiteShape
from bem_peft.tuners.base.forms import MANY, PACKED
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.pt1_head_gating import HeadGroupGatingAdapter, HeadGroupGatingConfig
from bem_peft.tuners.pt2_rank_mask import DynamicRankMaskAdapter, DynamicRankMaskConfig
from bem_peft.tuners.pt3_kronecker import KroneckerAdapter, KroneckerConfig
from bem_peft.tuners.pt4_film import ResidualFiLMAdapter, ResidualFiLMConfig

ROWS, OUT = (1, 9, 33), (5, 200)
# (what, class, config, in)
CASES: tuple[tuple[str, type[Adapter], Any, int], ...] = (
    ("PT1", HeadGroupGatingAdapter, HeadGroupGatingConfig(num_groups=3, rank_per_group=4, num_heads=3), 57),
    ("PT1, uneven ranks", HeadGroupGatingAdapter,
     HeadGroupGatingConfig(num_groups=2, rank_per_group=[1, 18], num_heads=18, gate_temperature=0.5), 306),
    ("PT2", DynamicRankMaskAdapter, DynamicRankMaskConfig(total_rank=8, active_rank=3), 65),
    ("PT2, no gate", DynamicRankMaskAdapter,
     DynamicRankMaskConfig(total_rank=19, active_rank=18, value_gate=False, use_hadamard_path=False), 33),
    ("PT2, a task's mask", DynamicRankMaskAdapter,
     DynamicRankMaskConfig(total_rank=8, active_rank=5, mask_scope="task"), 65),
    ("PT2, blocks", DynamicRankMaskAdapter, DynamicRankMaskConfig(total_rank=16, active_rank=7, num_blocks=4), 84),
    ("PT2, blocks that are not mixed", DynamicRankMaskAdapter,
     DynamicRankMaskConfig(total_rank=21, active_rank=2, num_blocks=3, use_hadamard_path=False), 99),
    ("PT3", KroneckerAdapter, KroneckerConfig(u_rank=5, v_rank=3, init_method="random"), 221),
    ("PT4", ResidualFiLMAdapter, ResidualFiLMConfig(gamma_dim=3, beta_dim=17), 65),
    ("PT4, beta alone", ResidualFiLMAdapter, ResidualFiLMConfig(clamp_range=0.0, beta_unit="absolute"), 33),
)  # fmt: skip


@dataclass(frozen=True)
class Deviation:
    """Largest errors of one tensor against float64, over all sizes: of the torch form, of the operator, the allowed."""

    case: str
    dtype: torch.dtype
    tensor: str
    torch_error: float
    error: float
    largest: float  # number in float64
    is_float32: bool  # the tensor itself

    @property
    def allowed(self) -> float:
        units, dtype = (16.0, torch.float32) if self.is_float32 else (0.51, self.dtype)
        return 2.0 * self.torch_error + units * torch.finfo(dtype).eps * self.largest + 1e-6

    @property
    def is_kept(self) -> bool:
        return self.error <= self.allowed  # NaN is not

    def __str__(self) -> str:
        return (
            f"{self.case}, {self.dtype}, {self.tensor}: {self.error:.3g} from float64, allowed {self.allowed:.3g} "
            f"(the torch form {self.torch_error:.3g})"
        )


@dataclass(frozen=True)
class Proof:
    """How many outputs and gradients were compared, and which are too far from float64."""

    compared: int
    broken: list[str]


def proof(library: Path) -> Proof:
    """Compare the operators of a library with the torch forms, in a process of its own.

    Raises:
        BuildError: the library cannot be loaded, or its process ended otherwise.
    """
    environment = {**os.environ, "BEM_PEFT_KERNELS": "torch"}
    command = [sys.executable, "-W", "ignore", "-m", "bem_peft.tuners.cpp_proof", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise cpp.BuildError(f"the proof of {library} ended with {done.returncode}: {last}")
    return Proof(**json.loads(lines[-1]))


class _Wide(TorchFunctionMode):
    """Float64 stays float64: what a form rounds to half precision is rounded, with the gradient of what it was."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtypes = [a for a in args[1:] if isinstance(a, torch.dtype)]
        is_narrowed = func is torch.Tensor.float or (func is torch.Tensor.to and len(dtypes) == 1)
        if not (is_narrowed and args[0].dtype is torch.float64):
            return func(*args, **(kwargs or {}))
        if not dtypes or dtypes[0] in (torch.float32, torch.float64):
            return args[0]
        held = args[0].detach()
        return args[0] + (held.to(dtypes[0]).double() - held)


def deviations() -> list[Deviation]:
    """One of each case, dtype and tensor: of all sizes, as the torch form may be right by chance in a single number.

    Raises:
        BuildError: the operators cannot be built.
    """
    cpp.build()
    found = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), backend.torch_forms():
        for number, (what, cls, config, width) in enumerate(CASES):
            for dtype in cpp.DTYPES:
                torch.manual_seed(number)
                sizes: dict[str, list[Deviation]] = {}
                for out in OUT:
                    with warnings.catch_warnings(action="ignore", category=UserWarning):  # groups that do not divide
                        adapter = _made(cls, config, width, out)
                    for rows in ROWS:
                        for one in _of(what, adapter, rows, width, out, dtype):
                            sizes.setdefault(one.tensor, []).append(one)
                found += [_largest(of_one) for of_one in sizes.values()]
    return found


def _largest(sizes: list[Deviation]) -> Deviation:
    def most(values: list[float]) -> float:
        return float(torch.tensor(values, dtype=torch.float64).max())  # NaN where one is

    return replace(
        sizes[0],
        torch_error=most([one.torch_error for one in sizes]),
        error=most([one.error for one in sizes]),
        largest=most([one.largest for one in sizes]),
    )


def _made(cls: type[Adapter], config: Any, width: int, out: int) -> Adapter:
    site = SiteShape("site", width, out, getattr(config, "num_heads", None))
    adapter = cls(config, site, CallState())
    adapter.reset_parameters(False, site)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return adapter


def _of(case: str, adapter: Adapter, rows: int, width: int, out: int, dtype: torch.dtype) -> Iterator[Deviation]:
    x, y, gradient = torch.randn(rows, width), torch.randn(rows, out) * 3.0, torch.randn(rows, out)
    x, y, gradient = x.to(dtype), y.to(dtype), gradient.to(dtype)
    exact: Any = copy.deepcopy(adapter).double()
    with _Wide():
        reference = _trained(exact, x.double(), y.double(), gradient.double(), dtype, is_operator=False)
    plain, found = (_trained(adapter, x, y, gradient, dtype, is_operator=is_cpp) for is_cpp in (False, True))
    yield from _compared(case, dtype, reference, plain, found)
    adapter.eval()
    with torch.no_grad():
        plain = {"decoded": adapter.transform(x, y, *adapter.weights(dtype, MANY))}
        found = {"decoded": adapter.operator(x, y, *adapter.weights(dtype, PACKED))}
    yield from _compared(case, dtype, {"decoded": reference["output"]}, plain, found)


def _trained(
    adapter: Adapter, x: torch.Tensor, y: torch.Tensor, gradient: torch.Tensor, dtype: torch.dtype, is_operator: bool
) -> dict[str, torch.Tensor]:
    """The output, and the gradients of x, y and the parameters, by name."""
    adapter.train()
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    out = adapter.training_operator(x, y) if is_operator else adapter.transform(x, y, *adapter.derive(dtype))
    names = ["x", "y", *(name for name, _ in adapter.named_parameters())]
    found = torch.autograd.grad(out, [x, y, *adapter.parameters()], gradient)
    return {"output": out.detach(), **dict(zip(names, found, strict=True))}


def _compared(
    case: str, dtype: torch.dtype, exact: dict[str, torch.Tensor], plain: dict[str, torch.Tensor],
    found: dict[str, torch.Tensor],
) -> Iterator[Deviation]:  # fmt: skip
    for name, reference in exact.items():
        own, error = (float((part[name].double() - reference).abs().max()) for part in (plain, found))
        largest, is_float32 = float(reference.abs().max()), found[name].dtype is torch.float32
        yield Deviation(case, dtype, name, own, error, largest, is_float32)


def _main() -> None:
    cpp.load(Path(sys.argv[1]))
    found = deviations()
    print(json.dumps({"compared": len(found), "broken": [str(one) for one in found if not one.is_kept]}))


if __name__ == "__main__":
    _main()
