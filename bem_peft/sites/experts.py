"""W_down (in JetMoe's attention W_O) of fused experts: the parameter of a block that holds it, its layout, how many
experts a token reaches."""

from __future__ import annotations

import inspect
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
    """W_down or W_O of all experts of a block in one parameter, (E, out, in), or (E, in, out) if `is_transposed`."""

    name: str  # of the module that owns it
    parameter: str  # its name there
    block_index: int
    num_experts: int
    in_features: int
    out_features: int
    is_transposed: bool
    experts_per_token: int | None = None  # as the config says; None: it does not
    role: str = "mlp_down"  # or "attention_output": experts of an attention, each with a W_O
    runs_all: bool = False  # every token runs through all experts, its inputs zero where it is not routed to (Llama 4)


def expert_site(model: nn.Module, block: Block, path: Path, role: str) -> ExpertSite | str:
    """The site, or what stands in its way."""
    name = ".".join(block.path + path[:-1])
    owner = base_module(model.get_submodule(name))
    weight = owner._parameters.get(path[-1])
    if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
        return f"it is quantised ({getattr(weight, 'dtype', 'no parameter of numbers')})"
    if weight.dim() != 3:
        return "all experts stand side by side in one matrix"
    if getattr(owner, "_is_expert_parallel", False):
        return "its experts are spread over processes (expert parallelism)"
    experts, rows, columns = weight.shape
    is_transposed = getattr(owner, "is_transposed", None)
    if is_transposed is None and (getattr(owner, "output_size", None), getattr(owner, "input_size", None)) == (
        rows,
        columns,
    ):
        is_transposed = False  # as a module of parallel experts says itself
    if is_transposed is None:  # no class of transformers' experts interface: W_down writes the residual width
        if rows == columns or block.width not in (rows, columns):
            return f"its shape {tuple(weight.shape)} does not tell inputs from outputs"
        is_transposed = block.width == columns
    in_features, out_features = (rows, columns) if is_transposed else (columns, rows)
    reached = _experts_per_token([model, *block.modules.values()], block.index)
    reached = None if reached is None else min(reached, experts)
    runs_all = len(inspect.signature(type(owner).forward).parameters) == 2  # self and the rows, no choice of experts
    return ExpertSite(
        name, path[-1], block.index, experts, in_features, out_features, bool(is_transposed),
        experts if runs_all else reached, role, runs_all,
    )  # fmt: skip


def _experts_per_token(modules: Iterable[nn.Module], block: int) -> int | None:
    for config in configs(modules):
        for name in PER_TOKEN:
            value = attribute(config, name)
            if isinstance(value, list | tuple) and block < len(value):
                value = value[block]
            if isinstance(value, int) and value > 0:
                return value
    return None
