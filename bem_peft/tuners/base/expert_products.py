"""Products of rows with the weights of each row's own expert: what stands for a derived weight in a formula.

A formula multiplies rows by small matrices. For adapters of each expert such a matrix is a stack (E, a, b), and an
`ExpertMatrix` stands in its place, which torch's functions take for a tensor: a product with it takes for each row its
own expert's. Three ways, by what the rows are:

    picked    a few rows: one batched product with the matrices of each row; under a compiler also many
    grouped   many bfloat16 rows on a GPU or under a compiler: one grouped product, rows sorted by expert
    in turn   other rows: a product for each expert that has some
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

PICKED_ROWS = 16  # up to so many the matrices of each row are picked, on a CPU, where copying them costs most
PICKED_ELSEWHERE = 64
ALIGNMENT = 16  # bytes, of the rows of grouped products


class ExpertRows:
    """Which expert each row belongs to.

    Args:
        ids: (N,). Sorted, unless they are few (`is_few`).
        experts: E.
        has_picked: the stacks hold a matrix for each row, not for each expert.
    """

    def __init__(self, ids: torch.Tensor, experts: int, has_picked: bool = False) -> None:
        self.ids, self.experts, self.has_picked = ids, experts, has_picked
        self.is_few = is_few(ids)
        self._counts: list[int] | None = None

    def counts(self) -> list[int]:
        """Rows of each expert; read from the device once."""
        if self._counts is None:
            self._counts = self.ids.bincount(minlength=self.experts).tolist()
        return self._counts

    def ends(self, times: int) -> torch.Tensor:
        """(E,) int32: where the rows of each expert end, of an x that has so many rows for one."""
        experts = torch.arange(1, self.experts + 1, device=self.ids.device, dtype=self.ids.dtype)
        return (torch.searchsorted(self.ids, experts) * times).to(torch.int32)


class ExpertMatrix:
    """A stack (E, a, b) that stands for a matrix (a, b): rows times it are rows times their own expert's."""

    def __init__(self, stack: torch.Tensor, rows: ExpertRows, dtype: torch.dtype | None = None) -> None:
        self.stack, self.rows = stack, rows
        self.shape, self.dtype, self.device = stack.shape[1:], dtype or stack.dtype, stack.device

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        product = PRODUCTS.get(func)
        if product is None:
            raise NotImplementedError(f"{getattr(func, '__name__', func)} of a matrix of each expert")
        return product(*args, **(kwargs or {}))

    def to(self, dtype: torch.dtype) -> ExpertMatrix:
        """Only what rows take is converted, in a product."""
        return ExpertMatrix(self.stack, self.rows, dtype)

    def picked(self) -> torch.Tensor:
        """(N, a, b): the matrix of each row."""
        found = self.stack
        if not self.rows.has_picked:  # in the order of its storage: several times as fast on a CPU
            is_turned = found.stride(-1) != 1 and found.stride(-2) == 1
            found = (found.mT if is_turned else found).index_select(0, self.rows.ids)
            found = found.mT if is_turned else found
        return found.to(self.dtype)

    def expand(self, *sizes: int) -> torch.Tensor:
        """As `Tensor.expand(N, a, b)`: each row's own."""
        picked = self.picked()
        assert sizes == picked.shape
        return picked

    def product(self, x: torch.Tensor, added: torch.Tensor | None = None, alpha: float = 1.0) -> torch.Tensor:
        """added (M, b) + alpha x times each row's own, x (M, a).

        M is N, a multiple of N (so many rows of x for one), or 1 (one for all).
        """
        rows = self.rows.ids.shape[0]
        if x.shape[0] < rows:
            x = x.expand(rows, -1)
        times = x.shape[0] // rows
        if not self.rows.is_few and takes_grouped(x):
            return _sum(added, grouped_product(x, self.stack.to(self.dtype), self.rows.ends(times)), alpha)
        if self.rows.is_few or torch.compiler.is_compiling():  # counting rows by values would break the graph
            return _sum(added, torch.bmm(x.reshape(rows, times, -1), self.picked()).view(x.shape[0], -1), alpha)
        counts = [times * count for count in self.rows.counts()]
        parts, matrices = x.split(counts), (own.to(self.dtype) for own in self.stack.unbind(0))
        if added is None:
            return torch.cat([torch.mm(x, own) for x, own in zip(parts, matrices, strict=True) if x.shape[0]])
        of_each = zip(added.split(counts), parts, matrices, strict=True)
        return torch.cat([torch.addmm(y, x, own, alpha=alpha) for y, x, own in of_each if x.shape[0]])


def takes_grouped(x: torch.Tensor) -> bool:
    """Whether many rows take torch's grouped product, which counts no rows on the host."""
    if x.dtype is not torch.bfloat16 or not hasattr(nn.functional, "grouped_mm"):
        return False
    return x.is_cuda or torch.compiler.is_compiling()


def grouped_product(x: torch.Tensor, stack: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x (M, a), rows sorted by expert, times stack (E, a, b); `ends` (E,) where the rows of each expert end."""
    width, step = stack.shape[2], ALIGNMENT // x.element_size()
    inner = -stack.shape[1] % step
    if inner or width % step:
        stack = nn.functional.pad(stack, (0, -width % step, 0, inner))
        x = nn.functional.pad(x, (0, inner))
    found: torch.Tensor = nn.functional.grouped_mm(x.contiguous(), stack.contiguous(), offs=ends)
    return found[:, :width]


def is_few(ids: torch.Tensor) -> bool:
    return ids.shape[0] <= (PICKED_ROWS if ids.device.type == "cpu" else PICKED_ELSEWHERE)


def of_each(weights: Sequence[torch.Tensor], rows: ExpertRows) -> tuple[Any, ...]:
    """The derived weights of a formula, those that are stacks as each row's own."""
    return tuple(ExpertMatrix(weight, rows) if weight.dim() == 3 else weight for weight in weights)


def each_rows(weight: torch.Tensor | ExpertMatrix) -> torch.Tensor:
    """A weight (1, b) that is no factor of a product: as it is, or each row's own, (N, b)."""
    return weight.picked().squeeze(1) if isinstance(weight, ExpertMatrix) else weight


def _sum(added: torch.Tensor | None, product: torch.Tensor, alpha: float) -> torch.Tensor:
    return product if added is None else torch.add(added, product, alpha=alpha)


def _mm(x: torch.Tensor, weight: ExpertMatrix) -> torch.Tensor:
    return weight.product(x)


def _addmm(
    added: torch.Tensor | ExpertMatrix, x: torch.Tensor, weight: ExpertMatrix, *, alpha: float = 1.0
) -> torch.Tensor:
    """added + alpha x W; `added` (M, b), or (1, b) of each expert."""
    return weight.product(x, each_rows(added), alpha)


def _linear(x: torch.Tensor, weight: ExpertMatrix) -> torch.Tensor:
    return ExpertMatrix(weight.stack.mT, weight.rows, weight.dtype).product(x)


PRODUCTS: dict[Any, Callable[..., torch.Tensor]] = {torch.mm: _mm, torch.addmm: _addmm, nn.functional.linear: _linear}
