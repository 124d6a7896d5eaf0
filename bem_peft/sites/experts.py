"""W_down of fused experts: the parameter of a block that holds it, its layout, how many experts a token reaches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from bem_peft.sites.blocks import Block, Path, attribute, base_module, configs

PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
    "num_selected_experts",
)  # fmt: skip


@dataclass(frozen=True)
class ExpertSite:
    """W_down of all experts of a block in one parameter, (E, out, in), or (E, in, out) where `is_transposed`."""

    name: str  # of the module that owns it
    parameter: str  # its name there
    block_index: int
    num_experts: int
    in_features: int
    out_features: int
    is_transposed: bool
    experts_per_token: int | None = None  # as the config says; None: it does not


def expert_site(model: nn.Module, block: Block, path: Path) -> ExpertSite | None:
    """None where the parameter is no stack of matrices of numbers (quantised, or all experts side by side)."""
    owner = base_module(model.get_submodule(".".join(block.path + path[:-1])))
    weight = owner._parameters.get(path[-1])
    if weight is None or weight.dim() != 3 or not weight.is_floating_point():
        return None
    experts, rows, columns = weight.shape
    is_transposed = getattr(owner, "is_transposed", None)
    if is_transposed is None:  # no class of transformers' experts interface: W_down writes the residual width
        if rows == columns or block.width not in (rows, columns):
            return None
        is_transposed = block.width == columns
    in_features, out_features = (rows, columns) if is_transposed else (columns, rows)
    name = ".".join(block.path + path[:-1])
    reached = _experts_per_token([model, *block.modules.values()], block.index)
    reached = None if reached is None else min(reached, experts)
    return ExpertSite(name, path[-1], block.index, experts, in_features, out_features, bool(is_transposed), reached)


def _experts_per_token(modules: Iterable[nn.Module], block: int) -> int | None:
    for config in configs(modules):
        for name in PER_TOKEN:
            value = attribute(config, name)
            if isinstance(value, list | tuple) and block < len(value):
                value = value[block]
            if isinstance(value, int) and value > 0:
                return value
    return None
