"""How `torch.vmap` batches an operator on rows: a batch of rows is more rows, where the weights are not batched too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Argument = torch.Tensor | Sequence[bool] | float | None
Results = torch.Tensor | tuple[torch.Tensor, ...]
Operator = Callable[..., Results]


class Info(Protocol):
    """What vmap says of the batch."""

    @property
    def batch_size(self) -> int: ...


Rule = Callable[..., tuple[Results, int | tuple[int, ...]]]  # (info, in_dims, *arguments) -> results, their batch axes


def _axes(in_dims: Sequence[object]) -> list[int | None]:
    return [dim if isinstance(dim, int) else None for dim in in_dims]


def _loop(
    operator: Operator, batch: int, dims: Sequence[int | None], args: Sequence[Argument]
) -> tuple[Results, int | tuple[int, ...]]:
    """One call for each element of the batch."""
    results = []
    for i in range(batch):
        picked = [
            arg.select(dim, i) if isinstance(arg, torch.Tensor) and dim is not None else arg
            for arg, dim in zip(args, dims, strict=True)
        ]
        results.append(operator(*picked))
    parts = [(result,) if isinstance(result, torch.Tensor) else result for result in results]
    stacked = tuple(torch.stack(part) for part in zip(*parts, strict=True))
    return (stacked[0], 0) if isinstance(results[0], torch.Tensor) else (stacked, (0,) * len(stacked))


def looping(operator: Operator) -> Rule:
    """The rule that calls the operator once for each element of the batch."""

    def rule(info: Info, in_dims: Sequence[object], *args: Argument) -> tuple[Results, int | tuple[int, ...]]:
        return _loop(operator, info.batch_size, _axes(in_dims), args)

    return rule


def folding_rows(operator: Operator, row_arguments: Sequence[int]) -> Rule:
    """The rule that folds the batch into the first axis of the arguments at the positions `row_arguments`.

    Every result has the rows as its first axis. Where another argument is batched, a loop.
    """

    def rule(info: Info, in_dims: Sequence[object], *args: Argument) -> tuple[Results, int | tuple[int, ...]]:
        dims = _axes(in_dims)
        if any(dim is not None and i not in row_arguments for i, dim in enumerate(dims)):
            return _loop(operator, info.batch_size, dims, args)
        folded = list(args)
        for i in row_arguments:
            rows, dim = args[i], dims[i]
            if isinstance(rows, torch.Tensor):
                spread = rows.expand(info.batch_size, *rows.shape) if dim is None else rows.movedim(dim, 0)
                folded[i] = spread.flatten(0, 1)
        out = operator(*folded)
        if isinstance(out, torch.Tensor):
            return out.unflatten(0, (info.batch_size, -1)), 0
        return tuple(part.unflatten(0, (info.batch_size, -1)) for part in out), (0,) * len(out)

    return rule
