"""The layer that stands in for a projection: the base layer, opaque, and the adapters that change its output."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import transpose
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from transformers.pytorch_utils import Conv1D

from bem_peft import upstream
from bem_peft.kernels.plain_call import is_plain_thread
from bem_peft.tuners.base.adapter import Adapter, SiteShape
from bem_peft.tuners.calls.attention_stats import AttentionRows
from bem_peft.tuners.calls.call_frame import leave_rows, take_rows
from bem_peft.tuners.calls.call_state import CallState

# projections that return a tensor of their own, as long as nobody has put another forward or __call__ in their place
PRISTINE = {cls: (cls.forward, cls.__call__) for cls in (nn.Linear, Conv1D)}


def is_observed(module: nn.Module) -> bool:
    """Whether somebody beside the caller sees what `module` takes and returns: a hook, another forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )


def returns_its_own(base: nn.Module) -> bool:
    """Whether nobody else holds what the projection `base` returns, so that it may be written into."""
    cls = type(base)
    return cls in PRISTINE and (cls.forward, cls.__call__) == PRISTINE[cls] and not is_observed(base)


def projection_shape(base_layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a projection. Raises TypeError for anything else."""
    if isinstance(base_layer, Conv1D):
        return int(base_layer.nx), int(base_layer.nf)
    in_features, out_features = getattr(base_layer, "in_features", None), getattr(base_layer, "out_features", None)
    if isinstance(in_features, int) and isinstance(out_features, int):
        return in_features, out_features
    raise TypeError(
        f"cannot adapt a {type(base_layer).__name__}: bem_peft adapts nn.Linear, transformers' Conv1D and quantised "
        "linear layers; take it out of `target_modules`."
    )


class AdapterLayer(BaseTunerLayer):
    """State of an adapted projection. A method's layer names its containers in `adapter_layer_names`."""

    adapter_layer_names: tuple[str, ...] = ()
    quantization_backend: Any = None

    def __init__(self, base_layer: nn.Module, call: CallState, shape: tuple[int, int] | None = None) -> None:
        self.base_layer = base_layer
        self.call = call
        self.in_features, self.out_features = shape or projection_shape(self.get_base_layer())
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self.cast_input_dtype_enabled = True
        self.is_token_routed = False  # rows are tokens that a router chose, not sequences
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())

    def base_weight(self) -> torch.Tensor:
        """The base layer's weight as (out, in), dequantised."""
        base, backend = self.get_base_layer(), self.quantization_backend
        weight = base.weight.data if backend is None else upstream.quantised_weight(base, backend)
        return transpose(weight, self.fan_in_fan_out)

    def shape_at(self, name: str, num_heads: int | None) -> SiteShape:
        return SiteShape(name, self.in_features, self.out_features, num_heads, self.base_weight)

    def update_layer(
        self,
        adapter_name: str,
        adapters: dict[str, Adapter],
        inference_mode: bool,
        init_weights: dict[str, bool],
        site: SiteShape,
    ) -> None:
        """Add one adapter: container name -> its maths, and whether that starts as the identity."""
        for container, adapter in adapters.items():
            adapter.reset_parameters(init_weights[container], site)
            getattr(self, container)[adapter_name] = adapter
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def adapters_named(self, adapter_name: str) -> Iterator[Adapter]:
        """The adapters of that name on this layer, in the order of the containers."""
        for container in self.adapter_layer_names:
            adapters = getattr(self, container)
            if adapter_name in adapters:
                yield adapters[adapter_name]

    @property
    def wants_attention_rows(self) -> bool:
        """Whether an adapter that is on reads the exact attention rows of this site's heads."""
        return bool(self._exact_readers())

    def take_attention_rows(self, rows: AttentionRows) -> None:
        """Give the rows of the attention that runs now to the adapters that read them."""
        for adapter in self._exact_readers():
            leave_rows(adapter, rows)

    def _exact_readers(self) -> list[Adapter]:
        if self._disable_adapters or self.merged_adapters:
            return []
        mixed = self.call.values.adapter_names
        names = self.active_adapters if mixed is None else set(mixed)
        adapters = (adapter for name in names for adapter in self.adapters_named(name))
        return [adapter for adapter in adapters if adapter.reads_attention_rows]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters into the base weight.

        Args:
            safe_merge: check the new weight for NaN and infinity before it is written.
            adapter_names: which; None: the active ones.

        Raises:
            ValueError: a method's update is no weight, or (`safe_merge`) the result is not finite; nothing is written.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            adapters = list(self.adapters_named(name))
            if not adapters:
                continue
            weight, new_bias = self._merged(adapters)
            if safe_merge and not (
                torch.isfinite(weight).all() and (new_bias is None or torch.isfinite(new_bias).all())
            ):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._write(weight, new_bias)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again, the last one first."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self._write(*self._merged(list(self.adapters_named(self.merged_adapters[-1])), back=True))
            self.merged_adapters.pop()

    def _merged(self, adapters: Sequence[Adapter], back: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's weight and bias with the adapters in them, or (`back`) taken out of them."""
        bias = getattr(self.get_base_layer(), "bias", None)
        weight, new_bias = self.base_weight(), None if bias is None else bias.data
        for adapter in reversed(adapters) if back else adapters:
            weight, new_bias = (adapter.unmerge_from if back else adapter.merge_into)(weight, new_bias)
        return weight, new_bias

    def _write(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        laid_out = transpose(weight, self.fan_in_fan_out).contiguous()
        if self.quantization_backend is None:
            self.get_base_layer().weight.data = laid_out
        else:
            self.quantization_backend.set_base_weight(self, laid_out)
        if bias is not None:
            self.get_base_layer().bias.data = bias

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What merging `adapter_name` would add to the base weight, in the base weight's orientation."""
        weight = self.base_weight()
        merged = weight
        for adapter in self.adapters_named(adapter_name):
            merged, _ = adapter.merge_into(merged, None)
        return transpose(merged - weight, self.fan_in_fan_out)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return all(adapter.is_mergeable for adapter in self.adapters_named(adapter_name))


def of_method(cls: type, model_cls: type, attribute: str, **members: Any) -> type:
    """The class of one tuner's layers, which stands at its `attribute`: PEFT tells tuners apart by these classes."""
    name = model_cls.__name__.removesuffix("Model") + cls.__name__.removeprefix("Adapter")
    place = {"__module__": model_cls.__module__, "__qualname__": f"{model_cls.__qualname__}.{attribute}"}
    marker = members.pop("marker", None)
    return type(name, (cls,) if marker is None else (cls, marker), {**members, **place})


class AdapterLinear(nn.Module, AdapterLayer):
    """y = base(x), then each active adapter in turn: y <- adapter(x, y)."""

    adapter_layer_names: tuple[str, ...] = ()
    quantization_backend: Any = None

    def __init__(self, base_layer: nn.Module, adapter_name: str, call: CallState) -> None:
        super().__init__()
        AdapterLayer.__init__(self, base_layer, call)
        self._active_adapter = adapter_name

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., in) -> (..., out), in the base layer's output dtype."""
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        modules: Any = self._modules  # not through nn.Module.__getattr__, which costs as much as a small product
        y = modules["base_layer"](x, *args, **kwargs)
        names = self.call.values.adapter_names
        if names is not None:
            return self._mixed_batch(x, y, names)
        if self.merged_adapters:
            return y
        active = self._active_adapter
        is_compiling = torch.compiler.is_compiling()
        is_ours = not is_compiling and is_plain_thread() and returns_its_own(modules["base_layer"])
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        for name in (active,) if isinstance(active, str) else active:
            for container in self.adapter_layer_names:
                adapters = modules[container]._modules
                if name in adapters:
                    adapter = adapters[name]
                    if is_compiling or is_observed(adapter):
                        y, is_ours = adapter(x, y), False  # who sees y may keep it
                    else:  # nn.Module.__call__ is for hooks
                        y = adapter.forward(x, y, is_ours)
        return y

    def _mixed_batch(self, x: torch.Tensor, y: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        """Each row of the batch with the adapter that `names` gives it; '__base__' is none.

        A batch that beam search or flattening made n times as long repeats each name n times.
        """
        if self.merged_adapters:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        repeats, rest = divmod(x.shape[0], len(names))
        if rest or self.is_token_routed:
            reason = " (its rows are tokens that a router chose)" if self.is_token_routed else ""
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {x.shape[0]} respectively{reason}."
            )
        out = y.clone()
        attention = {adapter: left for adapter in self._exact_readers() if (left := take_rows(adapter)) is not None}
        for name in dict.fromkeys(names):
            rows = torch.tensor(
                [i * repeats + j for i, n in enumerate(names) if n == name for j in range(repeats)], device=x.device
            )
            part_x, part_y = x[rows], y[rows]
            with self.call.using(self.call.values.rows(rows, x.shape[0])):
                for adapter in self.adapters_named(name):
                    if adapter in attention:
                        leave_rows(adapter, attention[adapter].pick(rows))
                    part_y = adapter(part_x, part_y)
            out[rows] = part_y
        return out

    def __repr__(self) -> str:
        return f"{self.adapter_layer_names[0].rpartition('_')[0]}." + super().__repr__()
