"""A model run without its weights: fake tensors of the same shapes, so that FLOPs and bytes are known before any run.

The model may be on the meta device (a 70B model needs no memory), or hold its weights; they are not read. What cannot
be faked (weights of bitsandbytes or torchao, control flow that depends on values) is run for real where it can be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a fake tensor can stand in for it."""
    return type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) and not tensor.is_sparse


def can_fake(model: nn.Module) -> bool:
    """Whether every weight is a plain tensor, and torch knows the shapes of every product of them.

    Grouped products of experts it knows in bfloat16 alone.
    """
    if not all(is_plain(t) for t in (*model.parameters(), *model.buffers())):
        return False
    grouped = [m for m in model.modules() if experts_implementation(m) == "grouped_mm"]
    stacks = (p for m in grouped for p in m.parameters(recurse=False) if p.dim() == 3)
    return all(stack.dtype is torch.bfloat16 for stack in stacks)


def experts_implementation(module: nn.Module) -> str | None:
    """By which products transformers computes the fused experts that `module` holds; None: it holds none."""
    if not hasattr(module, "has_gate"):  # what its experts interface gives a class
        return None
    found: str | None = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return found


def fake_like(tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor (in a `FakeTensorMode`) of the same shape, strides, dtype and gradient; meta becomes cpu."""
    device = torch.device("cpu") if tensor.device.type == "meta" else tensor.device
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return fake.requires_grad_(tensor.requires_grad)


class FakeRun:
    """`run(model, inputs)` calls `model(**inputs)` on fake weights; `trainable` are the fakes that take a gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            self.tensors = {name: fake_like(tensor) for name, tensor in named.items()}
        self.trainable = [self.tensors[n] for n, p in model.named_parameters() if p.requires_grad]

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        with self.mode:
            return {k: fake_like(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        return torch.func.functional_call(self.model, self.tensors, (), dict(inputs))

    def call(self, *args: torch.Tensor) -> Any:
        """`model(*args)`."""
        return torch.func.functional_call(self.model, self.tensors, args)


@contextmanager
def mode_of(model: nn.Module, is_training: bool) -> Iterator[None]:
    """Every module in training or in evaluation mode, and afterwards in its own again."""
    before = [(module, module.training) for module in model.modules()]
    model.train(is_training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing off: its second forward would run outside of the swapped weights, and is counted apart."""
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    for module in on:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def adapter_tensor_names(model: nn.Module) -> set[str]:
    """Names of the parameters and buffers that stand in an adapted layer beside its base layer."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            inner = "base_layer." if isinstance(module, BaseTunerLayer) else "original_module."
            own = (*module.named_parameters(), *module.named_buffers())
            names |= {f"{prefix}.{name}" for name, _ in own if not name.startswith(inner)}
    return names


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model, for a `PeftModel` and for transformers' own integration alike."""
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag
