"""Calls that are more than the values of their tensors: the C++ forms give what the torch forms give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from bem_peft import use_kernels
from bem_peft.kept import kept_weights
from bem_peft.tuners.base.adapter import Adapter
from tests.kernels.test_cpp_operators import CASES, made, pytestmark, torch_form_after

__all__ = ["pytestmark", "torch_form_after"]
NAMES = ["PT1", "PT2", "PT2 a task", "PT3", "PT4"]
OUT = 40
Tensors = Any  # a tensor, or a tuple of them


def inputs(adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(6, adapter.in_features, generator=generator),
        torch.randn(6, OUT, generator=generator),
    )


def like(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))


def masters(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: p.detach() * 1.5 for name, p in adapter.named_parameters()}


def called(adapter: Adapter, values: dict[str, torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(adapter, values, args)


# transforms


def jvp(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return torch.func.jvp(a, (x, y), (like(x, 1), like(y, 2)))


def jvp_of_masters(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    values = masters(a)
    tangents = {name: like(value, i) for i, (name, value) in enumerate(values.items())}
    return torch.func.jvp(lambda v: called(a, v, x, y), (values,), (tangents,))


def dual_numbers(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    with forward_ad.dual_level():
        out = a(forward_ad.make_dual(x, like(x, 1)), forward_ad.make_dual(y, like(y, 2)))
        return forward_ad.unpack_dual(out)[:2]


def dual_gradient(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    x, y = x.requires_grad_(), y.requires_grad_()
    out = a(x, y)
    with forward_ad.dual_level():
        gradient = forward_ad.make_dual(like(out, 1), like(out, 2))
        found = torch.autograd.grad(out, [x, y], gradient)
        return tuple(part for g in found for part in forward_ad.unpack_dual(g)[:2])


def vjp(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return torch.func.vjp(a, x, y)[1](like(y, 1))


def gradient_of_masters(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    values = torch.func.grad(lambda v: called(a, v, x, y).square().sum())(masters(a))
    return tuple(values.values())


def gradients_of_samples(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    def loss(v: Any, row: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return called(a, v, row.unsqueeze(0), out.unsqueeze(0)).square().sum()

    return tuple(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(masters(a), x, y).values())


def vmap(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return torch.func.vmap(a)(x.view(2, 3, -1), y.view(2, 3, -1))


def ensemble(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    stacked = {name: torch.stack((value, -value)) for name, value in masters(a).items()}
    return torch.func.vmap(lambda v: called(a, v, x, y))(stacked)


def jacobians(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    def row(z: torch.Tensor) -> torch.Tensor:
        return a(z, y[:1])

    return torch.func.jacrev(row)(x[:1]), torch.func.jacfwd(row)(x[:1])


def hessian(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return torch.func.hessian(lambda z: a(x[:1], z).square().sum())(y[:1])


def functional_call(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return called(a, masters(a), x, y)


# tracers


def jit_trace(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    traced = torch.jit.trace(a, (x, y), check_trace=False)
    with torch.no_grad():
        for parameter in a.parameters():
            parameter.mul_(1.5)
    return traced(2.0 * x.repeat(3, 1), y.repeat(3, 1))


def fx_of_operators(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    graph = make_fx(lambda v, p, q: called(a, v, p, q))(masters(a), x, y)
    assert not any("bem_peft" in str(node.target) for node in graph.graph.nodes)
    return graph({name: 2.0 * value for name, value in masters(a).items()}, 2.0 * x, y)


def fx_of_a_gradient(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    def gradient(p: torch.Tensor, q: torch.Tensor) -> Tensors:
        p, q = p.detach().requires_grad_(), q.detach().requires_grad_()
        return torch.autograd.grad(a(p, q).square().sum(), [p, q])

    graph = make_fx(gradient)(x, y)
    assert not any("bem_peft" in str(node.target) for node in graph.graph.nodes)
    return graph(2.0 * x, y)


def exported(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    program = torch.export.export(a, (x, y), strict=False)
    assert "bem_peft" not in str(program.graph)
    return program.module()(2.0 * x, y)


# modes


class Multiplied(TorchDispatchMode):
    """Doubles each product: a simulation of other arithmetic."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace != "bem_peft_cpu"
        out = func(*args, **(kwargs or {}))
        return out * 2.0 if func._schema.name in ("aten::addmm", "aten::mm", "aten::bmm", "aten::tanh") else out


