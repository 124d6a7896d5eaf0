"""FLOPs of an adapted model, a multiplication and an addition counted as two, base and adapter apart.

Counted by torch's `FlopCounterMode` from the operators that really run, forward and backward; no fixed multiplier for
the backward pass, which with a frozen base is far from two. What torch 2.13 counts as nothing gets a formula of its
kind: attention on a CPU that of attention, grouped products of experts that of the product of all rows. The model runs
in training mode; a method whose training mode decides by random values (LoKr's module dropout) runs in evaluation mode
where there are no weights. Operators without a formula (elementwise, norms, softmax) count nothing: they are listed
with the elements that they put out.

The adapter's backward is the whole backward less what the frozen base has to carry back to the same sites: that is
counted by a run in which each adapter is replaced by adding a number that is trained. The input of each site is taken
to need a gradient, as it does above the lowest site, and everywhere under gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from bem_peft.budget.fake_run import FakeRun, adapters_off, can_fake, mode_of, without_checkpointing
from bem_peft.kernels import backend

aten = torch.ops.aten
Shape = Sequence[int]


def _repeated(heads: int, shape: Shape) -> tuple[int, ...]:
    """The shape of keys or values whose heads several query heads share; torch's formula knows that since 2.13."""
    return (shape[0], heads, *shape[2:])


def _cpu_attention(q: Shape, k: Shape, v: Shape, *rest: object, **options: object) -> int:
    return int(sdpa_flop_count(q, _repeated(q[1], k), _repeated(q[1], v)))


def _cpu_attention_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *rest: object, **options: object) -> int:
    return int(sdpa_backward_flop_count(grad, q, _repeated(q[1], k), _repeated(q[1], v)))


def _grouped(a: Shape, b: Shape, *rest: object, **options: object) -> int:
    """Rows of each group by a matrix of its own: (S, K) (E, K, N), and for the backward the other layouts."""
    batch = a[0] if len(a) == len(b) == 3 else 1
    return int(2 * batch * a[-2] * a[-1] * b[-1])


def _grouped_backward(x: Shape, weight: Shape, *rest: object, **options: object) -> int:
    return 2 * _grouped(x, weight)  # of x and of the weight, whichever is wanted


def formulas() -> dict[Any, Callable[..., int]]:
    """Of operators that torch's counter counts as nothing; those of transformers once it has made them."""
    known: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
    }
    own: list[tuple[Any, str, Callable[..., int]]] = [
        (aten, "_grouped_mm", _grouped),
        (torch.ops.transformers, "grouped_mm_fallback", _grouped),
        (torch.ops.transformers, "grouped_mm_fallback_backward", _grouped_backward),
    ]
    return known | {getattr(library, name): formula for library, name, formula in own if hasattr(library, name)}


DECIDES_BY_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one batch of `tokens` tokens; exact for the operators counted. Divide by `tokens` for a token's."""

    tokens: int
    base_forward: int
    adapter_forward: int
    base_backward: int
    adapter_backward: int
    uncounted: Mapping[str, int] = field(default_factory=dict)

    @property
    def adapter_per_token(self) -> float:
        """Forward and backward of the adapter, a token."""
        return (self.adapter_forward + self.adapter_backward) / self.tokens

    @property
    def total_per_token(self) -> float:
        """Forward and backward of base and adapter, a token."""
        return self.adapter_per_token + (self.base_forward + self.base_backward) / self.tokens


class _Uncounted(TorchDispatchMode):
    """Output elements of the operators that no formula covers."""

    only_counts = True  # operators of one's own stay as they are

    def __init__(self, known: Mapping[Any, object]) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}
        self.known = {*flop_registry, *known}

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet not in self.known and not func.is_view:
            size = sum(t.numel() for t in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(t))
            if size and packet not in (aten.detach, aten.empty, aten.empty_like, aten.empty_strided):
                name = str(packet).removeprefix("aten.")
                self.elements[name] = self.elements.get(name, 0) + size
        return out


