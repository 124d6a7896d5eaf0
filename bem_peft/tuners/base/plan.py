"""What is known before a model is changed: the sites that a config means, and that each adapter can be built there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils.other import get_pattern_key
from torch import nn

from bem_peft.sites.find import MLP_DOWN, SiteError, SiteTable, find_sites, pattern_counts
from bem_peft.tuners.base.adapter import Adapter
from bem_peft.tuners.base.adapter_config import AdapterConfig
from bem_peft.tuners.calls.attention_stats import require_interface
from bem_peft.tuners.calls.routing import tells_tokens


@dataclass(frozen=True)
class Part:
    """One method of a config: the attribute of a layer that holds its adapters, its own config, its class."""

    container: str
    config: AdapterConfig
    adapter: type[Adapter]

    @property
    def is_all_linear(self) -> bool:
        targets = self.config.target_modules
        return isinstance(targets, str) and targets.lower() == "all-linear"


Build = Callable[[str, AdapterConfig, str, nn.Module], Adapter]  # container, config, site, module -> an adapter


def drop_base_prefix(model: nn.Module, config: AdapterConfig) -> None:
    """Full names that were made on a model with a head (`model.layers.0 ...`), for the model without one."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if prefix == "." or hasattr(model, prefix[:-1]):
        return
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, set):
            setattr(config, name, {module.removeprefix(prefix) for module in value})
    config.rank_pattern = {key.removeprefix(prefix): sizes for key, sizes in config.rank_pattern.items()}


