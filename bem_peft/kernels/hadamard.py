r"""The orthonormal Walsh-Hadamard transform along the first axis, as a product: two launches forward, one backward.

    H[i, j] = (-1)^popcount(i & j) / sqrt(R),   H = H^T = H^-1

log2(R) steps of additions need fewer operations and, forward and backward, some twelve launches each. H is made where
it is needed: R^2 numbers cost less than knowing that kept ones are of this device, dtype, trace and mode.

Source: Fino and Algazi, Unified matrix treatment of the fast Walsh-Hadamard transform, IEEE Trans. Computers, 1976.
"""

from __future__ import annotations

import torch

BITS = 6
# bit v is the parity of v's bits, for v below 64
PARITIES = sum((v.bit_count() & 1) << v for v in range(1 << BITS))


def is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


@torch.no_grad()
def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """H (size, size).

    Raises:
        ValueError: `size` is not a power of two.
    """
    if not is_power_of_two(size):
        raise ValueError(f"the Hadamard transform needs a power of two on its axis, got {size}")
    index = torch.arange(size, device=device)
    common = index.unsqueeze(1) & index
    bits = (size - 1).bit_length()
    while bits > BITS:  # another number of the same parity, of fewer bits
        common = (common >> BITS) ^ (common & ((1 << BITS) - 1))
        bits = max(BITS, bits - BITS)
    is_odd = torch.bitwise_right_shift(PARITIES, common) & 1
    root: float = size**-0.5
    return is_odd.to(dtype) * (-2.0 * root) + root


def hadamard_transform(x: torch.Tensor) -> torch.Tensor:
    """H applied to the first axis.

    Args:
        x: (R, ...), R a power of two.

    Returns:
        (R, ...), same dtype.

    Raises:
        ValueError: R is not a power of two.
    """
    return torch.mm(hadamard_matrix(x.shape[0], x.dtype, x.device), x.flatten(1)).view(x.shape)
