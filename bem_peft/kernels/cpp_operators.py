"""The C++ operators as torch knows them: `torch.ops.bem_peft_cpu`, defined here, computed by a library's module.

What an operator returns is made by its fake (`cpp_counts`), and filled by the library. Whatever sees torch's operators
sees these: modes, profilers, counters of FLOPs, `torch.compile`. Where none of them is, `call` goes past the
dispatcher, which takes as long as a small operator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from bem_peft.kernels.cpp_counts import FAKES
from bem_peft.kernels.plain_call import is_plain_call

NAMESPACE = "bem_peft_cpu"
# the arguments of each method's inference after x and y
INFERENCE = {
    "head_gating": "Tensor a, Tensor b, Tensor gate_w, Tensor gate_bias, int heads, int[] ranks, float scaling",
    "rank_mask": (
        "Tensor a, Tensor b, Tensor gate_t, Tensor mask_t, int active, bool is_task_mask, bool has_hadamard, "
        "float scaling"
    ),
    "kronecker": "Tensor u, Tensor v_t, Tensor b, int v_rank, float scaling",
    "film": "Tensor w, Tensor bias, Tensor gamma, Tensor beta, bool is_relative, bool is_rms",
}
MASK = "int active, bool is_task_mask, bool has_hadamard, float temperature, float scaling"
GATES = "int heads, int[] ranks, float temperature, float scaling"
BOUNDS = "float scaling, float clamp_range, float max_beta"
# method -> its masters, the options of its training, how many coefficients that keeps
TRAINING = {
    "head_gating": ("Tensor a, Tensor b, Tensor gate_w, Tensor gate_bias", GATES, 2),
    "rank_mask": ("Tensor a, Tensor b, Tensor? c, Tensor m", MASK, 1),
    "kronecker": ("Tensor u, Tensor v, Tensor b", "float scaling", 1),
    "film": (
        "Tensor w, Tensor bias, Tensor? gamma, Tensor? beta",
        f"{BOUNDS}, bool is_relative, bool is_rms, Tensor(a!)? unstable, float threshold", 3,
    ),
}  # fmt: skip
# what a backward takes after the gradient and x
BACKWARD = {
    "head_gating": f"Tensor a, Tensor b, Tensor gate_w, Tensor gate_bias, Tensor low, Tensor half, {GATES}",
    "rank_mask": f"Tensor a, Tensor b, Tensor? c, Tensor m, Tensor z, {MASK}",
    "kronecker": "Tensor u, Tensor v, Tensor b, Tensor z, float scaling",
    "film": (
        f"Tensor y, Tensor w, Tensor? gamma, Tensor? beta, Tensor c, Tensor read, Tensor rms, {BOUNDS}, bool is_rms"
    ),
}
Run = Callable[[str, tuple[Any, ...]], None]  # (operator, its arguments and results)
_computing: dict[str, Callable[..., Any]] = {}  # operator -> what computes it of plain tensors on the CPU
_usual_keys = 0  # of the dispatcher, that a plain tensor has
_modes, _profiled = torch._C._len_torch_dispatch_stack, torch._C._autograd._profiler_enabled


def schemas() -> dict[str, str]:
    """Operator -> its schema."""

    def several(count: int) -> str:
        return f"({', '.join(['Tensor'] * count)})"

    found = {}
    for name, arguments in INFERENCE.items():
        masters, options, kept = TRAINING[name]
        gradients = 1 + masters.count("Tensor") + (name == "film")
        found[name] = f"(Tensor x, Tensor y, {arguments}) -> Tensor"
        found[f"{name}_"] = f"(Tensor x, Tensor(a!) y, {arguments}) -> Tensor(a!)"
        found[f"{name}_train"] = f"(Tensor x, Tensor y, {masters}, {options}) -> {several(1 + kept)}"
        found[f"{name}_backward"] = (
            f"(Tensor gradient, Tensor x, {BACKWARD[name]}, bool needs_x) -> {several(gradients)}"
        )
    found["rank_mask_pack"] = (
        f"(Tensor like, {TRAINING['rank_mask'][0]}, int num_blocks, bool is_task_mask, bool has_hadamard) -> "
        f"{several(4)}"
    )
    found["film_pack"] = f"(Tensor like, {TRAINING['film'][0]}, {BOUNDS}) -> {several(4)}"
    return found


def define(run: Run) -> torch.library.Library:
    """The operators, there for as long as what is returned is."""
    global _usual_keys
    with torch.inference_mode(False):
        _usual_keys = torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, schema in schemas().items():
        library.define(name + schema)
        _computing[name] = _implementation(name, run)
        library.impl(name, _computing[name], "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", FAKES[name], lib=library)
    for name, (masters, _, kept) in TRAINING.items():
        library.impl(f"{name}_train", _differentiable(name, masters.count("Tensor"), kept), "AutogradCPU")
    return library


def call(name: str, *arguments: Any) -> Any:
    """An operator, without autograd; of its first two arguments are all others."""
    if _modes() or _profiled() or not all(map(_has_usual_keys, arguments[:2])):
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.bem_peft_cpu, name)(*arguments)
    return _computing[name](*arguments)


def _has_usual_keys(tensor: torch.Tensor) -> bool:
    """Not fake, and not batched as `is_grads_batched` does it, unseen by `plain_call`."""
    return not torch._C._dispatch_keys(tensor).raw_repr() & ~_usual_keys


def _implementation(name: str, run: Run) -> Callable[..., Any]:
    results, method = FAKES[name], name.removesuffix("_")

    if method in INFERENCE:

        def infer(x: torch.Tensor, y: torch.Tensor, *rest: Any) -> Any:
            if name == method:
                y = y.contiguous()
            out = results(x, y)
            run(method, (x.to(y.dtype).contiguous(), y, *rest, out))
            return out

        return infer

    def train(first: torch.Tensor, *rest: Any) -> Any:
        given = (first.contiguous() if name.endswith("_backward") else first, *rest)
        out: Any = results(*given)
        run(name, (*given, *out))
        return out

    return train


# autograd


class Caller(Protocol):
    """An adapter, as far as a training operator knows it."""

    training: bool

    def torch_gradients(
        self, is_training: bool, inputs: list[torch.Tensor | None], gradient: torch.Tensor
    ) -> list[torch.Tensor | None]: ...


def _differentiable(name: str, masters: int, kept: int) -> Callable[..., Any]:
    """What the dispatcher calls where a gradient is asked for; the coefficients that are kept are of no use outside."""

    def train(x: torch.Tensor, y: torch.Tensor, *rest: Any) -> Any:
        out = trained(None, name, x, y, rest[:masters], rest[masters:])
        return (out, *(out.new_empty(0, requires_grad=False) for _ in range(kept)))

    return train


def trained(
    adapter: Caller | None, name: str, x: torch.Tensor, y: torch.Tensor, masters: Sequence[torch.Tensor | None],
    options: tuple[Any, ...],
) -> torch.Tensor:  # fmt: skip
    """y' of a training operator, which autograd knows. `adapter`: who has the torch form."""
    out: torch.Tensor = _Training.apply(adapter, name, options, x, y, *masters)
    return out


