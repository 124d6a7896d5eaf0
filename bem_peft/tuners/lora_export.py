r"""Export to a LoRA checkpoint that any LoRA runtime loads:  s B K  with  A = K, lora_B = s B, lora_alpha = r.

Exact where the update is linear in x (PT3, and PT2 with a task mask). A gated method is linear only at fixed gates:
with `calibration` batches its gates are fixed where that loses least over the real tokens, and the report says what is
lost, at each site and in the logits of the whole model. At fused experts the file holds B_e K_e of every expert for
PEFT's `target_parameters`: lora_A is (E r, in), expert after expert, lora_B (out, r E), in which experts alternate.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.utils import parametrize

from bem_peft import upstream
from bem_peft.tuners.base.adapter import Adapter
from bem_peft.tuners.base.expert_layer import AdapterExperts
from bem_peft.tuners.base.layer import AdapterLinear
from bem_peft.tuners.base.low_rank import LowRankAdapter
from bem_peft.tuners.lora_calibration import Factors, LogitsReport, best_gates, measure
from bem_peft.tuners.lora_formats import FORMATS, PEFT_PREFIX, LoraTensors, lowest_rank, runtime_flags, write


@dataclass(frozen=True)
class LoraExportReport:
    """What was written, and what it loses. ranks: of each site, before it is filled up.

    relative_error: |update - exported| / |update| over the calibration's real tokens, a gated site.
    logits: the whole model with the exported LoRA against the adapter itself, on the calibration; None without one, or
        where the model returns no logits.
    rank: the largest that was written. flags: runtime -> what it has to be told to take it.
    """

    folder: str
    ranks: dict[str, int]
    is_exact: bool
    relative_error: dict[str, float]
    logits: LogitsReport | None = None
    rank: int = 0
    flags: Mapping[str, str] = field(default_factory=dict)


def export_lora(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    adapter_name: str = "default",
    calibration: Iterable[dict[str, Any]] | None = None,
    *,
    uniform_rank: bool = True,
    lower_rank: bool = False,
    format: str = "peft",
) -> LoraExportReport:
    """Write `adapter_name` as a LoRA adapter.

    Args:
        model: a model with adapters of bem_peft.
        calibration: keyword arguments of calls, e.g. tokenised batches; gated methods need them. Padding, as their
            `attention_mask` tells it, changes nothing.
        uniform_rank: fill every site up with zeros to the largest rank. Some runtimes (llama.cpp) divide one alpha by
            each site's own rank, and would scale a site of another rank wrongly; False: ranks as they are, with PEFT's
            `rank_pattern` and `alpha_pattern`.
        lower_rank: write the fewest ranks with the same product, where the factors have some that add nothing (PT2's
            that its task mask drops).
        format: "peft" (adapter_config.json, adapter_model.safetensors), "gguf" (adapter.gguf, for llama.cpp; needs the
            package gguf) or "mlx" (adapter_config.json, adapters.safetensors, for MLX-LM).

    Returns:
        ranks, exactness, what runtimes have to be told and, with `calibration`, the error of gated sites and of the
        model's logits.

    Raises:
        ValueError: no such adapter; the method is multiplicative (FiLM), or depends on the token by more than gates; it
            is gated and `calibration` is None; or there is something that a LoRA file does not hold: modules or
            embeddings saved with the adapter, a trained or merged base, a wrapped or parametrised base layer, a second
            active adapter; or the format does not hold it. Nothing is written then.
        ImportError: the package gguf is not there.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` = {format!r}: must be one of {', '.join(FORMATS)}.")
    layers: dict[str, tuple[Any, list[Any]]] = {
        name.removeprefix(PEFT_PREFIX): (module, list(module.adapters_named(adapter_name)))
        for name, module in model.named_modules()
        if isinstance(module, (AdapterLinear, AdapterExperts))
    }
    layers = {name: pair for name, pair in layers.items() if pair[1]}
    if not layers:
        raise ValueError(f"`adapter_name` = {adapter_name!r}: the model has no bem_peft adapter of that name.")
    adapters: list[Any] = [adapter for _, pair in layers.values() for adapter in pair]
    gated = _refuse_methods(adapters)
    _refuse_what_a_lora_does_not_hold(model, adapter_name)
    if gated and calibration is None:
        raise ValueError(
            f"{type(gated[0]).__name__} at {gated[0].site_name} has gates that depend on the token: pass `calibration` "
            "batches to fix them where that loses least; the export then is an approximation whose error is reported."
        )
    batches = [] if calibration is None else list(calibration)
    gates = best_gates(model, adapter_name, gated, batches) if gated else {}
    factors: dict[Any, Factors] = {}
    for adapter in adapters:
        a, b = adapter.lora_factors(gates[adapter]) if adapter in gates else _stacked_factors(adapter)
        factors[adapter] = a, b * adapter.scaling
    stacked = {
        layer: (torch.cat([factors[a][0] for a in own], dim=-2), torch.cat([factors[a][1] for a in own], dim=-1))
        for layer, own in layers.values()
    }
    if lower_rank:
        stacked = {layer: lowest_rank(*pair) for layer, pair in stacked.items()}
    at_modules = {layer: pair for layer, pair in stacked.items() if isinstance(layer, AdapterLinear)}
    errors, logits = measure(model, adapter_name, {a: factors[a] for a in gated}, at_modules, batches)
    ranks = {name: stacked[layer][0].shape[-2] for name, (layer, _) in layers.items()}
    written = dict.fromkeys(ranks, max(ranks.values())) if uniform_rank else ranks
    configs: Any = model.peft_config
    source = configs[adapter_name]
    get_base: Any = getattr(model, "get_base_model", None)
    base = model if get_base is None else get_base()
    lora = LoraTensors(
        factors={name: _filled(layer, *stacked[layer], written[name]) for name, (layer, _) in layers.items()},
        ranks=written,
        parameters={n: layer.parameter for n, (layer, _) in layers.items() if isinstance(layer, AdapterExperts)},
        fan_in_fan_out=any(getattr(layer, "fan_in_fan_out", False) for layer, _ in layers.values()),
        task_type=source.task_type,
        base_name=source.base_model_name_or_path,
        model_config=getattr(base, "config", None),
    )
    lora.check(format)
    write(lora, Path(save_directory), format)
    flags = runtime_flags(lora.rank, format)
    return LoraExportReport(os.fspath(save_directory), ranks, not gated, errors, logits, lora.rank, flags)


def _filled(layer: nn.Module, a: torch.Tensor, b: torch.Tensor, rank: int) -> Factors:
    """A and B filled up with zeros to `rank`; of all experts in one, as the file has them."""
    missing = rank - a.shape[-2]
    a, b = nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
    if isinstance(layer, AdapterExperts):
        experts = layer.experts_site.num_experts
        return a.expand(experts, -1, -1).flatten(0, 1), b.expand(experts, -1, -1).permute(1, 2, 0).flatten(1)
    return a, b


def _stacked_factors(adapter: LowRankAdapter) -> Factors:
    """A and B, or those of each expert, (E, r, in) and (E, out, r)."""
    found = [own.lora_factors() for own in adapter.own()]
    if adapter.num_experts is None:
        return found[0]
    a, b = zip(*found, strict=True)
    return torch.stack(a), torch.stack(b)


def _refuse_methods(adapters: list[Adapter]) -> list[LowRankAdapter]:
    """The gated ones of `adapters`. Raises ValueError where no LoRA is near a method."""
    gated = []
    for adapter in adapters:
        if not isinstance(adapter, LowRankAdapter):
            raise ValueError(
                f"{type(adapter).__name__} at {adapter.site_name} multiplies the base output; no LoRA equals it."
            )
        if not adapter.is_mergeable:
            gated.append(adapter)
    for adapter in gated:
        if adapter.at_experts:
            raise ValueError(
                f"{type(adapter).__name__} at {adapter.site_name} has gates that depend on the token, and no constant "
                "is found for them over the tokens that a router chose: PT3, or PT2 with a task mask and no value "
                "gate, is exported from experts."
            )
        if not adapter.has_gates:
            raise ValueError(
                f"{type(adapter).__name__} at {adapter.site_name} depends on the token, and has no gates that could be "
                "fixed: no LoRA equals it."
            )
        if adapter.reads_attention_rows or adapter.retrieval != "none":
            raise ValueError(
                f"{adapter.site_name}: gates that read exact attention rows or retrieval cannot be fixed from W_O's "
                "input; export works with attention_stats='output' and retrieval='none'."
            )
    return gated


def _refuse_what_a_lora_does_not_hold(model: nn.Module, adapter_name: str) -> None:
    configs: Any = model.peft_config
    further = getattr(configs[adapter_name], "modules_to_save", None)
    if further:
        raise ValueError(
            f"`modules_to_save` = {sorted(further)}: a LoRA file holds no whole modules, so the export would not be "
            "the adapter; export one without them, or merge (`merge_and_unload`) and save the model."
        )
    for name, module in model.named_modules():
        if isinstance(module, (AdapterLinear, AdapterExperts)):
            if module.merged_adapters:
                raise ValueError(
                    f"{module.merged_adapters} are merged into {name}: the LoRA would stand on a base that has them "
                    "already; call `unmerge_adapter` first."
                )
            active: Any = module.active_adapters
            if adapter_name in active and len(active) > 1:
                raise ValueError(
                    f"{list(active)} are active together, and the file would hold {adapter_name!r} "
                    f"alone: call `set_adapter({adapter_name!r})` first, and export each one."
                )
            base: Any = module.base_layer
            if isinstance(module, AdapterExperts) and not upstream.lora_turns_expert_axes():
                raise ValueError(
                    f"{name}: the installed PEFT lays a LoRA of experts out otherwise (`target_parameters`, before "
                    "0.21): install peft >= 0.21 to export it."
                )
            if parametrize.is_parametrized(base):
                raise ValueError(
                    f"the base layer of {name} is parametrised, which a LoRA file does not hold: remove the "
                    "parametrisation (`torch.nn.utils.parametrize.remove_parametrizations`), and save the base too."
                )
        if isinstance(module, BaseTunerLayer) and (
            not isinstance(module, (AdapterLinear, AdapterExperts)) or isinstance(module.base_layer, BaseTunerLayer)
        ):
            raise ValueError(
                f"{name} is adapted by {type(module).__name__} over or under the adapter, and the file would hold "
                f"{adapter_name!r} alone: unload the other one, or merge it and save the base."
            )
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            raise ValueError(
                f"{name} is trained with {adapter_name!r} ({type(module).__name__}): no LoRA file holds it."
            )
    own = {id(p) for m in model.modules() if isinstance(m, (Adapter, AuxiliaryTrainingWrapper)) for p in m.parameters()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if trained:
        raise ValueError(
            f"{trained[0]} and {len(trained) - 1} further parameters of the base are trainable: a LoRA file does not "
            "hold them; freeze them (`requires_grad_(False)`) if they are as loaded, else save the whole model."
        )
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    kinds = (AdapterLinear, AdapterExperts)
    containers = {name for m in model.modules() if isinstance(m, kinds) for name in m.adapter_layer_names}
    beside = [key for key in saved if not any(f".{container}." in key for container in containers)]
    if beside:
        raise ValueError(
            f"the adapter is saved with {beside[0]} and {len(beside) - 1} further tensors of the base (embeddings that "
            "were resized, for instance): a LoRA runtime would not load them; merge and save the whole model."
        )
