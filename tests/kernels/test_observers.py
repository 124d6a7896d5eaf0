"""Who looks at an adapter, its layer or its base sees what the formula sees, whichever form computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from bem_peft import use_kernels
from bem_peft.kept import kept_weights
from bem_peft.tuners.base.layer import AdapterLinear
from tests.contract.methods import METHODS, adapted
from tests.kernels.test_cpp_operators import pytestmark, torch_form_after
from tests.tiny_models import tokens

__all__ = ["pytestmark", "torch_form_after"]
Seen = list[torch.Tensor]


def keep(seen: Seen, *values: Any) -> None:
    """What a hook was given, and copies of it: they must still be equal when the call is over."""
    for value in values:
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, torch.Tensor):
                seen += [tensor, tensor.detach().clone()]


def forward_hook(module: nn.Module, seen: Seen) -> Any:
    return module.register_forward_hook(lambda m, args, out: keep(seen, args, out))


def forward_hook_with_kwargs(module: nn.Module, seen: Seen) -> Any:
    return module.register_forward_hook(
        lambda m, args, kwargs, out: keep(seen, args, list(kwargs.values()), out), with_kwargs=True
    )


def hook_that_is_always_called(module: nn.Module, seen: Seen) -> Any:
    return module.register_forward_hook(lambda m, args, out: keep(seen, args, out), always_call=True)


def pre_hook(module: nn.Module, seen: Seen) -> Any:
    return module.register_forward_pre_hook(lambda m, args: keep(seen, args))


def pre_hook_with_kwargs(module: nn.Module, seen: Seen) -> Any:
    return module.register_forward_pre_hook(lambda m, args, kwargs: keep(seen, args), with_kwargs=True)


def global_hook(module: nn.Module, seen: Seen) -> Any:
    return global_hooks.register_module_forward_hook(
        lambda m, args, out: keep(seen, args, out) if m is module else None
    )


def global_pre_hook(module: nn.Module, seen: Seen) -> Any:
    return global_hooks.register_module_forward_pre_hook(lambda m, args: keep(seen, args) if m is module else None)


class Undo:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def remove(self) -> None:
        del self.module.forward


def patched_forward(module: Any, seen: Seen) -> Any:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        keep(seen, args, out)
        return out

    module.forward = forward
    return Undo(module)


WATCHERS: list[Callable[[nn.Module, Seen], Any]] = [
    forward_hook, forward_hook_with_kwargs, hook_that_is_always_called, pre_hook, pre_hook_with_kwargs, global_hook,
    global_pre_hook, patched_forward,
]  # fmt: skip


def watched(model: nn.Module, place: str) -> list[nn.Module]:
    """The modules of one kind, at every site."""
    layers = [module for module in model.modules() if isinstance(module, AdapterLinear)]
    if place == "layer":
        return [*layers]
    if place == "base":
        return [layer.get_base_layer() for layer in layers]
    return [adapter for layer in layers for adapter in layer.adapters_named("default")]


def run(model: nn.Module, scope: str) -> torch.Tensor:
    ids = tokens(length=3)
    with torch.no_grad(), kept_weights(model) if scope == "kept" else nullcontext():
        if scope == "kept":
            model(input_ids=ids)
        out: torch.Tensor = model(input_ids=ids).logits
    return out


@pytest.mark.parametrize("scope", ["kept", "open"])
@pytest.mark.parametrize("place", ["adapter", "layer", "base"])
@pytest.mark.parametrize("watcher", WATCHERS, ids=lambda watcher: watcher.__name__)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_seen_stays_as_it_was(method: str, architecture: str, watcher: Any, place: str, scope: str) -> None:
    model = adapted(method, architecture)
    found: dict[str, Seen] = {}
    for kernels in ("torch", "cpp"):
        use_kernels(kernels)
        seen: Seen = []
        handles = [watcher(module, seen) for module in watched(model, place)]
        out = run(model, scope)
        for handle in handles:
            handle.remove()
        assert seen
        assert all(torch.equal(now, then) for now, then in zip(seen[::2], seen[1::2], strict=True))
        found[kernels] = [*seen[1::2], out]
    for plain, mine in zip(found["torch"], found["cpp"], strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


class Remembering(nn.Linear):
    """A projection that keeps what it returned."""

    last: torch.Tensor
    copied: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = super().forward(x)
        self.copied = self.last.clone()
        return self.last


def of_a_subclass(layer: Any) -> None:
    layer.base_layer.__class__ = Remembering


def compiled(layer: Any) -> None:
    base = layer.base_layer

    def remembered(x: torch.Tensor) -> torch.Tensor:
        base.last = base.forward(x)
        base.copied = base.last.clone()
        return base.last

    base._compiled_call_impl = remembered  # as `base.compile()` sets it


def parametrised(layer: Any) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2.0

    parametrize.register_parametrization(layer.base_layer, "weight", Doubled())


@contextmanager
def class_patched(cls: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    original, seen = cls.forward, []

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = original(self, x)
        seen.append((out, out.clone()))
        return out

    cls.forward = forward
    try:
        yield seen
    finally:
        cls.forward = original


@pytest.mark.parametrize("kind", [of_a_subclass, compiled, parametrised], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_what_an_odd_base_returned_is_not_written_into(method: str, kind: Any) -> None:
    model = adapted(method, "llama")
    layers = [module for module in model.modules() if isinstance(module, AdapterLinear)]
    for layer in layers:
        kind(layer)
    use_kernels("torch")
    expected = run(model, "open")
    use_kernels("cpp")
    torch.testing.assert_close(run(model, "kept"), expected, rtol=1e-4, atol=1e-4)
    for layer in layers:
        if hasattr(layer.base_layer, "last"):
            assert torch.equal(layer.base_layer.last, layer.base_layer.copied)


@pytest.mark.parametrize(("architecture", "cls"), [("llama", nn.Linear), ("gpt2", Conv1D)])
def test_what_a_patched_class_returned_is_not_written_into(architecture: str, cls: Any) -> None:
    use_kernels("cpp")
    model = adapted("composite", architecture)
    with class_patched(cls) as seen:
        run(model, "kept")
    assert seen
    assert all(torch.equal(now, then) for now, then in seen)


def test_the_pristine_base_is_written_into() -> None:
    """Else the tests above would hold for nothing."""
    use_kernels("cpp")
    model = adapted("film", "llama")
    layer = next(module for module in model.modules() if isinstance(module, AdapterLinear))
    kept: Seen = []
    adapter = next(layer.adapters_named("default"))
    original = type(adapter).forward
    try:
        type(adapter).forward = lambda self, x, y, over=False: (keep(kept, y), original(self, x, y, over))[1]
        run(model, "open")
    finally:
        type(adapter).forward = original
    assert not any(torch.equal(now, then) for now, then in zip(kept[::2], kept[1::2], strict=True))


def backward_hooks(kind: str, modules: list[nn.Module], seen: Seen) -> list[Any]:
    def full(module: nn.Module, given: Any, got: Any) -> None:
        if module in modules:
            keep(seen, given, got)

    def pre(module: nn.Module, got: Any) -> None:
        if module in modules:
            keep(seen, got)

    if kind == "full":
        return [module.register_full_backward_hook(full) for module in modules]
    if kind == "pre":
        return [module.register_full_backward_pre_hook(pre) for module in modules]
    if kind == "global":
        return [global_hooks.register_module_full_backward_hook(full)]
    return [global_hooks.register_module_full_backward_pre_hook(pre)]


@pytest.mark.parametrize("kind", ["full", "pre", "global", "global pre"])
@pytest.mark.parametrize("place", ["adapter", "layer", "base"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # at the embedding, whose input is ids
@pytest.mark.filterwarnings("ignore:For backward hooks to be called:UserWarning")  # at transformers' outputs
def test_backward_hooks_are_called_with_the_gradients(method: str, place: str, kind: str) -> None:
    model: Any = adapted(method, "llama").train()
    model.enable_input_require_grads()
    ids, found = tokens(length=3), []
    for kernels in ("torch", "cpp"):
        use_kernels(kernels)
        seen: Seen = []
        modules = watched(model, place)
        handles = backward_hooks(kind, modules, seen)
        try:
            model(input_ids=ids, labels=ids).loss.backward()
        finally:
            for handle in handles:
                handle.remove()
        assert len(seen) >= 2 * len(modules)
        found.append(seen[1::2])
    for plain, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-5)


def test_a_hook_that_changes_what_it_sees_changes_the_output() -> None:
    use_kernels("cpp")
    model = adapted("kronecker", "llama")
    plain = run(model, "open")
    with model.disable_adapter():
        base = run(model, "open")
    assert not torch.equal(plain, base)
    handles = [module.register_forward_hook(lambda m, args, out: args[1]) for module in watched(model, "adapter")]
    torch.testing.assert_close(run(model, "kept"), base)
    for handle in handles:
        handle.remove()
    handles = [
        module.register_forward_pre_hook(lambda m, args: (torch.zeros_like(args[0]), args[1]))
        for module in watched(model, "adapter")
    ]
    torch.testing.assert_close(run(model, "kept"), base)
    for handle in handles:
        handle.remove()
    assert torch.equal(run(model, "kept"), plain)


class _Leaves(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, AdapterLinear)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.down_proj(x)) * 2.0


def test_symbolic_tracing_takes_the_layer_as_a_leaf() -> None:
    """It looks at shapes and devices, so that it cannot be traced through; nor can LoRA's."""
    from bem_peft import KroneckerConfig

    for kernels in ("torch", "cpp"):
        use_kernels(kernels)
        config = KroneckerConfig(u_rank=2, v_rank=2, target_modules=["down_proj"], init_weights=False)
        block = get_peft_model(_Block(), config).base_model.model
        x = torch.randn(3, 12)
        graph = torch.fx.GraphModule(block, _Leaves().trace(block))
        torch.testing.assert_close(graph(x), block(x))
    lora = get_peft_model(_Block(), LoraConfig(target_modules=["down_proj"])).base_model.model
    for model in (block, lora):
        with pytest.raises((TypeError, RuntimeError, torch.fx.proxy.TraceError)):
            torch.fx.symbolic_trace(copy.deepcopy(model))


def test_layers_of_several_adapters_keep_what_a_hook_on_the_first_has_seen() -> None:
    use_kernels("cpp")
    model = adapted("composite", "llama")
    seen: Seen = []
    for layer in [module for module in model.modules() if isinstance(module, AdapterLinear)]:
        first, *rest = layer.adapters_named("default")
        if rest:
            first.register_forward_hook(lambda m, args, out: keep(seen, out))
    run(model, "open")
    assert seen
    assert all(torch.equal(now, then) for now, then in zip(seen[::2], seen[1::2], strict=True))


def test_a_copy_computes_the_same() -> None:
    use_kernels("cpp")
    model = adapted("rank_mask", "llama")
    assert torch.equal(run(model, "kept"), run(copy.deepcopy(model), "open"))
