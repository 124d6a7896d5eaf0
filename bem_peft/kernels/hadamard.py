r"""The orthonormal Walsh-Hadamard transform along one axis, in log2(R) steps of additions.

    H_1 = [1],  H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2),  H = H^T = H^-1

Source: Fino and Algazi, Unified matrix treatment of the fast Walsh-Hadamard transform, IEEE Trans. Computers, 1976.
"""

from __future__ import annotations

import torch


def is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


def hadamard_transform(x: torch.Tensor) -> torch.Tensor:
    """H applied to the first axis.

    Args:
        x: (R, ...), R a power of two.

    Returns:
        (R, ...), same dtype.

    Raises:
        ValueError: R is not a power of two.
    """
    size = x.shape[0]
    if not is_power_of_two(size):
        raise ValueError(f"the Hadamard transform needs a power of two on its axis, got {size}")
    shape, half = x.shape, 1
    while half < size:
        low, high = x.reshape(size // (2 * half), 2, half, -1).unbind(1)
        x = torch.stack((low + high, low - high), dim=1)
        half *= 2
    return x.reshape(shape) * size**-0.5


def hadamard_basis(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H A and B H of A (..., R, in) and B (..., out, R), in one transform where both are stacks or neither is."""
    if a.dim() != b.dim():
        return (
            hadamard_transform(a.movedim(-2, 0)).movedim(0, -2),
            hadamard_transform(b.movedim(-1, 0)).movedim(0, -1),
        )
    both = torch.cat((a, b.mT), dim=-1).movedim(-2, 0)
    read, written = hadamard_transform(both).movedim(0, -2).split((a.shape[-1], b.shape[-2]), dim=-1)
    return read, written.mT
