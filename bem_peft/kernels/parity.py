"""Cases on which a faster form of an operator is compared with its torch form, output and every gradient.

The reference is the torch form in float64 of the same inputs. A faster form may be at most twice as far from it as the
torch form is in the same dtype, and a unit in the last place of the largest number (four in float32, whose sums are
added in another order) where that is exact by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bem_peft.kernels import backend, film, head_gating, kronecker, rank_mask

Operator = Callable[..., torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One operator at one size. arguments(dtype, device) -> those of `reference`; names: of its tensors."""

    name: str
    operator: str
    sizes: dict[str, int]
    reference: Operator
    arguments: Callable[[torch.dtype, torch.device], list[Any]]
    names: tuple[str, ...]


def _random(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    """Random numbers with NaN before and behind them in memory, and in every second column."""
    around = torch.full((shape[0] + 2, *shape[1:-1], 2 * shape[-1]), float("nan"), dtype=dtype, device=device)
    found = around[1:-1, ..., ::2]
    found.copy_(torch.randn(shape) * scale)
    return found


def cases(rows: tuple[int, ...], widths: tuple[int, ...], ranks: tuple[int, ...]) -> Iterator[Case]:
    """Every operator at every combination of sizes."""
    for n in rows:
        for out in widths:
            for r in ranks:
                sizes = {"rows": n, "out": out, "rank": r}
                yield from _low_rank(sizes, n, out, r)
                yield from _films(sizes, n, out, r)
            for (p, q), (pr, qr) in (((6, 5), (3, 1)), ((17, 9), (5, 9)), ((48, 32), (4, 7))):
                yield kronecker_case({"rows": n, "out": out, "u_dim": p, "v_dim": q}, n, out, (p, q), (pr, qr))


def kronecker_case(sizes: dict[str, int], n: int, out: int, dims: tuple[int, int], ranks: tuple[int, int]) -> Case:
    """x (n, dims[0] * dims[1]) -> y' (n, out), with factors of `ranks` rows."""
    (p, q), (pr, qr) = dims, ranks

    def arguments(dtype: torch.dtype, device: torch.device) -> list[Any]:
        def t(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return _random(*shape, dtype=dtype, device=device, scale=scale)

        return [
            t(n, p * q), t(n, out), t(pr, p, scale=p**-0.5), t(qr, q, scale=q**-0.5), t(pr * qr, out, scale=0.5), 1.3
        ]  # fmt: skip

    return Case("kronecker", "kronecker", sizes, kronecker.kronecker_update, arguments, ("x", "y", "u", "v", "b_t"))


def _low_rank(sizes: dict[str, int], n: int, out: int, r: int) -> Iterator[Case]:
    def gated(dtype: torch.dtype, device: torch.device) -> list[Any]:
        low = torch.randn(n, 2, r).to(device=device, dtype=dtype)
        y, b_t = (_random(*shape, dtype=dtype, device=device) for shape in ((n, out), (2 * r, out)))
        return [y, low, torch.rand(n, 2).to(device), b_t, 1.3]

    yield Case("gate", "gate", sizes, head_gating.gated_update, gated, ("y", "low", "gate", "b_t"))
    for name, has_gate, is_task in (
        ("mask", True, False),
        ("mask, no gate", False, False),
        ("mask of a task", True, True),
    ):

        def masked(
            dtype: torch.dtype, device: torch.device, has_gate: bool = has_gate, is_task: bool = is_task
        ) -> list[Any]:
            y, z, b_t = (_random(*shape, dtype=dtype, device=device) for shape in ((n, out), (n, r), (r, out)))
            logits = torch.randn(1 if is_task else n, r).round(decimals=1).to(device)  # with ties
            factor = torch.tanh(torch.randn(n, r)).to(device) if has_gate else None
            return [y, z, factor, logits, b_t, max(1, r // 2), 1.3, 0.7, True]

        yield Case(name, "mask", sizes, rank_mask.masked_update, masked, ("y", "z", "gate", "logits", "b_t"))


def _films(sizes: dict[str, int], n: int, out: int, units: int) -> Iterator[Case]:
    for name, has_gamma, has_beta, is_relative, is_rms in (
        ("film", True, True, True, True), ("film, absolute", True, True, False, False),
        ("film, gamma", True, False, True, True), ("film, beta", False, True, False, True),
        ("film, absolute beta", True, True, True, False),
    ):  # fmt: skip

        def arguments(
            dtype: torch.dtype, device: torch.device, has_gamma: bool = has_gamma, has_beta: bool = has_beta,
            is_relative: bool = is_relative, is_rms: bool = is_rms,
        ) -> list[Any]:  # fmt: skip
            y, gamma, beta = (
                _random(*s, dtype=dtype, device=device) for s in ((n, out), (max(1, units - 1), out), (units, out))
            )
            u, bias = (torch.randn(*s).to(device=device, dtype=dtype) for s in ((n, units), (units,)))
            given = [
                y,
                u,
                bias if is_relative else None,
                0.1 * gamma if has_gamma else None,
                beta if has_beta else None,
            ]
            return [*given, is_relative, is_rms]

        yield Case(name, "film", sizes, film.film_update, arguments, ("y", "u", "bias", "gamma_t", "beta_t"))


def operators() -> dict[str, Operator]:
    """Triton's form of each operator, for inputs with gradients. Raises ImportError where Triton is not installed."""
    from bem_peft.kernels import triton_film, triton_head_gating, triton_kronecker, triton_rank_mask

    return {
        "kronecker": triton_kronecker.kronecker_update, "gate": triton_head_gating.gated_update,
        "mask": triton_rank_mask.masked_update, "film": triton_film.film_update,
    }  # fmt: skip


def _run(form: Operator, arguments: list[Any], grad: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of the tensors among the arguments."""
    given = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    out = form(*given)
    out.backward(grad)
    return [out.detach(), *(a.grad for a in given if isinstance(a, torch.Tensor) and a.grad is not None)]


@dataclass(frozen=True)
class Deviation:
    """Largest errors against float64 of one tensor: of the torch form, of the faster one, and what that may be."""

    case: Case
    dtype: torch.dtype
    tensor: str
    torch_error: float
    error: float
    allowed: float

    @property
    def is_kept(self) -> bool:
        return self.error <= self.allowed  # NaN is not

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.case.sizes.items())
        return (
            f"{self.case.name} ({sizes}), {self.dtype}, {self.tensor}: {self.error:.3g} from float64, "
            f"{self.allowed:.3g} allowed"
        )


PROOF_SIZES = (1, 7, 33), (5, 65), (3, 12)  # rows, channels, ranks


def proof(device: torch.device) -> tuple[int, list[Deviation]]:
    """How many outputs and gradients of Triton's kernels were compared on `device`, and those too far from float64."""
    count = 0
    broken: list[Deviation] = []
    for case in cases(*PROOF_SIZES):
        for dtype in DTYPES:
            found = deviations(case, dtype, device)
            count, broken = count + len(found), broken + [d for d in found if not d.is_kept]
    return count, broken


DRAWS = 3  # of inputs whose error by the torch form is taken: one draw of a tensor of a few numbers may be luck


def deviations(case: Case, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> list[Deviation]:
    """Of the output and of every gradient."""
    own: list[list[float]] = []
    for draw in reversed(range(DRAWS)):
        torch.manual_seed(seed + draw)
        arguments = case.arguments(dtype, device)
        grad = torch.randn(case.sizes["rows"], case.sizes["out"]).to(device=device, dtype=dtype)
        with backend.torch_forms():
            wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
            exact, plain = _run(case.reference, wide, grad.double()), _run(case.reference, arguments, grad)
        own.append([_error(p, e) for p, e in zip(plain, exact, strict=True)])
    found = _run(operators()[case.operator], arguments, grad)  # of the last draw, as `exact` is
    tensors = [name for name, a in zip(case.names, arguments, strict=False) if isinstance(a, torch.Tensor)]
    names = ["output", *(f"d{name}" for name in tensors)]
    lines = []
    for name, e, f, errors in zip(names, exact, found, zip(*own, strict=True), strict=True):
        least = (4.0 if dtype is torch.float32 else 1.0) * torch.finfo(dtype).eps * max(1e-3, float(e.abs().max()))
        lines.append(Deviation(case, dtype, name, max(errors), _error(f, e), 2.0 * max(errors) + least))
    return lines


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).abs().max())