class _Training(torch.autograd.Function):
    """A training operator and its backward.

    Where the backward is differentiated again (create_graph), runs under a transform, in a dual level or on tensors of
    a subclass, the gradients come by autograd through the adapter's torch form.
    """

    @staticmethod
    def forward(ctx: Any, adapter: Caller | None, name: str, options: tuple[Any, ...], *inputs: Any) -> torch.Tensor:
        out, *kept = call(f"{name}_train", *inputs, *options)
        x, y, *masters = inputs
        ctx.save_for_backward(x, y if name == "film" else None, *masters, *kept)  # a y that is added has no part
        ctx.name, ctx.options, ctx.count = name, options, len(inputs)
        ctx.adapter = None if adapter is None else weakref.ref(adapter)
        ctx.is_training = adapter is not None and adapter.training
        result: torch.Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,), saved = gradients, ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain_call(gradient):
            found = _by_torch_form(ctx, list(saved[: ctx.count]), gradient)
        else:
            arguments = _backward_arguments(ctx.name, saved, ctx.options)
            found = list(call(f"{ctx.name}_backward", gradient, *arguments, ctx.needs_input_grad[3]))
            if ctx.name != "film":
                found.insert(1, gradient)
        return None, None, None, *found


def _backward_arguments(name: str, saved: Sequence[Any], options: tuple[Any, ...]) -> tuple[Any, ...]:
    if name != "film":
        x, _, *rest = saved
        return x, *rest, *options
    x, y, weight, _, *rest = saved
    scaling, clamp_range, max_beta, _, is_rms, _, _ = options
    return x, y, weight, *rest, scaling, clamp_range, max_beta, is_rms


def _by_torch_form(ctx: Any, inputs: list[torch.Tensor | None], gradient: torch.Tensor) -> list[torch.Tensor | None]:
    adapter = None if ctx.adapter is None else ctx.adapter()
    if adapter is None:
        raise RuntimeError(
            "a C++ operator by itself has no second derivative (create_graph=True) and no vmap of its backward; its "
            "adapter has, as long as the model is alive: keep it until the gradients are computed, or choose "
            "BEM_PEFT_KERNELS=torch."
        )
    x, is_added = inputs[0], inputs[1] is None
    assert x is not None
    if is_added:
        inputs[1] = torch.zeros(gradient.shape, dtype=x.dtype, device=x.device)
    found: list[torch.Tensor | None] = adapter.torch_gradients(ctx.is_training, inputs, gradient)
    if is_added:
        found[1] = gradient
    return found
