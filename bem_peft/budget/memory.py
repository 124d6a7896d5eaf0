"""Bytes of a training step: the exact sum of the live storages at its highest, the same on every repetition.

Process memory says nothing on a CPU (differences of an adapter's size are lost in it), so storages are followed one by
one, with weak references, from their first use to their end. This works on fake tensors as well: the peak of a model
is known before it is loaded. On CUDA and XPU the allocator's own peak is measured beside it.

What the optimizer keeps is not in it: AdamW adds two float32 values for each trainable parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bem_peft.budget.fake_run import FakeRun, adapter_tensor_names, adapters_off, can_fake, mode_of
from bem_peft.budget.flops import DECIDES_BY_VALUES, trained_numbers, training_value


@dataclass(frozen=True)
class MemoryCount:
    """Bytes. `weights`: parameters and buffers; `peak`: with activations and gradients at the highest point of a step.

    `base_peak`: the same step with each adapter replaced by one trained number. `device_peak`: what the device's
    allocator reports, None where it has none.
    """

    weights_bytes: int
    peak_bytes: int
    base_peak_bytes: int
    device_peak_bytes: int | None

    @property
    def adapter_bytes(self) -> int:
        """What the adapter adds to the peak."""
        return self.peak_bytes - self.base_peak_bytes


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators read and write; `peak` is the highest sum of the live ones."""

    only_counts = True  # operators of one's own stay as they are

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, tuple[Any, int]] = {}

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known[0]() is storage:
            return
        size = storage.nbytes()

        def end(_: object, key: int = key, size: int = size) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = (weakref.ref(storage, end), size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return out


def count_memory(model: nn.Module, inputs: Mapping[str, Any]) -> MemoryCount:
    """The peak of one forward and backward pass on `inputs`, keyword arguments of one batch.

    Raises:
        ValueError: nothing is trainable.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter is trainable, so there is no training step: load with is_trainable=True.")
    with mode_of(model, False):
        peak, weights = _peak(model, inputs)
        absent = adapter_tensor_names(model)
        with adapters_off(model), trained_numbers(model):
            base_peak, _ = _peak(model, inputs, absent)
        device_peak = _device_peak(model, inputs)
    return MemoryCount(weights, peak, base_peak, device_peak)


def _peak(model: nn.Module, inputs: Mapping[str, Any], absent: Collection[str] = ()) -> tuple[int, int]:
    """Highest live bytes of a step, and the bytes of the weights alone; without the tensors named in `absent`."""
    if can_fake(model):
        run = FakeRun(model)
        try:
            return _peak_of(run, run.inputs(inputs), run.trainable, run.tensors, run.mode, absent)
        except DECIDES_BY_VALUES:
            if any(p.is_meta for p in model.parameters()):
                raise
    trainable = [p for p in model.parameters() if p.requires_grad]
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return _peak_of(lambda batch: model(**batch), dict(inputs), trainable, named, nullcontext(), absent)


def _peak_of(
    call: Callable[[Mapping[str, Any]], Any],
    given: Mapping[str, Any],
    trainable: Sequence[torch.Tensor],
    named: Mapping[str, torch.Tensor],
    mode: AbstractContextManager[object],
    absent: Collection[str],
) -> tuple[int, int]:
    with torch.enable_grad(), mode, LiveBytes() as live:
        for name, tensor in named.items():
            if name not in absent:
                live.see(tensor)
        weights = live.live
        for value in given.values():
            if isinstance(value, torch.Tensor):
                live.see(value)
        out = training_value(call(given))
        gradients = torch.autograd.grad(out, trainable, torch.ones_like(out), allow_unused=True)
        del gradients, out
    return live.peak, weights


def _device_peak(model: nn.Module, inputs: Mapping[str, Any]) -> int | None:
    kinds = {p.device.type for p in model.parameters()}
    if not kinds <= {"cuda", "xpu"} or not kinds:
        return None
    torch.accelerator.reset_peak_memory_stats()
    out = training_value(model(**inputs))
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(out, trainable, torch.ones_like(out), allow_unused=True)
    del gradients
    return int(torch.accelerator.max_memory_allocated())