class Recorded(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += getattr(func, "__name__", "") in ("addmm", "mm", "bmm", "tanh")
        return func(*args, **(kwargs or {}))


def dispatch_mode(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    with Multiplied():
        return a(x, y)


def function_mode(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    with Recorded() as mode:
        out = a(x, y)
    return out, torch.tensor(float(mode.seen))


def default_device(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    with torch.device("cpu"):
        return a(x, y)


def autocast(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return a(x, y)


def inference_mode(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    with torch.inference_mode():
        return a(x.clone(), y.clone())


def inference_tensors(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    with torch.inference_mode():
        x, y = x.clone(), y.clone()
    with torch.no_grad():
        return a(x, y)


def deterministic(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    torch.use_deterministic_algorithms(True)
    try:
        found = [first_derivatives(a, x, y) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    return found[0]


# tensors


class Subclass(torch.Tensor):
    pass


class Wrapped(torch.Tensor):
    """A tensor of its own kind, which multiplies each product by two."""

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)
        made.value = value
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace != "bem_peft_cpu"
        plain = tree_map_only(cls, lambda t: t.value, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        if func._schema.name in ("aten::addmm", "aten::mm", "aten::bmm", "aten::tanh"):
            out = out * 2.0
        return tree_map_only(torch.Tensor, cls, out)


def subclass(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    out = a(x.as_subclass(Subclass), y.as_subclass(Subclass))
    assert type(out) is Subclass
    return out.as_subclass(torch.Tensor)


def wrapped(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    with torch.no_grad():
        out = a(Wrapped(x), Wrapped(y))
    assert type(out) is Wrapped
    return out.value


def masters_of_a_subclass(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    with torch.no_grad():
        out = called(a, {name: Wrapped(value) for name, value in masters(a).items()}, Wrapped(x), Wrapped(y))
    assert type(out) is Wrapped
    return out.value


def gradient_of_a_subclass(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    x = x.requires_grad_()
    return torch.autograd.grad(a(x, y), x, like(y, 1).as_subclass(Subclass))[0].as_subclass(torch.Tensor)


def laid_out(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    turned = a(x.t().contiguous().t(), y.t().contiguous().t())
    wide = torch.randn(6, 2 * x.shape[1])
    wide[:, ::2] = x
    sliced = a(wide[:, ::2], torch.stack((y, y), 2)[..., 0])
    expanded = a(x[:1].expand(6, -1), y[:1].expand(6, -1))
    return turned, sliced, expanded, a(x[:1].expand(2, 3, -1), y[:1].expand(2, 3, -1))


def negative_views(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return a(torch._neg_view(x), torch._neg_view(y)), a(x, torch._neg_view(y))


def zero_tensors(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return a(x, torch._efficientzerotensor(y.shape)), a(torch._efficientzerotensor(x.shape), y)


def x_of_another_kind(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return a(x.double(), y), a(x.bfloat16(), y)


def half_a_model(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    first = next(iter(a._parameters.values()))
    assert first is not None
    first.data = first.data.double()
    return a(x, y)


# differentiation


def first_derivatives(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    out = a(x, y)
    found = torch.autograd.grad(out.square().sum(), [x, y, *a.parameters()], allow_unused=True)
    return out, *(torch.zeros(()) if g is None or not g.any() else g for g in found)


def created_graph(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    x, y = x.requires_grad_(), y.requires_grad_()
    wanted = [x, y, *a.parameters()]
    given = torch.autograd.grad(a(x, y).square().sum(), wanted, create_graph=True, allow_unused=True)
    return tuple(torch.zeros(()) if g is None else g for g in given)


def second_derivatives(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    z, y = x.requires_grad_(), y.requires_grad_()
    wanted = [z, y, *a.parameters()]
    first = torch.autograd.grad(a(z * 1.0, y).square().mean(), wanted, create_graph=True, allow_unused=True)
    total = sum(((g * like(g, i)).sum() for i, g in enumerate(first) if g is not None), torch.zeros(()))
    second = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True)
    third = sum((g.square().sum() for g in second if g is not None), torch.zeros(()))
    return *(g for g in second if g is not None and g.any()), *torch.autograd.grad(third, [z, y])


def second_derivative_of_frozen_masters(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    a.requires_grad_(False)
    x, y = x.requires_grad_(), y.requires_grad_()
    first = torch.autograd.grad(a(x, y).square().sum(), [x, y], create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), [x, y])


def second_derivative_after_a_switch_of_mode(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    x = x.requires_grad_()
    out = a(x, y).square().sum()
    a.train(not a.training)
    first = torch.autograd.grad(out, [x, *a.parameters()], create_graph=True, allow_unused=True)
    return tuple(g for g in first if g is not None and g.any())


def batched_gradients(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    x, y = x.requires_grad_(), y.requires_grad_()
    out = a(x, y)
    return torch.autograd.grad(out, [x, y], like(torch.empty(3, *out.shape), 1), is_grads_batched=True)


def vectorised_jacobian(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return torch.autograd.functional.jacobian(a, (x[:2], y[:2]), vectorize=True)


def anomaly_mode(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    with torch.autograd.detect_anomaly(check_nan=True):
        return first_derivatives(a, x, y)


def saved_tensor_hooks(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    with saved_tensors_hooks(lambda t: (t.dtype, t.double()), lambda held: held[1].to(held[0])):
        found = first_derivatives(a, x, y)
    with save_on_cpu():
        return *found, *first_derivatives(a, x, y)


def checkpointed(a: Adapter, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    found = []
    for use_reentrant in (True, False):
        p, q = x.detach().requires_grad_(), y.detach().requires_grad_()
        out = checkpoint(a, p, q, use_reentrant=use_reentrant)
        out.square().sum().backward()
        found += [out, p.grad, q.grad]
    return tuple(found)


CALLS: list[Callable[[Adapter, torch.Tensor, torch.Tensor], Tensors]] = [
    jvp, jvp_of_masters, dual_numbers, dual_gradient, vjp, gradient_of_masters, gradients_of_samples, vmap, ensemble,
    jacobians, hessian, functional_call, jit_trace, fx_of_operators, fx_of_a_gradient, exported, dispatch_mode,
    function_mode, default_device, autocast, inference_mode, inference_tensors, deterministic, subclass, wrapped,
    masters_of_a_subclass, gradient_of_a_subclass, laid_out, negative_views, zero_tensors, x_of_another_kind,
    half_a_model, first_derivatives, created_graph, second_derivatives, second_derivative_of_frozen_masters,
    second_derivative_after_a_switch_of_mode, batched_gradients, vectorised_jacobian, anomaly_mode, saved_tensor_hooks,
    checkpointed,
]  # fmt: skip
WITHOUT_GRADIENTS = {
    "jvp", "jvp_of_masters", "dual_numbers", "vmap", "ensemble", "functional_call", "jit_trace", "fx_of_operators",
    "exported", "dispatch_mode", "function_mode", "default_device", "autocast", "subclass", "wrapped",
    "masters_of_a_subclass", "laid_out", "negative_views", "zero_tensors", "x_of_another_kind", "half_a_model",
}  # fmt: skip
OLD = r"ignore:.*(torch\.jit|trace|Anomaly Detection|vmap|performance drop).*"


@contextmanager
def circumstances(kind: str, adapter: Adapter) -> Iterator[None]:
    """How a call is made: with gradients, without, or after one inside a scope that keeps weights."""
    with nullcontext() if kind == "gradients" else torch.no_grad():
        if kind == "gradients":
            yield
            return
        with kept_weights(adapter) if kind == "a kept scope" else nullcontext():
            adapter(*inputs(adapter))
            yield


def outcome(kernels: str, name: str, call: Any, kind: str) -> tuple[torch.Tensor, ...]:
    use_kernels(kernels)
    adapter = made(name, CASES[name][2][-1] if name != "PT3" else 30, OUT)
    if kind == "gradients in training":
        adapter.train()
        kind = "gradients"
    with circumstances(kind, adapter):
        found = call(adapter, *inputs(adapter))
    flat = found if isinstance(found, tuple) else (found,)
    while any(isinstance(part, tuple) for part in flat):
        flat = tuple(inner for part in flat for inner in (part if isinstance(part, tuple) else (part,)))
    return tuple(part.detach().clone() for part in flat)


DIFFERENTIATED = ("gradients", "gradients in training")
COMBINED = [
    pytest.param(call, kind, id=f"{call.__name__}-{kind}")
    for call in CALLS
    for kind in (*DIFFERENTIATED, *(("no gradients", "a kept scope") if call.__name__ in WITHOUT_GRADIENTS else ()))
]


@pytest.mark.parametrize(("call", "kind"), COMBINED)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings(OLD)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_cpp_form_gives_what_the_torch_form_gives(name: str, call: Any, kind: str) -> None:
    expected, found = (outcome(kernels, name, call, kind) for kernels in ("torch", "cpp"))
    for plain, mine in zip(expected, found, strict=True):
        assert plain.dtype is mine.dtype
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=2e-5 * float(plain.abs().max()))
