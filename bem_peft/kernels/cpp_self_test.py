"""A library's first use in a process: each operator once, against its method's formula in float64.

It takes some milliseconds and says whether the library computes rightly with this torch, on this processor and on all
threads. That it does so at every size is held by `tuners.cpp_proof`, where it was built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bem_peft.kernels.cpp_counts import LANES
from bem_peft.kernels.hadamard import hadamard_transform

ROWS, IN, OUT = 75, 48, 37  # rows of more than one part of a parallel loop
SCALING, BOUND, TEMPERATURE = 1.5, 0.4, 0.7
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Case:
    """One method: sizes of its masters, its options in training and inference, its formula (x, y, masters -> y') and
    what its inference reads (masters, dtype -> weights)."""

    masters: tuple[tuple[int, ...], ...]
    training: tuple[Any, ...]
    inference: tuple[Any, ...]
    formula: Callable[..., torch.Tensor]
    packed: Callable[..., Tensors]


def _padded(weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % LANES)).contiguous()


HEADS, RANKS = 6, [1, 4]


def _head_gating(x: torch.Tensor, y: torch.Tensor, *masters: torch.Tensor) -> torch.Tensor:
    a, b, gate, bias = masters
    heads = x.view(len(x), HEADS, -1)
    square = heads.square().sum(2)
    stats = torch.cat(((square / square.sum(1, keepdim=True)).log(), heads.sum(2).square() / square), 1)
    gates = 2.0 * torch.sigmoid((stats @ gate.t() + bias) / TEMPERATURE)
    groups = zip(gates.unbind(1), x.chunk(len(RANKS), 1), a.split(RANKS), strict=True)
    return y + SCALING * torch.cat([g.unsqueeze(1) * (part @ of.t()) for g, part, of in groups], 1) @ b.t()


def _pack_head_gating(dtype: torch.dtype, *masters: torch.Tensor) -> Tensors:
    a, b, gate, bias = masters
    small = _padded(gate.t() / TEMPERATURE), _padded(bias.unsqueeze(0) / TEMPERATURE)
    return a.to(dtype), b.t().to(dtype).contiguous(), *small


RANK, ACTIVE = 4, 2


def _rank_mask(x: torch.Tensor, y: torch.Tensor, *masters: torch.Tensor) -> torch.Tensor:
    a, b, c, m = masters
    z = x @ hadamard_transform(a).t()
    unit = z / torch.linalg.vector_norm(z, dim=1, keepdim=True) * RANK**0.5
    logits = unit @ m.t()
    largest = logits.detach().sort(dim=1, descending=True).values
    soft = torch.sigmoid((logits - largest[:, ACTIVE - 1 : ACTIVE + 1].mean(1, keepdim=True)) / TEMPERATURE)
    mask = (logits >= largest[:, ACTIVE - 1 : ACTIVE]).to(x.dtype) + (soft - soft.detach())
    return y + SCALING * (mask * (1.0 + torch.tanh(unit @ c.t())) * z) @ hadamard_transform(b.t())


def _pack_rank_mask(dtype: torch.dtype, *masters: torch.Tensor) -> Tensors:
    a, b, c, m = masters
    wide = hadamard_transform(a), hadamard_transform(b.t())
    return *(part.to(dtype).contiguous() for part in wide), *(_padded(part.t() * RANK**0.5) for part in (c, m))


def _kronecker(x: torch.Tensor, y: torch.Tensor, *masters: torch.Tensor) -> torch.Tensor:
    u, v, b = masters
    return y + SCALING * x @ torch.kron(u, v).t() @ b.t()


def _pack_kronecker(dtype: torch.dtype, *masters: torch.Tensor) -> Tensors:
    u, v, b = masters
    return u, _padded(v.t()), b.t().to(dtype).contiguous()


def _bounded(weight: torch.Tensor) -> torch.Tensor:
    scaled = weight * SCALING
    return scaled / (1.0 + scaled.abs().sum(1, keepdim=True)) * BOUND


def _film(x: torch.Tensor, y: torch.Tensor, *masters: torch.Tensor) -> torch.Tensor:
    weight, bias, gamma, beta = masters
    rms = y.square().mean(1, keepdim=True).sqrt()
    c = torch.tanh(x @ weight.t() / rms + bias)
    of_gamma, of_beta = (c[:, : part.shape[1]] @ _bounded(part).t() for part in (gamma, beta))
    return y * (1.0 + of_gamma) + of_beta * rms


def _pack_film(dtype: torch.dtype, *masters: torch.Tensor) -> Tensors:
    weight, bias, gamma, beta = masters
    wide = (_bounded(part).t().to(dtype).contiguous() for part in (gamma, beta))
    return weight.to(dtype), _padded(bias.unsqueeze(0)), *wide


CASES = {
    "head_gating": _Case(
        ((5, IN // 2), (OUT, 5), (2, 2 * HEADS), (2,)), (HEADS, RANKS, TEMPERATURE, SCALING), (HEADS, RANKS, SCALING),
        _head_gating, _pack_head_gating,
    ),
    "rank_mask": _Case(
        ((RANK, IN), (OUT, RANK), (RANK, RANK), (RANK, RANK)), (ACTIVE, False, True, TEMPERATURE, SCALING),
        (ACTIVE, False, True, SCALING), _rank_mask, _pack_rank_mask,
    ),
    "kronecker": _Case(((3, 6), (5, 8), (OUT, 15)), (SCALING,), (5, SCALING), _kronecker, _pack_kronecker),
    "film": _Case(
        ((4, IN), (4,), (OUT, 3), (OUT, 4)), (SCALING, BOUND, BOUND, True, True, None, 1e6), (True, True), _film,
        _pack_film,
    ),
}  # fmt: skip


def wrong_operators() -> list[str]:
    """Those that are too far from float64, in their output or a gradient; of the library that is defined now."""
    with torch.inference_mode(False), torch.enable_grad():
        return [name for method, case in CASES.items() for name in _wrong(method, case)]


def _wrong(method: str, case: _Case) -> list[str]:
    operators, generator = torch.ops.bem_peft_cpu, torch.Generator(device="cpu").manual_seed(len(method))
    # eighths, which bfloat16 holds, also where four of them are added: no mask differs
    x, y, gradient, *masters = (
        (torch.randn(size, generator=generator, device="cpu", dtype=torch.float32) * 8).round().clamp(-16, 16) / 8
        for size in ((ROWS, IN), (ROWS, OUT), (ROWS, OUT), *case.masters)
    )
    inputs = [t.requires_grad_() for t in (x, y, *masters)]
    out = getattr(operators, f"{method}_train")(*inputs, *case.training)[0]
    found = (out.detach(), *torch.autograd.grad(out, inputs, gradient))
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = case.formula(*wide)
    reference = (exact.detach(), *torch.autograd.grad(exact, wide, gradient.double()))
    wrong = [f"{method}_train"] if not _is_near(found[:1], reference[:1], 1e-5) else []
    wrong += [f"{method}_backward"] if not _is_near(found[1:], reference[1:], 1e-4) else []
    with torch.no_grad():
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
            x, y = (t.detach().to(dtype) for t in inputs[:2])
            out = getattr(operators, method)(x, y, *case.packed(dtype, *masters), *case.inference)
            if not _is_near((out,), (exact.detach(),), tolerance):
                wrong.append(f"{method} in {dtype}")
    return wrong


def _is_near(found: Tensors, exact: Tensors, tolerance: float) -> bool:
    return all(
        bool((mine.double() - other).abs().max() <= tolerance * other.abs().max())  # NaN is not
        for mine, other in zip(found, exact, strict=True)
    )
