"""The tuner: finds the sites, checks that every adapter can be built, then puts the layers into the model.

Nothing is changed before everything is known to fit: each adapter is built once on the meta device first.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from bem_peft import upstream
from bem_peft.kept import kept_weights
from bem_peft.sites.find import ATTENTION_OUTPUT
from bem_peft.tuners.base import registry
from bem_peft.tuners.base.adapter import Adapter, SiteShape
from bem_peft.tuners.base.adapter_config import AdapterConfig
from bem_peft.tuners.base.expert_layer import AdapterExperts
from bem_peft.tuners.base.expert_twins import stack
from bem_peft.tuners.base.experts import detach
from bem_peft.tuners.base.field_help import with_arguments
from bem_peft.tuners.base.layer import AdapterLayer, AdapterLinear, of_method, projection_shape
from bem_peft.tuners.base.plan import Part, check_plan, drop_base_prefix, found_targets, known_sites
from bem_peft.tuners.base.saved_keys import check_saved_keys
from bem_peft.tuners.base.weighted import check_arguments, fill, sites_of, weighted_config
from bem_peft.tuners.calls.attention_stats import restore_attention, use_exact_attention
from bem_peft.tuners.calls.call_state import (
    CallState,
    attach_call_state,
    detach_call_state,
    find_call_state,
    give_names_to,
)
from bem_peft.tuners.calls.loop import attach_to_trainers
from bem_peft.tuners.calls.retrieval import CHECKS

Methods = Mapping[str, tuple[type[AdapterConfig], type[Adapter]]]


class AdapterModel(BaseTuner):
    """Base of the methods' tuners. A method's own names its classes, and is registered with PEFT by that:

        class MyModel(AdapterModel, config=MyConfig, adapter=MyAdapter): ...

    Saved keys, and the attribute of a layer that holds the adapters, are called after `MyConfig.method`. A tuner of
    several methods gives `adapters` instead: attribute -> (config class, adapter class).
    """

    adapter_classes: ClassVar[Methods] = {}
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # sites are found from the structure instead
    tuner_layer_cls: ClassVar[type[AdapterLayer]]
    linear_cls: ClassVar[type[AdapterLinear]]
    experts_cls: ClassVar[type[AdapterExperts]]
    model: Any

    def __init_subclass__(
        cls,
        config: type[AdapterConfig],
        adapter: type[Adapter] | None = None,
        adapters: Methods | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        cls.prefix = f"{config.method}_"
        if adapter is not None:
            adapters = {f"{config.method}_adapter": (config, adapter)}
        cls.adapter_classes = adapters or {}
        containers = tuple(cls.adapter_classes)
        cls.tuner_layer_cls = of_method(AdapterLayer, cls, "tuner_layer_cls", adapter_layer_names=containers)
        shared = {"marker": cls.tuner_layer_cls, "adapter_layer_names": containers}
        cls.linear_cls = of_method(AdapterLinear, cls, "linear_cls", **shared)
        cls.experts_cls = of_method(AdapterExperts, cls, "experts_cls", **shared)
        with_arguments(config)
        registry.register(config.method, config, cls)

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
        drop_base_prefix(self.model, peft_config)
        if peft_config.budget is not None and not peft_config.is_from_file:
            assert registry.choose_sizes is not None
            registry.choose_sizes(self.model, peft_config)
        for _, config in self.parts(peft_config):
            drop_base_prefix(self.model, config)
            if config.target_modules in (None, config.found_modules):  # found anew: a model may be another one
                config.target_modules = None
                config.target_modules = set(found_targets(self.model, config))
                config.found_modules = frozenset(config.target_modules)
        return peft_config

    def _prepare_model(self, peft_config: AdapterConfig, model: nn.Module) -> None:
        """Build every adapter on the meta device, so that an error comes before any change."""
        table = known_sites(model)
        self.__dict__["_heads"] = {site.name: site.num_heads for site in table.sites}
        self.__dict__["_outputs"] = {site.name for site in table.sites if site.role == ATTENTION_OUTPUT}
        self.__dict__["_experts"] = {site.name: site for site in table.experts}
        parts = [Part(*part, self.adapter_classes[part[0]][1]) for part in self.parts(peft_config)]
        containers, experts = tuple(self.adapter_classes), self.__dict__["_experts"].keys()
        check_plan(model, self.__dict__["_name"], parts, containers, experts, self._build)

    def _build(self, container: str, config: AdapterConfig, name: str, target: nn.Module) -> Adapter:
        """The adapter of one method for the module `name`."""
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        experts = self.__dict__["_experts"].get(name)
        if experts is not None:
            config.check_experts(name)
            in_features, out_features = experts.in_features, experts.out_features
        else:
            in_features, out_features = projection_shape(base)
        heads, outputs = self.__dict__["_heads"], self.__dict__["_outputs"]
        is_output = name in outputs if heads else None
        site = SiteShape(name, in_features, out_features, heads.get(name), is_output=is_output)
        adapter = self.adapter_classes[container][1](config.at(name), site, self.call)
        adapter.at_experts = experts is not None
        if experts is not None and experts.runs_all and adapter.moves_zero:
            raise ValueError(
                f"{type(adapter).__name__} at {name}: every token runs through all experts there, with zeros where it "
                "is not routed to, and a beta in units of its own would move these; set beta_unit='rms' or max_beta=0."
            )
        if experts is not None and config.expert_sharing != "shared":
            own = adapter.factors if config.expert_sharing == "factors" else tuple(adapter._parameters)
            own = tuple(name for name in own if name in adapter._parameters)
            stack(adapter, experts.num_experts, experts.experts_per_token, own)
        return adapter

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
        layer: Any
        experts = self.__dict__["_experts"].get(current_key)
        if isinstance(target, self.tuner_layer_cls):
            layer = target
        elif experts is not None:
            layer = self.experts_cls(target, adapter_name, self.call, experts)
        else:
            layer = self.linear_cls(target, adapter_name, self.call)
            layer.is_token_routed = "experts" in current_key.split(".")
            base: Any = layer.get_base_layer()
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
        added = [m for m in model.modules() if isinstance(m, Adapter) and m not in known]
        for adapter in added:
            adapter.on_added()
        for notice in dict.fromkeys(adapter.notice for adapter in added):
            if notice is not None:
                warnings.warn(notice, stacklevel=2)
        attach_call_state(model, self.call)
        self._tell_call_state(model)
        if "transformers.trainer" in sys.modules or self.call.is_penalised or self.call.is_watched:
            attach_to_trainers()

    def _tell_call_state(self, model: nn.Module) -> None:
        """What the adapters that are in `model` now need of a call."""
        adapters, call = [m for m in model.modules() if isinstance(m, Adapter)], self.call
        call.retrieval = {adapter.retrieval for adapter in adapters} - {"none"}
        call.is_penalised = any(adapter.is_penalised for adapter in adapters)
        call.is_watched = any(adapter.is_watched for adapter in adapters)
        if any(adapter.reads_attention_rows for adapter in adapters):
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

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AdapterExperts) and new_module is child.base_layer:  # PEFT would give them a `weight`
            if new_module is child.experts:
                detach(new_module)
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._refuse_unmergeable(kwargs.get("adapter_names"))
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        detach_call_state(model, self.call)
        restore_attention(model)
        return model

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        **options: Any,
    ) -> None:
        """Add `adapter_name`, frozen, whose update at every site is exactly  sum_i weights[i] * that of adapters[i].

        Raises:
            ValueError: a method's updates depend on the token, so that no adapter is their sum; the adapters' shapes do
                not fit; another `combination_type` or further options of LoRA. Nothing is added then.
        """
        check_arguments(self.model, self.peft_config, adapters, weights, adapter_name, combination_type, options)
        sites = sites_of(self.model, adapters, weights)
        configs = [self.peft_config[name] for name in adapters]
        whole = {name: getattr(configs[0], name) for name in ("task_type", "base_model_name_or_path", "revision")}
        self.peft_config[adapter_name] = self.weighted_config(configs, weights, sites, **whole)
        try:
            self.inject_adapter(self.model, adapter_name)
        except ValueError:
            del self.peft_config[adapter_name]
            raise
        fill(self.model, adapter_name, sites)

    def weighted_config(self, configs: list[Any], weights: list[float], sites: Any, **whole: Any) -> AdapterConfig:
        """The config of the sum of adapters with these configs at `sites`, container -> site -> adapters."""
        ((container, (cls, _)),) = self.adapter_classes.items()
        return weighted_config(cls, configs, weights, sites[container], **whole)

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
                give_names_to(module, self.call)
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


upstream.mend_saving(lambda config: isinstance(config, AdapterConfig), check_saved_keys)
upstream.explain_refused_adapters()
