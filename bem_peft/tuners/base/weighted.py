r"""A new adapter whose update is  sum_i w_i update_i  at every site, of adapters that do the same to every token.

An adapter that a site lacks counts as none there. Each method says how its updates add (`Adapter.weighted_fields`,
`weighted_sizes`, `fill_weighted`); sizes that differ by site go into `rank_pattern`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from bem_peft.tuners.base.adapter import Adapter
from bem_peft.tuners.base.adapter_config import AdapterConfig
from bem_peft.tuners.base.layer import AdapterLayer

Parts = list[tuple[Any, float]]  # the adapters of one container at one site, with their weights
INSTEAD = (
    "export each one as a LoRA (`export_lora`) and add these with PEFT's `add_weighted_adapter`, or serve the rows of "
    "a batch with different adapters (`adapter_names`)"
)


def check_arguments(
    model: nn.Module,
    known: Mapping[str, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: str,
    options: Mapping[str, Any],
) -> None:
    """Raise ValueError for what cannot be added up, before anything is changed."""
    if combination_type != "cat" or options:
        asked = combination_type if combination_type != "cat" else ", ".join(sorted(options))
        raise ValueError(
            f"`combination_type` = 'cat', the exact sum, is what adapters of bem_peft have, not {asked!r}: leave it "
            "out, or export each one as a LoRA (`export_lora`) and add these with PEFT's `add_weighted_adapter`."
        )
    unknown = [each for each in adapters if each not in known]
    if unknown or not adapters or len(adapters) != len(set(adapters)):
        raise ValueError(f"`adapters` = {list(adapters)}: must be different names out of {sorted(known)}.")
    if len(weights) != len(adapters) or not all(abs(weight) < float("inf") for weight in weights):
        raise ValueError(f"`weights` = {list(weights)}: must be one finite number for each of {list(adapters)}.")
    if name in known:
        raise ValueError(f"`adapter_name` = {name!r}: there is one; `delete_adapter({name!r})` first.")
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and set(adapters) & set(module._adapters):
            raise ValueError(
                f"{path} is trained with one of {list(adapters)} (`modules_to_save`), and whole modules are not added "
                "up: use adapters without them."
            )


def sites_of(model: nn.Module, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, dict[str, Parts]]:
    """Container -> site -> the adapters there.

    Raises:
        ValueError: the sum of some is no adapter of their method.
    """
    found: dict[str, dict[str, Parts]] = {}
    for site, layer in _layers(model):
        here = [container for container in layer.adapter_layer_names if set(adapters) & set(getattr(layer, container))]
        for container in here:
            own = getattr(layer, container)
            parts = [(own[name], weight) for name, weight in zip(adapters, weights, strict=True) if name in own]
            for adapter, _ in parts:
                _refuse(adapter, len(here))
            found.setdefault(container, {})[site] = parts
    return found


def _refuse(adapter: Adapter, methods: int) -> None:
    where = f"{type(adapter).__name__} at {adapter.site_name}"
    if not adapter.is_summable:
        raise ValueError(
            f"{where} depends on the token, so that a sum of several is no {adapter.variant}: {INSTEAD}. PT3, PT2 with "
            "one mask a task and no value gate, and static PT4 add up exactly."
        )
    if adapter.num_experts is not None:
        raise ValueError(f"{where} has parameters of each expert, which are not added up here: {INSTEAD}.")
    if methods > 1 and adapter.reads_output:
        raise ValueError(
            f"{where} multiplies what another method adds there, so that sums of both are none: {INSTEAD}."
        )


def weighted_config(
    cls: type[AdapterConfig], configs: Sequence[Any], weights: Sequence[float], sites: Mapping[str, Parts], **whole: Any
) -> AdapterConfig:
    """The config of the sum: the sizes that most sites have, and a `rank_pattern` for the others."""
    adapter = type(next(iter(sites.values()))[0][0])
    sizes = {site: adapter.weighted_sizes(parts) for site, parts in sites.items()}
    usual = dict(Counter(tuple(own.items()) for own in sizes.values()).most_common(1)[0][0])
    pattern = {site: own for site, own in sizes.items() if own != usual}
    fields = adapter.weighted_fields(configs, weights)
    return cls(target_modules=sorted(sites), rank_pattern=pattern, **fields, **usual, **whole)


@torch.no_grad()
def fill(model: nn.Module, name: str, sites: Mapping[str, Mapping[str, Parts]]) -> None:
    """Write the sums into the adapter `name`, and freeze it."""
    for site, layer in _layers(model):
        for container in layer.adapter_layer_names:
            if site in sites.get(container, {}):
                adapter = getattr(layer, container)[name]
                adapter.fill_weighted(sites[container][site])
                adapter.requires_grad_(False)


def _layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    for site, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            yield site, module
