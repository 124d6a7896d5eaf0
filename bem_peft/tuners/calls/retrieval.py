"""What a call may be given of retrieval, and whether it is well formed."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor


def check_quality(quality: object, kinds: set[str]) -> torch.Tensor:
    if "quality" not in kinds:
        raise ValueError(
            '`retrieval_quality` was given, but no adapter reads it; set retrieval="quality" in HeadGroupGatingConfig.'
        )
    tensor = torch.as_tensor(quality)
    if tensor.dim() not in (1, 2) or not tensor.is_floating_point():
        raise ValueError(
            f"`retrieval_quality` has shape {tuple(tensor.shape)} and dtype {tensor.dtype}: must be floating point, "
            "one value a sequence (batch,) or a token (batch, tokens)."
        )
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not ((tensor >= 0) & (tensor <= 1)).all():
        raise ValueError(f"`retrieval_quality` lies in [{tensor.min():g}, {tensor.max():g}]: must lie in [0, 1].")
    return tensor


def check_scores(scores: object, kinds: set[str]) -> torch.Tensor:
    if "scores" not in kinds:
        raise ValueError(
            '`retrieval_scores` was given, but no adapter reads it; set retrieval="scores" in HeadGroupGatingConfig.'
        )
    tensor = torch.as_tensor(scores)
    if tensor.dim() != 2 or not tensor.is_floating_point() or tensor.shape[1] < 1:
        raise ValueError(
            f"`retrieval_scores` has shape {tuple(tensor.shape)} and dtype {tensor.dtype}: must be floating point, "
            "(batch, retrieved documents); fill short lists with -inf."
        )
    can_be_read = not (tensor.is_meta or isinstance(tensor, FakeTensor) or torch.compiler.is_compiling())
    if can_be_read and not (tensor < torch.inf).all():
        raise ValueError("`retrieval_scores` holds NaN or +inf: must be finite numbers, and -inf where a list ends.")
    return tensor


CHECKS = {"retrieval_quality": check_quality, "retrieval_scores": check_scores}


def refuse_misspelt(model: nn.Module, names: list[str]) -> None:
    """Raise ValueError where one of a call's `names`, nearly one of `CHECKS`, is no argument of the model: models take
    what they do not know without a word."""
    taken = inspect.signature(model.forward).parameters
    for name in [name for name in names if name not in taken]:
        raise ValueError(f"`{name}` is no argument of {type(model).__name__}: write {' or '.join(map(repr, CHECKS))}.")