def count_flops(model: nn.Module, inputs: Mapping[str, Any]) -> FlopCount:
    """Count one forward and one backward pass.

    Args:
        model: with an adapter. Its weights are not read where they are plain tensors (they may be on the meta device).
        inputs: keyword arguments of one batch; tensors (batch, tokens, ...). The tokens are those of `input_ids`,
            and of `labels` where the model is an encoder-decoder.

    Raises:
        ValueError: nothing is trainable, or the model cannot be run on fake tensors and has no weights.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "no parameter is trainable, so there is no backward pass to count: load with is_trainable=True."
        )
    with without_checkpointing(model):
        forward, backward, uncounted = _count(model, inputs)
        with adapters_off(model), trained_numbers(model):
            base_forward, base_backward, _ = _count(model, inputs)
    tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"][..., 0]
    return FlopCount(
        tokens=tokens.numel(),
        base_forward=base_forward,
        adapter_forward=forward - base_forward,
        base_backward=base_backward,
        adapter_backward=backward - base_backward,
        uncounted=uncounted,
    )


def _count(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[int, int, dict[str, int]]:
    """FLOPs forward, FLOPs backward, and the uncounted operators of the forward pass."""
    reason: Exception | str = "grouped products of experts in another dtype than bfloat16"
    if can_fake(model):
        for is_training in (True, False):
            run = FakeRun(model)
            given, wanted = run.inputs(inputs), list(run.trainable)
            with mode_of(model, is_training), _inputs_take_gradients(model, wanted):
                try:
                    return count_passes(partial(_value, run, given), wanted, run.mode)
                except DECIDES_BY_VALUES as error:
                    reason = error
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} cannot be run on shapes alone ({reason}), so its FLOPs are unknown without "
            "weights: load them, or choose the experts implementation 'batched_mm'."
        ) from (reason if isinstance(reason, Exception) else None)
    wanted = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng(), mode_of(model, True), _inputs_take_gradients(model, wanted):
        return count_passes(partial(_value, lambda batch: model(**batch), inputs), wanted, nullcontext())


def _value(run: Callable[[Any], Any], batch: Mapping[str, Any]) -> torch.Tensor:
    return training_value(run(batch))


@contextmanager
def _inputs_take_gradients(model: nn.Module, wanted: list[torch.Tensor]) -> Iterator[None]:
    """Let the input of each adapted layer need a gradient; inputs that would not are added to `wanted`."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if args[0].requires_grad or not args[0].is_floating_point():
            return args
        wanted.append(args[0].detach().requires_grad_())
        return (wanted[-1], *args[1:])

    def embedded(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if output.is_leaf and output.requires_grad:  # as gradient checkpointing asks for
            wanted.append(output)

    handles = [m.register_forward_pre_hook(before) for m in model.modules() if isinstance(m, BaseTunerLayer)]
    embeddings: Any = getattr(model, "get_input_embeddings", None)
    if embeddings is not None:
        handles.append(embeddings().register_forward_hook(embedded))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_passes(
    forward: Callable[[], torch.Tensor], trainable: Sequence[torch.Tensor], mode: AbstractContextManager[object]
) -> tuple[int, int, dict[str, int]]:
    """FLOPs of `forward()`, a tensor, of its gradient for `trainable` (read after it), and the uncounted operators.

    The formulas' FLOPs, by the torch forms, whatever form computes: a budget is the same on every machine.
    """
    known = formulas()
    uncounted, counters = _Uncounted(known), []
    with ExitStack() as stack:
        stack.enter_context(backend.torch_forms())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(mode)
        stack.enter_context(uncounted)
        counters.append(FlopCounterMode(display=False, custom_mapping=known))
        with counters[0]:
            out = forward()
        seen = dict(uncounted.elements)
        counters.append(FlopCounterMode(display=False, custom_mapping=known))
        with counters[1]:
            torch.autograd.grad(out, trainable, torch.ones_like(out), allow_unused=True)
    return counters[0].get_total_flops(), counters[1].get_total_flops(), seen


def training_value(output: object) -> torch.Tensor:
    """What is differentiated: the loss where the model computes one, else the logits or the last hidden state."""
    for name in ("loss", "logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    if isinstance(output, torch.Tensor):
        return output
    raise ValueError(f"the model returned {type(output).__name__}: expected a loss, logits or last_hidden_state.")


@contextmanager
def trained_numbers(model: nn.Module) -> Iterator[None]:
    """At each adapted layer, y + p with p a trained number: the backward that any adapter there needs, at no FLOP."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    handles = []
    for parameter in parameters:
        parameter.requires_grad_(False)
    for layer in layers:
        device = next(layer.parameters()).device
        layer.register_parameter("trained_number", nn.Parameter(torch.zeros((), device=device)))
        handles.append(layer.register_forward_hook(lambda module, _, y: y + module.trained_number))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            del layer.trained_number
        for parameter in parameters:
            parameter.requires_grad_(True)
