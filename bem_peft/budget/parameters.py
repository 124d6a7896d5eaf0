"""Parameters of an adapted model, counted as the user means them: logical elements, not the storage they are kept in.

A 4-bit weight packs two values in a byte, ZeRO-3 leaves an empty tensor behind, FSDP2 a shard: `logical_size` sees
through all three. "Active" is what one token uses: an adapter module may say so by a method `num_active_parameters()`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import nn


@dataclass(frozen=True)
class ParameterCount:
    """Exact counts. `trainable`, `saved`, `active`, `base` in elements; `stored_bytes` is the adapter's file."""

    trainable: int
    saved: int
    active: int
    base: int
    stored_bytes: int

    @property
    def total(self) -> int:
        """Base and trainable parameters together."""
        return self.base + self.trainable


def logical_size(tensor: torch.Tensor) -> int:
    """Elements of the tensor that `tensor` stands for.

    Raises:
        ValueError: a flat parameter of FSDP1, which has lost the shapes of what is in it.
    """
    if type(tensor).__name__ == "FlatParameter":
        raise ValueError("FSDP1 flattens parameters, so they cannot be counted: use FSDP2 (`fsdp_version: 2`).")
    sharded = getattr(tensor, "ds_numel", None)  # DeepSpeed ZeRO-3
    if isinstance(sharded, int):
        return sharded
    if type(tensor).__name__ == "Params4bit":
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            return math.prod(state.shape)
        if getattr(tensor, "bnb_quantized", False):
            return tensor.numel() * 2 * tensor.element_size()
    return tensor.numel()


def count_parameters(model: nn.Module, adapter_name: str | None = None) -> ParameterCount:
    """Count what is trained, what one token uses, and what is saved.

    Args:
        model: a `PeftModel`, or a transformers model with `add_adapter`.
        adapter_name: the adapter that is saved; None: the active one.

    Raises:
        ValueError: the model has no adapter.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise ValueError("the model has no adapter: call get_peft_model or add_adapter first.")
    name = adapter_name or active_adapter(model)
    trainable = frozen = 0
    for parameter in {id(p): p for p in model.parameters()}.values():
        if parameter.requires_grad:
            trainable += logical_size(parameter)
        else:
            frozen += logical_size(parameter)
    idle = 0
    for module in model.modules():
        count_active: Any = getattr(module, "num_active_parameters", None)
        if callable(count_active):
            own = [p for p in module.parameters() if p.requires_grad]
            if own:
                idle += sum(map(logical_size, own)) - int(count_active())
    state = get_peft_model_state_dict(model, adapter_name=name)
    saved = {id(tensor): tensor for tensor in state.values()}.values()
    return ParameterCount(
        trainable=trainable,
        saved=sum(map(logical_size, saved)),
        active=trainable - idle,
        base=frozen,
        stored_bytes=sum(logical_size(tensor) * tensor.element_size() for tensor in saved),
    )


def active_adapter(model: nn.Module) -> str:
    """Name of the one active adapter. Raises ValueError where there are several."""
    active: Any = getattr(model, "active_adapters", None)
    names = active() if callable(active) else active
    names = [names] if isinstance(names, str) else list(names or [])
    if len(names) != 1:
        raise ValueError(f"active adapters {names}: a budget is about one; set it with `model.set_adapter(name)`.")
    return str(names[0])
