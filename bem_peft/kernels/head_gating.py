r"""The gated update:  y' = y + s sum_g gate_g B_g low_g."""

from __future__ import annotations

import torch


def gated_update(
    y: torch.Tensor, low: torch.Tensor, gate: torch.Tensor, b_t: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Args: y (N, out), low (N, G, r), gate (N, G), b_t (G r, out). Returns: (N, out) in the dtype of y.

    The gate is rounded to the dtype of `low`.
    """
    if gate.dtype is not low.dtype:
        gate = gate.to(low.dtype)
    return torch.addmm(y, (low * gate.unsqueeze(-1)).flatten(1), b_t, alpha=scaling)
