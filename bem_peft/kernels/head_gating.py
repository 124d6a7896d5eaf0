r"""The gated update:  y' = y + s sum_g gate_g B_g low_g."""

from __future__ import annotations

import torch

from bem_peft.kernels import backend


def gated_update(
    y: torch.Tensor,
    low: torch.Tensor,
    gate: torch.Tensor,
    b_t: torch.Tensor,
    scaling: float,
    slots: list[int] | None = None,
) -> torch.Tensor:
    """y' (N, out) in the dtype of y. The gate is rounded to the dtype of `low`.

    Args:
        y: (N, out). low: (N, G, r). gate: (N, G).
        b_t: (G r, out), or (len(slots), out) where some groups have fewer ranks than r.
        slots: the columns of `low`, as (N, G r), that are theirs; None: all.
    """
    if slots is None and backend.takes_triton(y):
        from bem_peft.kernels import triton_head_gating

        return triton_head_gating.gated_update(y, low, gate, b_t, scaling)
    if gate.dtype is not low.dtype:
        gate = gate.to(low.dtype)
    gated = (gate.unsqueeze(-1) * low).flatten(1)  # in this order the product is laid out as the gate is
    return torch.addmm(y, gated if slots is None else gated[:, slots], b_t, alpha=scaling)
