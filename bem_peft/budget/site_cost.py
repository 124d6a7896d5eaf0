"""What a config costs on a model, a function of its sizes, found without the model's weights.

Counted on a skeleton: one module for each kind of site (shape, heads, class), on the meta device, as often as the model
has it, so that a 70B model takes seconds. FLOPs are counted at each site alone: y = layer(x) less base(x), forward and
backward, a token, where every x takes a gradient. W_down of fused experts is counted as one projection that a token
meets once for each expert that it reaches; what each expert has of its own counts for all of them as parameters.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from bem_peft.budget.copies import adapted_copy
from bem_peft.budget.fake_run import FakeRun, adapters_off, mode_of
from bem_peft.budget.flops import DECIDES_BY_VALUES, count_passes, trained_numbers

MATCHED = ("params", "flops")
TOKENS = 16


class ModelCost:
    """What a config costs on a model, a function of its sizes: {"params": ..., "flops": a token}.

    A config with `methods` costs what these cost together.
    """

    def __init__(self, model: nn.Module, config: PeftConfig) -> None:
        self.parts = [MethodCost(model, part) for part in getattr(config, "methods", [config])]
        self._found: list[dict[str, dict[str, float]]] = [{} for _ in self.parts]

    def __call__(self, config: PeftConfig) -> dict[str, float]:
        """Raises ValueError where the sizes do not fit a site."""
        total = dict.fromkeys(MATCHED, 0.0)
        for part, cost, found in zip(getattr(config, "methods", [config]), self.parts, self._found, strict=True):
            key = repr(part)  # a search changes one method of several at a time
            if key not in found:
                found[key] = cost(part)
            for name in MATCHED:
                total[name] += found[key][name]
        return total

    @property
    def has_fixed_parts(self) -> bool:
        """Whether it has adapters of whole parameters, whose cost no other size of the config changes here."""
        return any(part.of_parameters for part in self.parts)

    @property
    def widths(self) -> list[list[int]]:
        """The input widths of the sites of each method, each kind of site once."""
        return [[_width(module) for module in part.modules.values()] for part in self.parts]

    def lora_params(self, rank: int) -> int:
        """What LoRA of `rank` would train at the same projections; at fused experts, one for all of them."""
        sides: dict[str, int] = {}
        for part in self.parts:  # which may stand at the same sites
            sides |= part.sides
        return rank * sum(sides.values())

    def try_sizes(self, config: PeftConfig) -> dict[str, float] | None:
        """As a call, or None where the sizes do not fit a site."""
        try:
            return self(config)
        except ValueError:
            return None


def _own_size(config: PeftConfig, name: str) -> Any:
    """What `rank_pattern` gives to the module `name`, or None."""
    sizes = getattr(config, "rank_pattern", None) or {}
    return sizes.get(get_pattern_key(list(sizes), name)) if sizes else None


class MethodCost:
    """`ModelCost` of one method."""

    def __init__(self, model: nn.Module, config: PeftConfig) -> None:
        skeleton = adapted_copy(_on_meta(model), config)
        kinds: dict[Any, list[str]] = {}
        heads: dict[str, int | None] = {}
        experts: dict[str, _Experts | None] = {}
        self.sides: dict[str, int] = {}  # in + out of every projection
        base = skeleton.get_base_model()
        layers = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
        self.of_parameters = 0  # what PEFT's adapters of whole parameters train, as the config gives their size
        for name in [name for name, module in layers.items() if _adapts_a_parameter(module)]:
            trained = [p.numel() for p in layers.pop(name).parameters() if p.requires_grad]
            self.of_parameters += sum(trained)
        for name, module in layers.items():
            experts[name] = _experts_of(name, module)
            inner = _projection_of(name, module)
            self.sides[name] = sum(inner.weight.shape)  # type: ignore[arg-type]
            count = next((m.num_heads for m in module.modules() if hasattr(m, "num_heads")), 0)
            heads[name] = count or None
            kind = (
                type(inner),
                tuple(inner.weight.shape),  # type: ignore[arg-type]
                inner.bias is not None,
                count,
                name.split(".")[-1],
                str(_own_size(config, name)),
                experts[name],
            )
            kinds.setdefault(kind, []).append(name)
        self.counts = {names[0]: len(names) for names in kinds.values()}
        self.heads = {name: heads[name] for name in self.counts}
        self.experts = {name: experts[name] for name in self.counts}
        self.modules = {name: copy.deepcopy(_projection_of(name, layers[name])) for name in self.counts}
        self._base: dict[tuple[str, bool], int] = {}  # FLOPs of a site without its adapter, which has no sizes

    def __call__(self, config: PeftConfig) -> dict[str, float]:
        """Raises ValueError where the sizes do not fit a site."""
        total = {"params": float(self.of_parameters), "flops": math.nan if self.of_parameters else 0.0}
        for name, count in self.counts.items():
            params, flops = self._one_site(name, config)
            total["params"] += params * count
            total["flops"] += flops * count
        return total

    def _one_site(self, name: str, config: PeftConfig) -> tuple[int, float]:
        site = _Site(copy.deepcopy(self.modules[name]))
        changed = copy.deepcopy(config)
        changed.target_modules, changed.task_type = {"site"}, None
        for field_name in ("layers_to_transform", "exclude_modules", "modules_to_save", "sites", "target_parameters"):
            if hasattr(changed, field_name):
                setattr(changed, field_name, None)
        for field_name in ("rank_pattern", "alpha_pattern"):
            if getattr(changed, field_name, None):
                setattr(changed, field_name, {})
        if _own_size(config, name) is not None:
            changed.rank_pattern = {"site": _own_size(config, name)}
        if hasattr(changed, "num_heads") and changed.num_heads is None and self.heads[name]:
            changed.num_heads = self.heads[name]
        experts = self.experts[name]
        if experts is not None:
            changed.expert_sharing = "shared"  # the site stands for one expert
        adapted = get_peft_model(site, changed)
        stacked, times, reached = ((), 1, 1) if experts is None else (experts.stacked, experts.count, experts.reached)
        trained = [(n.rpartition(".")[2], p.numel()) for n, p in adapted.named_parameters() if p.requires_grad]
        params = sum(size * times if name in stacked else size for name, size in trained)
        if not params:
            return 0, 0.0
        layer = adapted.base_model.model.site
        try:
            return params, reached * self._flops_per_token(name, layer, site.width, is_training=True)
        except DECIDES_BY_VALUES:  # LoKr's module dropout, in training only
            return params, reached * self._flops_per_token(name, layer, site.width, is_training=False)

    def _flops_per_token(self, name: str, layer: nn.Module, width: int, is_training: bool) -> float:
        """Forward and backward of the adapter on one adapted layer of input `width`."""

        def count() -> int:
            try:
                return _on_shapes(layer, width)
            except RuntimeError:  # something reads values: fake tensors know what, and run more
                return _on_fake_tensors(layer, width)

        with mode_of(layer, is_training):
            whole = count()
            if (name, is_training) not in self._base:
                with adapters_off(layer), trained_numbers(layer):
                    self._base[name, is_training] = count()
            return (whole - self._base[name, is_training]) / TOKENS


def _on_shapes(layer: nn.Module, width: int) -> int:
    """FLOPs forward and backward on the meta device, on which `layer` stands: a third of the time of fakes."""
    x = torch.empty(1, TOKENS, width, device="meta", requires_grad=True)
    trainable = [p for p in layer.parameters() if p.requires_grad]
    forward, backward, _ = count_passes(lambda: layer(x), [*trainable, x], nullcontext())
    return forward + backward


def _on_fake_tensors(layer: nn.Module, width: int) -> int:
    """FLOPs forward and backward, as on a CPU."""
    run = FakeRun(layer)
    with run.mode:
        x = torch.empty(1, TOKENS, width, device="cpu", requires_grad=True)
    forward, backward, _ = count_passes(lambda: run.call(x), [*run.trainable, x], run.mode)
    return forward + backward


@dataclass(frozen=True)
class _Experts:
    """Fused experts: how many there are, how many a token reaches, the parameters that each has of its own."""

    count: int
    reached: int
    stacked: tuple[str, ...]


def _experts_of(name: str, layer: nn.Module) -> _Experts | None:
    """None where `layer` is no adapter of this package at fused experts."""
    site: Any = getattr(layer, "experts_site", None)
    if site is None:
        return None
    if site.experts_per_token is None:
        raise ValueError(
            f"{name}: the model's config does not say how many experts a token reaches (num_experts_per_tok, for "
            "instance), so that the FLOPs of a token are not known; set it in the config."
        )
    stacked = {part for module in layer.modules() for part in getattr(module, "stacked", ())}
    return _Experts(site.num_experts, site.experts_per_token, tuple(sorted(stacked)))


def _projection_of(name: str, layer: BaseTunerLayer) -> nn.Module:
    """The projection that `layer` adapts; of fused experts one expert's, as a projection of its own."""
    site: Any = getattr(layer, "experts_site", None)
    if site is not None:
        return nn.Linear(site.in_features, site.out_features, bias=False, device="meta")
    inner: nn.Module = layer.get_base_layer()
    if not isinstance(getattr(inner, "weight", None), torch.Tensor):
        raise ValueError(
            f"{name}: a size search knows projections and this package's adapters of fused experts, and this is a "
            f"{type(inner).__name__}: set the sizes yourself, and count the adapted model (`count_parameters`)."
        )
    return inner


def _adapts_a_parameter(layer: BaseTunerLayer) -> bool:
    """Whether this is PEFT's adapter of a whole parameter (`target_parameters`), of all experts for instance."""
    return hasattr(layer, "parameter_name") and not hasattr(layer, "experts_site")


def _width(module: nn.Module) -> int:
    return int(getattr(module, "in_features", 0) or module.weight.shape[0])  # type: ignore[index]


class _Site(nn.Module):
    """A model of one projection."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.site = module
        self.width = _width(module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site(x)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the modules whose weights have shapes only."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)
