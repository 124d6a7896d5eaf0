"""Several methods as one adapter: one name, one config, one file.

At a site that several methods share they apply in the order PT1, PT2, PT3, PT4, each to what the one before returned.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, _maybe_include_all_linear_layers

from bem_peft import field_checks as check
from bem_peft.tuners.base.adapter_config import AdapterConfig, default_of
from bem_peft.tuners.base.model import AdapterModel
from bem_peft.tuners.base.weighted import weighted_config
from bem_peft.tuners.methods import METHODS
from bem_peft.tuners.pt1_head_gating import HeadGroupGatingConfig
from bem_peft.tuners.pt3_kronecker import KroneckerConfig

PARTS = {
    config_cls.method.replace("bem_", "bem_composite_", 1): (config_cls, adapter_cls)
    for model in METHODS
    for config_cls, adapter_cls in model.adapter_classes.values()
}
CONFIGS = {config_cls.method.upper(): config_cls for config_cls, _ in PARTS.values()}
# given in the composite, these hold for each method that does not set its own
INHERITED = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fused_experts",
    "expert_sharing",
)
# a method's own; in the composite they would have no meaning
OWN = ("rank_pattern", "sites", "scaling")
# the composite's; in a method they would have no meaning
WHOLE = (*(f.name for f in dataclasses.fields(PeftConfig) if f.name != "peft_type"), "modules_to_save")


@dataclass(init=False)
class CompositeConfig(AdapterConfig):
    """Config of several methods in one adapter: `CompositeConfig([HeadGroupGatingConfig(), KroneckerConfig()])`.

    Sizes, scaling and sites are each method's own. `target_modules`, `exclude_modules`, `layers_to_transform`,
    `layers_pattern`, `fused_experts` and `expert_sharing` given here hold for the methods that leave theirs at the
    default; `init_weights=False` holds for all. What PEFT itself reads (`task_type`, `inference_mode`, ...) stands
    here alone.
    """

    methods: list[Any] = field(
        default_factory=list,
        metadata={"help": "Configs of different methods, or their dictionaries; default PT1 and PT3."},
    )

    method: ClassVar[str] = "bem_composite"
    neighbours: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("r", "rank", "lora_alpha", "alpha", "lora_dropout", "dropout"), "each method's own: see `methods`"
    )

    def __init__(
        self,
        methods: list[Any] | None = None,
        task_type: Any = None,
        peft_type: Any = None,
        auto_mapping: dict[str, Any] | None = None,
        peft_version: str | None = None,
        base_model_name_or_path: str | None = None,
        revision: str | None = None,
        inference_mode: bool = False,
        target_modules: list[str] | set[str] | str | None = None,
        exclude_modules: list[str] | set[str] | str | None = None,
        modules_to_save: list[str] | None = None,
        layers_to_transform: list[int] | int | None = None,
        layers_pattern: list[str] | str | None = None,
        rank_pattern: dict[str, Any] | None = None,
        sites: list[str] | None = None,
        fused_experts: str = "adapt",
        expert_sharing: str = "shared",
        scaling: float = 2.0,
        budget: str | None = None,
        init_weights: bool = True,
    ) -> None:
        self.methods = [HeadGroupGatingConfig(), KroneckerConfig()] if methods is None else methods
        self.task_type, self.peft_type, self.auto_mapping = task_type, peft_type, auto_mapping
        self.peft_version, self.base_model_name_or_path = peft_version, base_model_name_or_path
        self.revision, self.inference_mode = revision, inference_mode
        self.target_modules, self.exclude_modules = target_modules, exclude_modules
        self.modules_to_save = modules_to_save
        self.layers_to_transform, self.layers_pattern = layers_to_transform, layers_pattern
        self.rank_pattern, self.sites = {} if rank_pattern is None else rank_pattern, sites
        self.fused_experts, self.expert_sharing = fused_experts, expert_sharing
        self.scaling, self.budget, self.init_weights = scaling, budget, init_weights
        self.__post_init__()

    def __post_init__(self) -> None:
        own: dict[str, Any] = dict(zip(OWN, ({}, None, 2.0), strict=True))
        for name, default in own.items():
            if getattr(self, name) != default:
                raise check.field_error(
                    name, getattr(self, name), "is each method's own in a composite", "set it in the methods' configs"
                )
        super().__post_init__()
        if not isinstance(self.methods, list) or not self.methods:
            raise TypeError(f"`methods` = {self.methods!r}: must be a non-empty list of configs.")
        self.methods = [self._method_config(given) for given in self.methods]
        kinds = [config.method for config in self.methods]
        if len(set(kinds)) != len(kinds):
            raise check.field_error("methods", kinds, "must be different methods")
        for config in self.methods:
            if config.budget is not None:
                raise check.field_error(
                    "methods", config.budget, "`budget` of one of several methods", "set the composite's"
                )
        for name in INHERITED:
            self._hand_down(name)

    def _hand_down(self, name: str) -> None:
        """Give the composite's value of a field to the methods that have none of their own."""
        value = getattr(self, name)
        unset = default_of(self, name)
        if value == unset:
            return
        takers = [config for config in self.methods if getattr(config, name) == unset]
        for config in takers:
            setattr(config, name, value)
        is_read = name == "exclude_modules" or any(getattr(config, name) == value for config in self.methods)
        is_joined = name == "target_modules" and value == joined_targets(self.methods)
        if not (is_read or is_joined or self.is_from_file):
            raise check.field_error(
                name, value, "every method has its own", "set it in the composite or in each method"
            )

    @property
    def size_fields(self) -> tuple[str, ...]:
        """What a budget search may change: "0.rank_per_group" is `rank_per_group` of the first method."""
        return tuple(f"{i}.{name}" for i, part in enumerate(self.methods) for name in part.size_fields)

    def further_sizes(self, widths: Sequence[Sequence[int]]) -> dict[str, list[int]]:
        """Those of its methods, "1.u_dim" of the second."""
        parts = enumerate(zip(self.methods, widths, strict=True))
        return {f"{i}.{n}": values for i, (part, own) in parts for n, values in part.further_sizes([own]).items()}

    def with_sizes(self, **sizes: int) -> AdapterConfig:
        """This config with other sizes of its methods, named as in `size_fields`."""
        methods = []
        for i, part in enumerate(self.methods):
            own = {name.partition(".")[2]: size for name, size in sizes.items() if name.startswith(f"{i}.")}
            methods.append(part.with_sizes(**own))
        changed = copy.deepcopy(self)
        changed.methods = methods
        return changed

    def _method_config(self, given: AdapterConfig | dict[str, Any]) -> AdapterConfig:
        """A copy of one method's config (the composite fills in names), checked to set nothing that is the whole's."""
        if isinstance(given, dict):
            kind = str(getattr(given.get("peft_type"), "value", given.get("peft_type")))
            if kind not in CONFIGS:
                raise check.field_error("methods", kind, f"`peft_type` must be one of {sorted(CONFIGS)}")
            cls = CONFIGS[kind]
            known = {f.name for f in dataclasses.fields(cls)}
            unknown = sorted(set(given) - known)
            if unknown and "auto_mapping" not in given:  # which a saved config has, and a written one has not
                raise check.field_error("methods", kind, f"has no field {unknown}", "remove it")
            if unknown:
                warnings.warn(
                    f"Unexpected keyword arguments {unknown} for class {cls.__name__} in `methods`, these are ignored. "
                    "The file was probably saved by a newer bem_peft: pip install -U bem_peft",
                    stacklevel=2,
                )
            values = {name: value for name, value in given.items() if name in known}
        elif type(given) not in CONFIGS.values():
            raise TypeError(
                f"`methods` holds a {type(given).__name__}: must be configs of "
                f"{', '.join(cls.__name__ for cls in CONFIGS.values())}."
            )
        else:
            cls, values = type(given), {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
        for name in WHOLE:
            default = None if name == "peft_version" else default_of(self, name)
            value = values.pop(name, default)
            is_stamp = name == "peft_version"  # PEFT's own, of the version that wrote it
            if value not in (default, getattr(self, name)) and not (is_stamp or self.is_from_file):
                raise check.field_error(name, value, "stands in the composite, not in a method", "set it there")
        was_accepted = self.is_from_file or (not isinstance(given, dict) and given.is_from_file)
        method = cls(**values, inference_mode=was_accepted, peft_version=self.peft_version)
        method.inference_mode = self.inference_mode
        return method

    def to_dict(self) -> dict[str, Any]:
        """As of any config; the methods as dictionaries."""
        whole = super().to_dict()
        for part in whole["methods"]:
            for name, value in part.items():
                if isinstance(value, set):
                    part[name] = sorted(value)
        return whole


def joined_targets(methods: list[AdapterConfig]) -> set[str] | str | None:
    """The methods' `target_modules` as one: names, or a pattern where one of them is one; None: not all are known."""
    named = [config.target_modules for config in methods]
    if any(targets is None for targets in named):
        return None
    if all(isinstance(targets, set) for targets in named):
        return set().union(*named)  # type: ignore[arg-type]
    return "|".join(
        f"({t})" if isinstance(t, str) else "|".join(rf"(.*\.)?{re.escape(n)}" for n in sorted(t))  # type: ignore[arg-type]
        for t in named
    )


def matches(config: AdapterConfig, key: str) -> bool | re.Match[str] | None:
    """Whether one method's config adapts the module `key`."""
    found = BaseTuner._check_target_module_exists(config, key)
    return None if isinstance(found, _ExcludedModule) else found


class CompositeModel(AdapterModel, config=CompositeConfig, adapters=PARTS):
    """A model with several methods; made by `get_peft_model(model, CompositeConfig([...]))`."""

    def parts(self, config: CompositeConfig) -> Iterator[tuple[str, AdapterConfig]]:
        for container, (config_cls, _) in PARTS.items():
            for method in config.methods:
                if isinstance(method, config_cls):
                    method.inference_mode = config.inference_mode  # PEFT sets the composite's when it loads
                    yield container, method

    def _prepare_adapter_config(self, peft_config: CompositeConfig, model_config: dict[str, Any]) -> CompositeConfig:
        for _, config in self.parts(peft_config):
            config.task_type = config.task_type or peft_config.task_type
            _maybe_include_all_linear_layers(config, self.model)
        super()._prepare_adapter_config(peft_config, model_config)
        joined = joined_targets(peft_config.methods)
        # a regular expression among them, beside the composite's own names: `matches` decides
        if isinstance(joined, set) or peft_config.target_modules is None:
            peft_config.target_modules = joined
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: CompositeConfig, key: str) -> bool | re.Match[str] | None:
        if isinstance(BaseTuner._check_target_module_exists(peft_config, key), _ExcludedModule):
            return _ExcludedModule()
        return next((found for config in peft_config.methods if (found := matches(config, key))), None)

    def weighted_config(self, configs: list[Any], weights: list[float], sites: Any, **whole: Any) -> CompositeConfig:
        methods = []
        for container, own in sites.items():
            given = [(dict(self.parts(config)).get(container), w) for config, w in zip(configs, weights, strict=True)]
            parts, shares = zip(*((part, w) for part, w in given if part is not None), strict=True)
            methods.append(weighted_config(PARTS[container][0], parts, shares, own))
        return CompositeConfig(methods, **whole)

    def _part_matches(self, config: AdapterConfig, whole: AdapterConfig, key: str) -> bool:
        return bool(matches(config, key))
