"""A probe for sites that the model never calls, because a fused kernel reads their weight instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bem_peft.tuners.base.expert_layer import AdapterExperts
from bem_peft.tuners.base.layer import AdapterLinear


class DeadSiteError(RuntimeError):
    """Adapted modules that are not on the compute path; the message names them."""


def probe(model: nn.Module, example: dict[str, Any] | None = None) -> int:
    """Run one forward and backward pass and check that every adapted module is called and gets a gradient.

    Args:
        model: a model with adapters of bem_peft.
        example: keyword arguments of one call; None: eight tokens of ids 0 to 7 (for seq2seq in both halves).

    Returns:
        The number of live sites.

    Raises:
        DeadSiteError: a site was not called, or no gradient came back to it.
        ValueError: the model has no adapted module.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, (AdapterLinear, AdapterExperts))
    }
    if not layers:
        raise ValueError("the model has no bem_peft adapter to probe.")
    if example is None:
        device = next(model.parameters()).device
        ids = torch.arange(8, device=device).unsqueeze(0)
        config = getattr(model, "config", None)
        example = {"input_ids": ids}
        if getattr(config, "is_encoder_decoder", False):
            example["decoder_input_ids"] = ids
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _m, _a, out, name=name: outputs.__setitem__(name, _retain(out)))
        for name, layer in layers.items()
    ]
    try:
        with torch.enable_grad():
            result = model(**example)
            tensor = result[0] if isinstance(result, tuple) else next(iter(result.values()))
            if not tensor.requires_grad:
                raise ValueError("nothing in the model requires a gradient: probe it while an adapter is trainable.")
            tensor.float().square().mean().backward()
    finally:
        for handle in handles:
            handle.remove()
    dead = [name for name in layers if name not in outputs or outputs[name].grad is None]
    for parameter in model.parameters():
        parameter.grad = None
    if dead:
        shown = ", ".join(dead[:5]) + (f" and {len(dead) - 5} more" if len(dead) > 5 else "")
        raise DeadSiteError(
            f"{len(dead)} of {len(layers)} adapted modules are not on the compute path: {shown}. The model reads their "
            "weight in a fused kernel, or this input does not reach them; take them out of `target_modules`."
        )
    return len(layers)


def _retain(output: torch.Tensor) -> torch.Tensor:
    if output.requires_grad:
        output.retain_grad()
    return output