def found_targets(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Names of the sites that `config` adapts by default. Raises SiteError where one could not be placed."""
    table = find_sites(model)
    roles = tuple(config.sites or config.roles)
    experts = [site for site in table.experts if site.role in roles]
    left = set(table.obstacles) if MLP_DOWN in roles else set()
    if config.fused_experts != "adapt":
        left, experts = left.union(f"{site.name}.{site.parameter}" for site in experts), []
    if left and config.fused_experts != "skip":
        advice = table.obstacles.get(min(left), "fused_experts='adapt', the default, adapts it")
        raise SiteError(
            f"W_down of the experts is one parameter that no module of its own holds: {some(sorted(left))}; {advice}. "
            "Set fused_experts='skip' to adapt the other sites, or name the modules in `target_modules`."
        )
    layers = config.layers_to_transform
    indices = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
    if config.layers_pattern is not None and not config.is_from_file:
        raise ValueError(
            f"`layers_pattern` = {config.layers_pattern!r} is of use beside `target_modules` alone: without the "
            "names the blocks are found from the model's structure; leave it out."
        )
    beyond = sorted(i for i in indices or () if i >= table.blocks)
    if beyond and not config.is_from_file:
        raise SiteError(
            f"`layers_to_transform` = {layers!r}: {type(model).__name__} has {table.blocks} blocks, from 0 to "
            f"{table.blocks - 1}; leave {beyond} out."
        )
    names = [s.name for s in table.sites if s.role in roles and (indices is None or s.block_index in indices)]
    names += [s.name for s in experts if indices is None or s.block_index in indices]
    if not names:
        where = "" if indices is None else f" in the blocks {sorted(indices)} (`layers_to_transform`)"
        raise SiteError(
            f"no {' or '.join(roles)} site was found{where} in {type(model).__name__} "
            f"({table.blocks} blocks): name the modules in `target_modules`{_others(table)}."
        )
    return names


def _others(table: SiteTable) -> str:
    """What else there is to name."""
    patterns = pattern_counts(table.names())
    if not patterns:
        return ""
    return f"; its blocks write by {', '.join(patterns)}, which PT2 and PT4 adapt by default"


def known_sites(model: nn.Module) -> SiteTable:
    """The sites of `model`; none where its structure is not known: what the user named has no heads or experts then."""
    try:
        return find_sites(model)
    except SiteError:
        return SiteTable((), 0, ())


def check_plan(
    model: nn.Module, name: str, parts: Sequence[Part], containers: Sequence[str], experts: Set[str], build: Build
) -> None:
    """Build every adapter that `parts` ask for on the meta device, and check what they are together.

    Args:
        name: of the adapter. containers: all that the tuner has, whose parameters are not the base's.
        experts: names of the modules of fused experts that can be adapted.

    Raises:
        ValueError: an adapter cannot be built, or the config contradicts the model or itself.
    """
    modules = dict(model.named_modules())
    nested = tuple(f"{outer}." for outer, module in modules.items() if isinstance(module, BaseTunerLayer))
    names = [module for module in modules if module and not module.startswith(nested)]
    planned, adapted = 0, set[str]()
    key_parts = {piece for module in names for piece in module.split(".")}
    for part in parts:
        if part.is_all_linear:
            if part.config.limits_size:
                raise ValueError("`minimal_overhead` cannot be checked for target_modules='all-linear'; name them.")
            continue
        _check_targets(part.config, names)
        sites = [site for site in names if _is_target(part.config, site)]
        for site in sites:
            with torch.device("meta"):
                adapter = build(part.container, part.config, site, modules[site])
            _check_place(adapter, site, modules)
            planned += sum(p.numel() for p in adapter.parameters())
            key_parts.update(adapter.state_dict())
        _check_choice_of_sites(model, part.config, sites)
        adapted.update(sites)
        if part.config.limits_size:
            inside = [f".{container}." for container in containers]
            base = sum(p.numel() for n, p in model.named_parameters() if not any(place in n for place in inside))
            part.config.check_size(planned, base)
    sharing = parts[0].config.expert_sharing
    if sharing != "shared" and not adapted & experts and not any(part.config.is_from_file for part in parts):
        raise ValueError(f"`expert_sharing` = {sharing!r}: no fused experts are adapted; leave it at 'shared'.")
    _check_name(name, key_parts.union(*(part.adapter.lr_groups for part in parts)))


def _is_target(config: AdapterConfig, site: str) -> bool:
    matched = BaseTuner._check_target_module_exists(config, site)
    return bool(matched) and not isinstance(matched, _ExcludedModule)


def _check_place(adapter: Adapter, site: str, modules: dict[str, nn.Module]) -> None:
    """Raise ValueError where what the adapter reads cannot be had at its site."""
    module: Any = modules[site]
    owner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if adapter.token_penalties and "experts" in site.split(".") and not tells_tokens(owner):
        raise ValueError(
            f"`{adapter.token_penalties[0]}` at {site}: its rows are tokens that a router chose, so "
            "that sequences and padding cannot be told; exclude the experts or set it to 0."
        )
    if adapter.reads_attention_rows:
        require_interface(modules[site.rpartition(".")[0]], site)


def _check_targets(config: AdapterConfig, names: list[str]) -> None:
    """Every name in `target_modules` must stand for a module; a partial match is an error."""
    if isinstance(config.target_modules, str) or not config.target_modules:
        return
    missing = [t for t in config.target_modules if not any(n == t or n.endswith(f".{t}") for n in names)]
    if missing and len(missing) < len(config.target_modules):
        raise ValueError(
            f"`target_modules` = {sorted(config.target_modules)}: no module is called {sorted(missing)} in the "
            "model (a fused 3-D expert weight is a parameter, not a module); remove what does not exist."
        )


def _check_choice_of_sites(model: nn.Module, config: AdapterConfig, names: list[str]) -> None:
    """`sites`, `layers_to_transform` and the keys of `rank_pattern` must hold for the adapted modules `names`.

    In files of older versions they may not, without effect.
    """
    if config.is_from_file or not names:
        return
    layers = config.layers_to_transform
    if layers is not None:  # PEFT asks no further where a name is given in full
        wanted_layers = {layers} if isinstance(layers, int) else set(layers)
        given = config.target_modules if isinstance(config.target_modules, set) else set()
        outside = [n for n in names if n in given and not wanted_layers & {int(i) for i in re.findall(r"\d+", n)}]
        if outside:
            raise ValueError(
                f"`layers_to_transform` = {layers!r}: `target_modules` names {some(outside)} in full, which is in "
                "no such block; leave one of the two out."
            )
    if config.sites is not None:
        table = find_sites(model)
        wanted = {site.name for site in table.sites if site.role in config.sites}
        wanted |= {site.name for site in table.experts if site.role in config.sites}
        others = sorted(set(names) - wanted)
        if others:
            raise ValueError(
                f"`sites` = {config.sites}: `target_modules` names {some(others)}, which is no such site; leave "
                "one of the two out."
            )
    keys = list(config.rank_pattern)
    idle = sorted(set(keys) - {get_pattern_key(keys, name) for name in names})
    if idle:
        raise ValueError(
            f"`rank_pattern` has the keys {idle}, which fit no adapted module that an earlier key does not fit: "
            f"remove them, or name modules such as {some(names)}."
        )


def _check_name(name: str, key_parts: set[str]) -> None:
    """An adapter's name must be no part of a saved key: PEFT drops each key with another adapter's name in it."""
    if name in key_parts:
        raise ValueError(
            f"adapter_name = {name!r}: a parameter or a module of the model is called so, and PEFT would leave it "
            f"out of the files of all other adapters; choose another name, {name}_adapter for instance."
        )
    if hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter_name = {name!r}: torch's modules have a method of that name; choose another name, "
            f"{name}_adapter for instance."
        )


def some(names: Sequence[str]) -> str:
    shown = ", ".join(list(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
