"""The layer around a module of fused experts: its adapters act on what leaves W_down of an expert.

An adapter is one for all experts of the layer, or holds parameters (E, ...) of each (`expert_twins`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bem_peft.sites.find import ExpertSite
from bem_peft.tuners.base.adapter import Adapter, SiteShape
from bem_peft.tuners.base.expert_twins import one_pass, twins
from bem_peft.tuners.base.experts import attach
from bem_peft.tuners.base.layer import AdapterLayer
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.calls.routing import CHOICES, Routing
from bem_peft.tuners.steps.brake import Braked


class AdapterExperts(nn.Module, AdapterLayer):
    """The experts, whose products with W_down are  y = base(x), then y <- adapter(x, y)  for each active adapter."""

    adapter_layer_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, call: CallState, site: ExpertSite) -> None:
        super().__init__()
        AdapterLayer.__init__(self, base_layer, call, (site.in_features, site.out_features))
        self._active_adapter = adapter_name
        self.is_token_routed = True
        self.experts_site = site
        self.site_name, self.parameter, self.is_transposed = site.name, site.parameter, site.is_transposed
        self.passes: list[
            None
        ] = []  # as long as forward passes run now; a list, which threads and compilers may change
        attach(self.experts, site.parameter, self)

    @property
    def experts(self) -> nn.Module:
        """The module that owns W_down, below any PEFT layers."""
        found: nn.Module = AdapterLayer.get_base_layer(self)
        return found

    @property
    def weight(self) -> nn.Parameter:
        """W_down of all experts, as the module holds it."""
        found = self.experts._parameters[self.parameter]
        assert found is not None
        return found

    @property
    def bias(self) -> nn.Parameter | None:
        """(E, out), where the experts have one."""
        found: nn.Parameter | None = self.experts._parameters.get(f"{self.parameter}_bias")
        return found

    def base_weight(self) -> torch.Tensor:
        """The mean of the experts' W_down, (out, in): what an adapter of all of them starts from."""
        return self._laid_out().float().mean(0).to(self.weight.dtype)

    def _laid_out(self) -> torch.Tensor:
        weight = self.weight.data
        return weight.transpose(1, 2) if self.is_transposed else weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        self.passes.append(None)
        routing = self._routing(args, kwargs)
        if routing is not None:
            self.call.routing = routing
        try:
            if torch.compiler.is_compiling():
                out = self.base_layer(*args, **kwargs)
            else:
                with one_pass():
                    out = self.base_layer(*args, **kwargs)
        finally:
            if routing is not None:
                self.call.routing = None
            self.passes.pop()
        return out if routing is None else routing.carry(out)

    def _routing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routing | None:
        """Where an adapter that acts has a penalty of tokens: which experts they take."""
        if not self.training or not self.call.is_penalised or self._disable_adapters or self.merged_adapters:
            return None
        if not any(a.token_penalties and a.carries_penalties(self.weight) for a in self._acting()):
            return None
        choice = args[1] if len(args) > 1 else next(kwargs[name] for name in CHOICES if name in kwargs)
        config: Any = self.experts.config
        return Routing(choice, config._experts_implementation or "eager")

    def changes_output(self) -> bool:
        """Whether an adapter acts in this call."""
        if self._disable_adapters:
            return False
        if self.call.values.adapter_names is not None:
            raise ValueError(
                f"`adapter_names` at {self.site_name}: its rows are tokens that a router chose, so that the rows of "
                "the batch cannot be told; use one adapter a batch, or exclude the experts."
            )
        return not self.merged_adapters and any(True for _ in self._acting())

    def _acting(self) -> Iterator[Adapter]:
        for name in [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter:
            yield from self.adapters_named(name)

    def adapt(self, x: torch.Tensor, y: torch.Tensor, experts: Any, has_bias: bool = False) -> torch.Tensor:
        """y' of rows x (..., in) with y (..., out).

        Args:
            experts: an id, or the ids (N,) of the entries of the first axis.
            has_bias: whether y has the experts' bias already; else it is added after this, to y'.
        """
        bias = None if has_bias else self.bias
        routing = self.call.routing
        for adapter in self._acting():
            if routing is not None:
                routing.meet(experts, self.site_name)
            own = None
            if bias is not None and adapter.reads_output:
                own = bias[experts].to(y.dtype)
                own = own.unsqueeze(1) if own.dim() == 2 and y.dim() == 3 else own
                y = y + own
            y = adapter(x, y) if adapter.num_experts is None else adapter(x, y, experts=experts)
            y = y if own is None else y - own
        return y

    # merging: one update, into the weight of every expert

    def _merged(self, adapters: Sequence[Adapter], back: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights (E, out, in) and biases of all experts with the adapters in them, or (`back`) taken out of them."""
        weights = self._laid_out().clone()
        biases = None if self.bias is None else self.bias.data.clone()
        experts = weights.shape[0]
        each = [[adapter] * experts if adapter.num_experts is None else twins(adapter) for adapter in adapters]
        for e in range(experts):
            weight, bias = weights[e], None if biases is None else biases[e]
            for own in reversed(each) if back else each:
                weight, bias = (own[e].unmerge_from if back else own[e].merge_into)(weight, bias)
            weights[e] = weight
            if biases is not None and bias is not None:
                biases[e] = bias
        return weights, biases

    def _write(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight.data = (weight.transpose(1, 2) if self.is_transposed else weight).contiguous()
        if bias is not None and self.bias is not None:
            self.bias.data = bias

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What merging `adapter_name` would add to W_down of every expert, as the parameter is laid out."""
        merged, _ = self._merged(list(self.adapters_named(adapter_name)))
        delta = merged - self._laid_out()
        return delta.transpose(1, 2) if self.is_transposed else delta

    def update_layer(
        self, adapter_name: str, adapters: dict[str, Adapter], inference_mode: bool, init_weights: dict[str, bool],
        site: SiteShape,
    ) -> None:  # fmt: skip
        """As `AdapterLayer.update_layer`; an adapter of each expert starts from that expert's own W_down."""
        stacked = {container: adapter for container, adapter in adapters.items() if adapter.num_experts is not None}
        for container, adapter in stacked.items():
            with torch.no_grad():
                for e, own in enumerate(twins(adapter)):
                    weight = functools.partial(self._weight_of, e)
                    own.reset_parameters(init_weights[container], replace(site, weight=weight))
            if isinstance(adapter, Braked):
                adapter.keep_as_good()
            getattr(self, container)[adapter_name] = adapter
        rest = {container: adapter for container, adapter in adapters.items() if container not in stacked}
        super().update_layer(adapter_name, rest, inference_mode, init_weights, site)

    def _weight_of(self, expert: int) -> torch.Tensor:
        """W_down of one expert, (out, in)."""
        return self._laid_out()[expert]

    def shape_at(self, name: str, num_heads: int | None) -> SiteShape:
        return SiteShape(name, self.in_features, self.out_features, None, self.base_weight)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.weight.device, self.weight.dtype
