"""How `torch.vmap` batches an operator on rows: a batch of rows is more rows, where the weights are not batched too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Rule = Callable[..., tuple[Any, Any]]


def _loop(operator: Callable[..., Any], batch: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """One call for each element of the batch."""
    results = []
    for i in range(batch):
        picked = [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)]
        results.append(operator(*picked))
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def looping(operator: Callable[..., Any]) -> Rule:
    """The rule that calls the operator once for each element of the batch."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        return _loop(operator, info.batch_size, [d if isinstance(d, int) else None for d in in_dims], args)

    return rule


def folding_rows(operator: Callable[..., Any], row_arguments: Sequence[int]) -> Rule:
    """The rule that folds the batch into the first axis of the arguments at the positions `row_arguments`.

    Every result has the rows as its first axis. Where another argument is batched, a loop.
    """

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        dims = [d if isinstance(d, int) else None for d in in_dims]
        if any(dim is not None and i not in row_arguments for i, dim in enumerate(dims)):
            return _loop(operator, info.batch_size, dims, args)
        folded = list(args)
        for i in row_arguments:
            if args[i] is not None:
                dim = dims[i]
                spread = args[i].expand(info.batch_size, *args[i].shape) if dim is None else args[i].movedim(dim, 0)
                folded[i] = spread.flatten(0, 1)
        out = operator(*folded)
        if isinstance(out, torch.Tensor):
            return out.unflatten(0, (info.batch_size, -1)), 0
        return tuple(part.unflatten(0, (info.batch_size, -1)) for part in out), (0,) * len(out)

    return rule
