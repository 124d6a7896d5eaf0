"""The layer around a module of fused experts: its adapters act on what leaves W_down of an expert, one for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from bem_peft.sites.find import ExpertSite
from bem_peft.tuners.base.adapter import Adapter, SiteShape
from bem_peft.tuners.base.experts import attach
from bem_peft.tuners.base.layer import AdapterLayer
from bem_peft.tuners.calls.call_state import CallState


class AdapterExperts(nn.Module, AdapterLayer):
    """The experts, whose products with W_down are  y = base(x), then y <- adapter(x, y)  for each active adapter."""

    adapter_layer_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, call: CallState, site: ExpertSite) -> None:
        super().__init__()
        AdapterLayer.__init__(self, base_layer, call, (site.in_features, site.out_features))
        self._active_adapter = adapter_name
        self.is_token_routed = True
        self.site_name, self.parameter, self.is_transposed = site.name, site.parameter, site.is_transposed
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
        return self.base_layer(*args, **kwargs)

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
        for adapter in self._acting():
            if bias is not None and adapter.reads_output:
                own = bias[experts].to(y.dtype)
                own = own.unsqueeze(1) if own.dim() == 2 and y.dim() == 3 else own
                y = adapter(x, y + own) - own
            else:
                y = adapter(x, y)
        return y

    # merging: one update, into the weight of every expert

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As `AdapterLayer.merge`."""
        for name in check_adapters_to_merge(self, adapter_names):
            adapters = list(self.adapters_named(name))
            if not adapters:
                continue
            weights, biases = self._merged(adapters)
            if safe_merge and not (torch.isfinite(weights).all() and (biases is None or biases.isfinite().all())):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._write(weights, biases)
            self.merged_adapters.append(name)

    def _merged(self, adapters: list[Adapter], back: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights (E, out, in) and biases of all experts with the adapters in them, or (`back`) taken out of them."""
        weights = self._laid_out().clone()
        biases = None if self.bias is None else self.bias.data.clone()
        for e in range(weights.shape[0]):
            weight, bias = weights[e], None if biases is None else biases[e]
            for adapter in reversed(adapters) if back else adapters:
                weight, bias = (adapter.unmerge_from if back else adapter.merge_into)(weight, bias)
            weights[e] = weight
            if biases is not None and bias is not None:
                biases[e] = bias
        return weights, biases

    def unmerge(self) -> None:
        """Take all merged adapters out again, the last one first."""
        while self.merged_adapters:
            self._write(*self._merged(list(self.adapters_named(self.merged_adapters[-1])), back=True))
            self.merged_adapters.pop()

    def _write(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight.data = (weight.transpose(1, 2) if self.is_transposed else weight).contiguous()
        if bias is not None and self.bias is not None:
            self.bias.data = bias

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What merging `adapter_name` would add to W_down of every expert, as the parameter is laid out."""
        merged, _ = self._merged(list(self.adapters_named(adapter_name)))
        delta = merged - self._laid_out()
        return delta.transpose(1, 2) if self.is_transposed else delta

    def shape_at(self, name: str, num_heads: int | None) -> SiteShape:
        return SiteShape(name, self.in_features, self.out_features, None, self.base_weight)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.weight.device, self.weight.dtype
