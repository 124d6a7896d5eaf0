"""Parameters that FSDP2 has cut into shards, read and written whole."""

from __future__ import annotations

import torch
from torch import distributed
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all shards of it put together; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or this process's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_size(tensor: torch.Tensor) -> int:
    """Numbers in the tensor, however it is cut over processes (FSDP2, ZeRO-3)."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


@torch.no_grad()
def write(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """parameter <- value, which is whole and the same in every process."""
    if isinstance(parameter, DTensor):
        cut = distribute_tensor(
            value.to(parameter.dtype), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        parameter.copy_(cut)
    else:
        parameter.copy_(value)


def is_distributed() -> bool:
    """Whether this process belongs to a group, in which a parameter's storage may change unseen."""
    return distributed.is_available() and distributed.is_initialized()
