"""The configs that the contract runs with, one a method and a few variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
)
from tests.tiny_models import SEQ2SEQ, build

CONFIGS: dict[str, Callable[..., Any]] = {
    "head_gating": HeadGroupGatingConfig,
    "rank_mask": lambda **k: DynamicRankMaskConfig(total_rank=8, active_rank=4, **k),
    "kronecker": lambda **k: KroneckerConfig(u_rank=3, v_rank=2, **k),
    "film": lambda **k: ResidualFiLMConfig(gamma_dim=3, beta_dim=2, **k),
    "composite": lambda **k: CompositeConfig(
        [HeadGroupGatingConfig(), KroneckerConfig(u_rank=3, v_rank=2), ResidualFiLMConfig(gamma_dim=2, beta_dim=2)], **k
    ),
}
METHODS = tuple(CONFIGS)
# variants run on one architecture only
VARIANTS: dict[str, Callable[..., Any]] = {
    "head_gating_uneven": lambda **k: HeadGroupGatingConfig(
        num_groups=2, rank_per_group=[1, 3], gate_temperature=0.5, **k
    ),
    "head_gating_exact": lambda **k: HeadGroupGatingConfig(attention_stats="exact", **k),
    "rank_mask_plain": lambda **k: DynamicRankMaskConfig(
        total_rank=6, active_rank=2, use_hadamard_path=False, value_gate=False, **k
    ),
    "rank_mask_task": lambda **k: DynamicRankMaskConfig(mask_scope="task", value_gate=False, **k),
    "rank_mask_task_blocks": lambda **k: DynamicRankMaskConfig(mask_scope="task", value_gate=False, num_blocks=2, **k),
    "rank_mask_task_gated": lambda **k: DynamicRankMaskConfig(mask_scope="task", **k),
    "rank_mask_blocks": lambda **k: DynamicRankMaskConfig(total_rank=8, active_rank=4, num_blocks=4, **k),
    "rank_mask_whole": lambda **k: DynamicRankMaskConfig(total_rank=4, active_rank=4, value_gate=False, **k),
    "kronecker_random": lambda **k: KroneckerConfig(u_rank=2, v_rank=3, init_method="random", u_dim=4, v_dim=12, **k),
    "film_spatial": lambda **k: ResidualFiLMConfig(mode="spatial", **k),
    "film_static": lambda **k: ResidualFiLMConfig(mode="static", max_beta=0.0, **k),
    "film_static_beta": lambda **k: ResidualFiLMConfig(mode="static", beta_unit="absolute", **k),
    "film_static_rms": lambda **k: ResidualFiLMConfig(mode="static", **k),
    "film_absolute": lambda **k: ResidualFiLMConfig(beta_unit="absolute", clamp_range=0.0, **k),
    "film_beta_free": lambda **k: ResidualFiLMConfig(max_beta=0.0, **k),
}
EVERY = {**CONFIGS, **VARIANTS}


def task_type(architecture: str) -> str:
    return "SEQ_2_SEQ_LM" if architecture in SEQ2SEQ else "CAUSAL_LM"


def adapted(
    method: str, architecture: str, dtype: torch.dtype = torch.float32, fresh: bool = False, **changes: Any
) -> nn.Module:
    """A tiny model with the method; its weights are those of a trained adapter unless `fresh`."""
    config = EVERY[method](task_type=task_type(architecture), **changes)
    model = get_peft_model(build(architecture, dtype), config)
    if not fresh:
        randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 3) -> None:
    """Move every adapter weight away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "bem_" in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.add_(noise.to(parameter))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "bem_" in name}
