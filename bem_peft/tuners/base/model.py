"""The tuner: finds the sites, checks that every adapter can be built, then puts the layers into the model.

Nothing is changed before everything is known to fit: each adapter is built once on the meta device first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from bem_peft import upstream
from bem_peft.kept import kept_weights
from bem_peft.sites.find import MLP_DOWN, SiteError, SiteTable, find_sites
from bem_peft.tuners.base.adapter import Adapter, SiteShape
from bem_peft.tuners.base.adapter_config import AdapterConfig
from bem_peft.tuners.base.layer import AdapterLayer, AdapterLinear, projection_shape
from bem_peft.tuners.calls.attention_stats import require_interface, restore_attention, use_exact_attention
from bem_peft.tuners.calls.call_state import (
    CHECKS,
    CallState,
    attach_call_state,
    batch_of,
    detach_call_state,
    find_call_state,
)
from bem_peft.tuners.calls.loop import attach_to_trainers


class AdapterModel(BaseTuner):
    """Base of the methods' tuners. A method names its container(s): attribute -> (config class, adapter class)."""

    adapter_classes: ClassVar[Mapping[str, tuple[type[AdapterConfig], type[Adapter]]]] = {}
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # sites are found from the structure instead

    tuner_layer_cls: ClassVar[Any]
    model: Any

    # which adapters a config asks for

    def parts(self, config: AdapterConfig) -> Iterator[tuple[str, AdapterConfig]]:
        """(container, the method's config); one for a method, several for a composite."""
        yield next(iter(self.adapter_classes)), config

    @property
    def call(self) -> CallState:
        """The state that all adapters of the model share."""
        state = self.__dict__.get("_call")
        if state is None:
            state = find_call_state(self.model) or CallState()
            self.__dict__["_call"] = state
        return state

    # preparation

    def _prepare_adapter_config(self, peft_config: AdapterConfig, model_config: dict[str, Any]) -> AdapterConfig:
        self._drop_base_prefix(peft_config)
        for _, config in self.parts(peft_config):
            self._drop_base_prefix(config)
            if config.target_modules is None:
                config.target_modules = set(self._found_targets(config))
        return peft_config

    def _drop_base_prefix(self, config: AdapterConfig) -> None:
        """Full names that were made on a model with a head (`model.layers.0 ...`), for the model without one."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        if prefix == "." or hasattr(self.model, prefix[:-1]):
            return
        for name in ("target_modules", "exclude_modules"):
            value = getattr(config, name)
            if isinstance(value, set):
                setattr(config, name, {module.removeprefix(prefix) for module in value})
        config.rank_pattern = {key.removeprefix(prefix): sizes for key, sizes in config.rank_pattern.items()}

    def _found_targets(self, config: AdapterConfig) -> list[str]:
        """Names of the sites that `config` adapts by default. Raises SiteError where one could not be placed."""
        table = find_sites(self.model)
        roles = tuple(config.sites or config.roles)
        if MLP_DOWN in roles and table.fused_experts and config.fused_experts == "error":
            raise SiteError(
                f"W_down of the experts is a fused 3-D weight that no module owns, so it cannot be adapted: "
                f"{_some(table.fused_experts)}. Set fused_experts='skip' to adapt the other sites, or name the modules "
                "in `target_modules`."
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
                f"`layers_to_transform` = {layers!r}: {type(self.model).__name__} has {table.blocks} blocks, from 0 to "
                f"{table.blocks - 1}; leave {beyond} out."
            )
        names = [s.name for s in table.sites if s.role in roles and (indices is None or s.block_index in indices)]
        if not names:
            where = "" if indices is None else f" in the blocks {sorted(indices)} (`layers_to_transform`)"
            raise SiteError(
                f"no {' or '.join(roles)} site was found{where} in {type(self.model).__name__} "
                f"({table.blocks} blocks): name the modules in `target_modules`."
            )
        return names

    def _known_heads(self) -> dict[str, int | None]:
        """Heads of each W_O, where the structure tells them; used for modules that the user named."""
        try:
            table: SiteTable | None = find_sites(self.model)
        except SiteError:  # not a model whose structure is known: the heads are not either
            table = None
        return {} if table is None else {site.name: site.num_heads for site in table.sites}

    def _prepare_model(self, peft_config: AdapterConfig, model: nn.Module) -> None:
        """Build every adapter on the meta device, so that an error comes before any change."""
        self.__dict__["_heads"] = self._known_heads()
        modules = dict(model.named_modules())
        nested = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
        names = [name for name in modules if name and not name.startswith(nested)]
        planned = 0
        key_parts = {part for name in names for part in name.split(".")}
        for container, config in self.parts(peft_config):
            if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
                if getattr(config, "minimal_overhead", False):
                    raise ValueError("`minimal_overhead` cannot be checked for target_modules='all-linear'; name them.")
                continue
            self._check_targets(config, names)
            sites = []
            for name in names:
                matched = super()._check_target_module_exists(config, name)
                if matched and not isinstance(matched, _ExcludedModule):
                    sites.append(name)
                    with torch.device("meta"):
                        adapter = self._build(container, config, name, modules[name])
                    if adapter.token_penalties and "experts" in name.split("."):
                        raise ValueError(
                            f"`{adapter.token_penalties[0]}` at {name}: its rows are tokens that a router chose, so "
                            "that sequences and padding cannot be told; exclude the experts or set it to 0."
                        )
                    planned += sum(p.numel() for p in adapter.parameters())
                    key_parts.update(adapter.state_dict())
                    if getattr(adapter, "uses_exact_statistics", False):
                        require_interface(modules[name.rpartition(".")[0]], name)
            self._check_choice_of_sites(config, sites)
            if getattr(config, "minimal_overhead", False):
                self._check_overhead(planned, model)
        classes = [self.adapter_classes[container][1] for container, _ in self.parts(peft_config)]
        self._check_name(key_parts.union(*(cls.lr_groups for cls in classes)))

    def _check_choice_of_sites(self, config: AdapterConfig, names: list[str]) -> None:
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
                    f"`layers_to_transform` = {layers!r}: `target_modules` names {_some(outside)} in full, which is in "
                    "no such block; leave one of the two out."
                )
        if config.sites is not None:
            wanted = {site.name for site in find_sites(self.model).sites if site.role in config.sites}
            others = sorted(set(names) - wanted)
            if others:
                raise ValueError(
                    f"`sites` = {config.sites}: `target_modules` names {_some(others)}, which is no such site; leave "
                    "one of the two out."
                )
        keys = list(config.rank_pattern)
        idle = sorted(set(keys) - {get_pattern_key(keys, name) for name in names})
        if idle:
            raise ValueError(
                f"`rank_pattern` has the keys {idle}, which fit no adapted module that an earlier key does not fit: "
                f"remove them, or name modules such as {_some(names)}."
            )

    def _check_name(self, key_parts: set[str]) -> None:
        """An adapter's name must be no part of a saved key: PEFT drops each key with another adapter's name in it."""
        name = self.__dict__["_name"]
        if name in key_parts:
            raise ValueError(
                f"adapter_name = {name!r}: a parameter or a module of the model is called so, and PEFT would leave it "
                f"out of the files of all other adapters; choose another name, {name}_adapter for instance."
            )

    def _check_overhead(self, planned: int, model: nn.Module) -> None:
        base = sum(p.numel() for n, p in model.named_parameters() if not any(pre in n for pre in self._containers()))
        if planned >= 0.01 * base:
            raise ValueError(
                f"`minimal_overhead` = True: the adapter would have {planned:,} parameters, {planned / base:.2%} of "
                f"the base's {base:,}, and must stay below 1 %; lower `gamma_dim` and `beta_dim`, or name fewer sites."
            )

    def _containers(self) -> list[str]:
        return [f".{container}." for container in self.adapter_classes]

    @staticmethod
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

    def _build(self, container: str, config: AdapterConfig, name: str, target: nn.Module) -> Adapter:
        """The adapter of one method for the module `name`."""
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        in_features, out_features = projection_shape(base)
        site = SiteShape(name, in_features, out_features, self.__dict__["_heads"].get(name))
        return self.adapter_classes[container][1](config.at(name), site, self.call)

    # injection

    @staticmethod
    def _check_target_module_exists(peft_config: AdapterConfig, key: str) -> bool | re.Match[str] | None:
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer: AdapterLinear
        if isinstance(target, self.tuner_layer_cls):
            layer = target
        else:
            layer_cls: Any = self.tuner_layer_cls
            layer = layer_cls(target, adapter_name, self.call)
            layer.is_token_routed = "experts" in current_key.split(".")
            base: Any = layer.get_base_layer()  # type: ignore[operator]
            layer.quantization_backend = upstream.quantization_backend(base, self.model)
        parts = {c: p for c, p in self.parts(peft_config) if self._part_matches(p, peft_config, current_key)}
        adapters = {container: self._build(container, part, current_key, layer) for container, part in parts.items()}
        starts = {container: part.init_weights and peft_config.init_weights for container, part in parts.items()}
        site = layer.shape_at(current_key, self.__dict__["_heads"].get(current_key))
        layer.update_layer(adapter_name, adapters, peft_config.inference_mode, starts, site)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _part_matches(self, config: AdapterConfig, whole: AdapterConfig, key: str) -> bool:
        return True

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self.__dict__["_name"] = adapter_name
        known = {m for m in model.modules() if isinstance(m, Adapter)}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for adapter in [m for m in model.modules() if isinstance(m, Adapter)]:
            if adapter not in known:
                adapter.on_added()
        attach_call_state(model, self.call)
        self._tell_call_state(model)
        if "transformers.trainer" in sys.modules or self.call.is_penalised or self.call.is_watched:
            attach_to_trainers()

    def _tell_call_state(self, model: nn.Module) -> None:
        """What the adapters that are in `model` now need of a call."""
        adapters, call = [m for m in model.modules() if isinstance(m, Adapter)], self.call
        call.retrieval = {getattr(adapter, "retrieval", "none") for adapter in adapters} - {"none"}
        call.is_penalised = any(adapter.is_penalised for adapter in adapters)
        call.is_watched = any(adapter.is_watched for adapter in adapters)
        if any(getattr(adapter, "uses_exact_statistics", False) for adapter in adapters):
            call.exact_attention |= use_exact_attention(model)
        else:
            restore_attention(model)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._tell_call_state(self.model)

    # merging and unloading

    def _refuse_unmergeable(self, adapter_names: list[str] | None) -> None:
        """Raise ValueError before anything is written, if one of the adapters cannot be merged."""
        written: dict[int, str] = {}  # weight -> the site that would write it
        for module in self.model.modules():
            if isinstance(module, AdapterLayer):
                base = module.get_base_layer()
                has_bias = getattr(base, "bias", None) is not None
                for name in self.active_adapters if adapter_names is None else adapter_names:
                    for adapter in module.adapters_named(name):
                        adapter.refuse_merge(has_bias)
                        other = written.setdefault(id(module.weight), adapter.site_name)
                        if other != adapter.site_name:
                            raise ValueError(
                                f"cannot merge: {other} and {adapter.site_name} share one weight but have adapters of "
                                "their own, so no single weight equals both."
                            )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._refuse_unmergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._refuse_unmergeable(kwargs.get("adapter_names"))
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        detach_call_state(model, self.call)
        for module in model.modules():
            _take_names_from(module)
        restore_attention(model)
        return model

    # calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model, called as a module: peft < 0.21 goes past its hooks, which fill `call`."""
        if torch.compiler.is_compiling():
            return self.model(*args, **kwargs)
        before = self.call.traced = self.call.frame()
        try:
            return self.model(*args, **kwargs)
        finally:
            self.call.unwind(before)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`; `retrieval_quality` (batch,), `retrieval_scores` (batch, K) hold for all steps.

        Raises:
            ValueError: `retrieval_quality` has one value a token, which new tokens would not have.
        """
        given = {n: kwargs.pop(n) for n in ("retrieval_quality", "retrieval_scores") if kwargs.get(n) is not None}
        quality = given.get("retrieval_quality")
        if quality is not None and torch.as_tensor(quality).dim() != 1:
            raise ValueError("`retrieval_quality` in generate must have one value a sequence, shape (batch,).")
        given = {name: CHECKS[name](value, self.call.retrieval) for name, value in given.items()}
        with kept_weights(self.model), self.call.using_ambient(**given, may_repeat=True):
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """A batch whose rows use different adapters: `adapter_names`, one a row, '__base__' for none."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if not isinstance(names, (list, tuple)):
            raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
        unknown = {name for name in names if name != "__base__"} - set(self.peft_config)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        for module in self.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                _give_names_to(module, self.call)
        with self.call.using_ambient(adapter_names=tuple(names)):
            yield

    # loading

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdapterConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As PEFT's, but strict: see `check_saved_keys`."""
        check_saved_keys(model, adapter_name, state_dict)
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return remapped


def check_saved_keys(model: nn.Module, adapter_name: str, keys: Iterable[str]) -> None:
    """Raise where the keys of a file, which hold no adapter name, are not those of the adapter in `model`.

    Raises:
        ValueError: a key is missing, or the model has no place for it.
    """
    expected: set[str] = set()
    prefixes = tuple(f"{config.method}_" for config in AdapterConfig.__subclasses__())
    buffers: set[str] = set()  # counts of a training run; a file of parameters alone does without
    obsolete: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            for container in module.adapter_layer_names:
                if adapter_name in getattr(module, container):
                    adapter = getattr(module, container)[adapter_name]
                    place = _without_wrappers(f"{name}.{container}.")
                    expected |= {place + key for key, _ in adapter.named_parameters()}
                    buffers |= {place + key for key, _ in adapter.named_buffers()}
                    obsolete |= {place + key for key in adapter.obsolete_keys}
    given = {_without_wrappers(key) for key in keys if any(part.startswith(prefixes) for part in key.split("."))}
    unexpected = sorted(key for key in given - expected - buffers if not key.startswith(tuple(obsolete)))
    missing = sorted(expected - given)
    if missing or unexpected:
        raise ValueError(
            f"the file does not hold the adapter {adapter_name!r} that the config describes: "
            + (f"missing {_some(missing)}; " if missing else "")
            + (f"unexpected {_some(unexpected)}; " if unexpected else "")
            + "load it with the config and the base model that it was saved with."
        )


def _without_wrappers(key: str) -> str:
    """A key of a module or file without what FSDP and PeftModel put before it."""
    return key.removeprefix("_fsdp_wrapped_module.").removeprefix("base_model.model.")


class _GiveNames:
    """Forward pre-hook of a module that is trained whole (`modules_to_save`): the adapter names of the call."""

    def __init__(self, call: CallState) -> None:
        self.call = call

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = self.call.values.adapter_names
        if names is None or "adapter_names" in kwargs:
            return args, kwargs
        rows = batch_of(args, kwargs)
        repeats = 1 if rows is None else max(1, rows // len(names))
        return args, {**kwargs, "adapter_names": [name for name in names for _ in range(repeats)]}


def _give_names_to(module: nn.Module, call: CallState) -> None:
    """Put `_GiveNames` on the module, once: a hook a call would be seen by other calls."""
    hooks: Any = module._forward_pre_hooks
    if not any(isinstance(hook, _GiveNames) for hook in list(hooks.values())):
        module.register_forward_pre_hook(_GiveNames(call), with_kwargs=True)


def _take_names_from(module: nn.Module) -> None:
    hooks: Any = module._forward_pre_hooks
    for number in [number for number, hook in hooks.items() if isinstance(hook, _GiveNames)]:
        del hooks[number]
        module._forward_pre_hooks_with_kwargs.pop(number, None)


def _some(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(list(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


upstream.mend_saving(lambda config: isinstance(config, AdapterConfig), check_saved_keys)
upstream.explain_refused_adapters()
