r"""Export to a LoRA checkpoint that any LoRA runtime loads:  s B K  with  A = K, lora_B = s B, lora_alpha = r.

Exact where the update is linear in x (PT3, and PT2 with a task mask). A gated method is linear only at fixed gates:
with `calibration` batches its gates are fixed at their mean, and the report says what that loses.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from bem_peft.tuners.governance import LowRankAdapter
from bem_peft.tuners.layer import AdapterLinear
from bem_peft.tuners.pt1_head_gating import HeadGroupGatingAdapter
from bem_peft.tuners.pt2_rank_mask import DynamicRankMaskAdapter

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraExportReport:
    """What was written. `relative_error` is |update - exported| / |update| over the calibration tokens of a site."""

    folder: str
    ranks: dict[str, int]
    is_exact: bool
    relative_error: dict[str, float]


def export_lora(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    adapter_name: str = "default",
    calibration: Iterable[dict[str, Any]] | None = None,
) -> LoraExportReport:
    """Write `adapter_name` as a LoRA adapter (adapter_config.json, adapter_model.safetensors).

    Args:
        model: a model with adapters of bem_peft.
        calibration: keyword arguments of calls, e.g. tokenised batches; for gated methods only.

    Returns:
        ranks, exactness and, for gated methods, the error a site.

    Raises:
        ValueError: no such adapter; the method is multiplicative (FiLM), or depends on the token by more than gates; it
            is gated and `calibration` is None; or it has `modules_to_save`, which a LoRA file does not hold.
    """
    layers = {
        name.removeprefix(PEFT_PREFIX): (module, list(module.adapters_named(adapter_name)))
        for name, module in model.named_modules()
        if isinstance(module, AdapterLinear)
    }
    layers = {name: pair for name, pair in layers.items() if pair[1]}
    if not layers:
        raise ValueError(f"`adapter_name` = {adapter_name!r}: the model has no bem_peft adapter of that name.")
    adapters = [adapter for _, pair in layers.values() for adapter in pair]
    for adapter in adapters:
        if not isinstance(adapter, LowRankAdapter):
            raise ValueError(
                f"{type(adapter).__name__} at {adapter.site_name} multiplies the base output; no LoRA equals it."
            )
    configs: Any = model.peft_config
    further = getattr(configs[adapter_name], "modules_to_save", None)
    if further:
        raise ValueError(
            f"`modules_to_save` = {sorted(further)}: a LoRA file holds no whole modules, so the export would not be "
            "the adapter; export one without them, or merge (`merge_and_unload`) and save the model."
        )
    gated = [a for a in adapters if not a.is_mergeable]
    for adapter in gated:
        if not isinstance(adapter, (HeadGroupGatingAdapter, DynamicRankMaskAdapter)):
            raise ValueError(
                f"{type(adapter).__name__} at {adapter.site_name} depends on the token, and has no gates that could be "
                "fixed at their mean: no LoRA equals it."
            )
    if gated and calibration is None:
        raise ValueError(
            f"{type(gated[0]).__name__} at {gated[0].site_name} has gates that depend on the token: pass `calibration` "
            "batches to fix them at their mean; the export then is an approximation whose error is reported."
        )
    means = _mean_gates(model, gated, calibration) if gated and calibration is not None else {}
    tensors, ranks = {}, {}
    for name, (_, stacked) in layers.items():
        pairs = []
        for adapter in stacked:
            gate = means[adapter][0] if adapter in means else None
            a, b = adapter.lora_factors(gate) if gate is not None else adapter.lora_factors()  # type: ignore[operator]
            pairs.append((a, b * adapter.scaling))
        a, b = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs], dim=1)
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = a.contiguous().cpu()
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = b.contiguous().cpu()
        ranks[name] = a.shape[0]
    _write(model, save_directory, adapter_name, tensors, ranks, layers)
    errors = {adapter.site_name: means[adapter][1] for adapter in means}
    return LoraExportReport(os.fspath(save_directory), ranks, not gated, errors)


def _write(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str,
    tensors: dict[str, torch.Tensor],
    ranks: dict[str, int],
    layers: dict[str, Any],
) -> None:
    configs: Any = model.peft_config
    source = configs[adapter_name]
    rank = max(ranks.values())
    uneven = {name.replace(".", r"\."): r for name, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=uneven,
        alpha_pattern=dict(uneven),
        target_modules=sorted(ranks),
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        inference_mode=True,
        fan_in_fan_out=any(layer.fan_in_fan_out for layer, _ in layers.values()),
    )
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(os.fspath(folder))


@torch.no_grad()
def _mean_gates(
    model: nn.Module, adapters: list[Any], calibration: Iterable[dict[str, Any]]
) -> dict[Any, tuple[torch.Tensor, float]]:
    """For each gated adapter the mean of its gates and the relative error of the update at that mean."""
    seen: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {adapter: [] for adapter in adapters}

    def watch(adapter: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        x = args[0].reshape(-1, adapter.in_features)
        seen[adapter].append((x.float(), (out - args[1]).reshape(-1, adapter.out_features).float()))

    handles = [adapter.register_forward_hook(watch) for adapter in adapters]
    was_training = model.training
    model.eval()
    try:
        for batch in calibration:
            model(**batch)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    result = {}
    for adapter in adapters:
        if not seen[adapter]:
            raise ValueError(f"`calibration` brought no token to {adapter.site_name}: pass at least one batch.")
        x = torch.cat([pair[0] for pair in seen[adapter]])
        update = torch.cat([pair[1] for pair in seen[adapter]])
        gate = _gate_values(adapter, x).mean(0)
        a, b = adapter.lora_factors(gate)
        exported = x @ a.float().t() @ (b.float() * adapter.scaling).t()
        size = update.norm()
        result[adapter] = (gate, float((update - exported).norm() / size) if size > 0 else 0.0)
    return result


def _gate_values(adapter: Any, x: torch.Tensor) -> torch.Tensor:
    """The factors that an adapter puts on its ranks (or groups) for inputs x (N, in): (N, R) or (N, G)."""
    if isinstance(adapter, HeadGroupGatingAdapter):
        if adapter.uses_exact_statistics or adapter.retrieval != "none":
            raise ValueError(
                f"{adapter.site_name}: gates that read exact attention rows or retrieval cannot be fixed from W_O's "
                "input; export works with attention_stats='output' and retrieval='none'."
            )
        return adapter.gates(adapter.statistics(x))
    return adapter.rank_factors(x)
