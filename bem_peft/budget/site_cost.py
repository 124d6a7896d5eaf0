"""What a config costs on a model, a function of its sizes, found without the model's weights.

Counted on a skeleton: one module for each kind of site (shape, heads, class), on the meta device, as often as the model
has it, so that a 70B model takes seconds. FLOPs are counted at each site alone: y = layer(x) less base(x), forward and
backward, a token, where every x takes a gradient.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from bem_peft.budget.check import adapted_copy
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
    def widths(self) -> list[list[int]]:
        """The input widths of the sites of each method, each kind of site once."""
        return [[_width(module) for module in part.modules.values()] for part in self.parts]

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
        base = skeleton.get_base_model()
        for name, module in base.named_modules():
            if isinstance(module, BaseTunerLayer):
                inner = module.get_base_layer()
                if not isinstance(getattr(inner, "weight", None), torch.Tensor):
                    raise ValueError(
                        f"{name}: a size search knows projections alone, and this is a {type(inner).__name__}: set "
                        "the sizes yourself, and count what the adapted model costs with `count_parameters`."
                    )
                count = next((m.num_heads for m in module.modules() if hasattr(m, "num_heads")), 0)
                shape = tuple(inner.weight.shape)
                kind = (
                    type(inner),
                    shape,
                    inner.bias is not None,
                    count,
                    name.split(".")[-1],
                    str(_own_size(config, name)),
                )
                kinds.setdefault(kind, []).append(name)
                heads[name] = count or None
        self.counts = {names[0]: len(names) for names in kinds.values()}
        self.heads = {name: heads[name] for name in self.counts}
        self.modules = {name: copy.deepcopy(base.get_submodule(name).get_base_layer()) for name in self.counts}
        self._base: dict[tuple[str, bool], int] = {}  # FLOPs of a site without its adapter, which has no sizes

    def __call__(self, config: PeftConfig) -> dict[str, float]:
        """Raises ValueError where the sizes do not fit a site."""
        total = {"params": 0.0, "flops": 0.0}
        for name, count in self.counts.items():
            params, flops = self._one_site(name, config)
            total["params"] += params * count
            total["flops"] += flops * count
        return total

    def _one_site(self, name: str, config: PeftConfig) -> tuple[int, float]:
        site = _Site(copy.deepcopy(self.modules[name]))
        changed = copy.deepcopy(config)
        changed.target_modules, changed.task_type = {"site"}, None
        for field_name in ("layers_to_transform", "exclude_modules", "modules_to_save", "sites"):
            if hasattr(changed, field_name):
                setattr(changed, field_name, None)
        for field_name in ("rank_pattern", "alpha_pattern"):
            if getattr(changed, field_name, None):
                setattr(changed, field_name, {})
        if _own_size(config, name) is not None:
            changed.rank_pattern = {"site": _own_size(config, name)}
        if hasattr(changed, "num_heads") and changed.num_heads is None and self.heads[name]:
            changed.num_heads = self.heads[name]
        adapted = get_peft_model(site, changed)
        params = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        if not params:
            return 0, 0.0
        layer = adapted.base_model.model.site
        try:
            return params, self._flops_per_token(name, layer, site.width, is_training=True)
        except DECIDES_BY_VALUES:  # LoKr's module dropout, in training only
            return params, self._flops_per_token(name, layer, site.width, is_training=False)

    def _flops_per_token(self, name: str, layer: nn.Module, width: int, is_training: bool) -> float:
        """Forward and backward of the adapter on one adapted layer of input `width`."""

        def count() -> int:
            run = FakeRun(layer)
            with run.mode:
                x = torch.empty(1, TOKENS, width, device="cpu", requires_grad=True)
            forward, backward, _ = count_passes(lambda: run.call(x), [*run.trainable, x], run.mode)
            return forward + backward

        with mode_of(layer, is_training):
            whole = count()
            if (name, is_training) not in self._base:
                with adapters_off(layer), trained_numbers(layer):
                    self._base[name, is_training] = count()
            return (whole - self._base[name, is_training]) / TOKENS


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
