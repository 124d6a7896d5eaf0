"""What one call of the model gives to its adapters beside the hidden states.

One `CallState` a model is shared by its layers. A forward pre-hook on the model opens a call with the keyword
arguments' values, so that `retrieval_quality=` works whatever the model's own signature is; where they live is in
`call_frame`. A block under gradient checkpointing runs again in the backward pass, when the call is over and perhaps
in another thread: it takes the values of the call that ran it along (`_BoundCheckpoint`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bem_peft.tuners.calls.attention_stats import register_exact
from bem_peft.tuners.calls.call_frame import CallFrames, CallValues
from bem_peft.tuners.calls.penalty_call import LoopScale, PenaltyLog, penalty_call
from bem_peft.tuners.calls.retrieval import CHECKS, check_quality, check_scores, refuse_misspelt
from bem_peft.tuners.steps.optimizer_hooks import refuse_partitioned

Values = torch.Tensor | Sequence[Any]


@dataclass
class Caps:
    """Caps of a whole model, for adapters that come later; None: no cap."""

    max_singular_value: float | None = None
    fro_budget: float | None = None
    told: set[str] = field(default_factory=set, compare=False)  # how a site that exceeds its cap was found, once each


class CallState(CallFrames):
    """Shared by the adapters of one model: what they read, and the calls that run now."""

    def __init__(self) -> None:
        super().__init__()
        self.retrieval: set[str] = set()  # kinds that some adapter of the model reads: "quality", "scores"
        self.is_penalised = False  # some adapter of the model carries a penalty
        self.is_watched = False  # some adapter of the model does something around an optimizer step
        self.exact_attention: set[str] = set()  # attention implementations of the model that hand on their rows
        self.loop = LoopScale()
        self.log = PenaltyLog()
        self.caps = Caps()
        self.handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copied or stored model starts without calls."""
        fresh = ("traced", "is_read_compiled", "traced_lead", "traced_routing", "threads", "loop", "log")
        return {name: value for name, value in self.__dict__.items() if name not in fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)
        for name in self.exact_attention:  # unpickled where no model has registered it yet
            register_exact(name)


def attach_call_state(model: nn.Module, state: CallState) -> None:
    """Put the hooks that fill `state` on the model, once."""
    if not state.handles:
        pre = model.register_forward_pre_hook(_ReceiveCall(state), with_kwargs=True, prepend=True)
        post = model.register_forward_hook(_EndCall(state), always_call=True)
        state.handles.extend((pre, post))


def detach_call_state(model: nn.Module, state: CallState) -> None:
    """Take the hooks off again, and what calls have put on blocks under checkpointing and on modules trained whole."""
    for handle in state.handles:
        handle.remove()
    state.handles.clear()
    for block in model.modules():
        function = block.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, _BoundCheckpoint):
            block.__dict__["_gradient_checkpointing_func"] = function.function
        _take_names_from(block)


class _ReceiveCall:
    def __init__(self, state: CallState) -> None:
        self.state = state

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        state, quality, scores = self.state, None, None
        if kwargs.get("retrieval_quality") is not None:
            quality = check_quality(kwargs["retrieval_quality"], state.retrieval)
        if kwargs.get("retrieval_scores") is not None:
            scores = check_scores(kwargs["retrieval_scores"], state.retrieval)
        if "retrieval_quality" in kwargs or "retrieval_scores" in kwargs:
            kwargs = {k: v for k, v in kwargs.items() if k not in ("retrieval_quality", "retrieval_scores")}
        misspelt = [name for name in kwargs if name.startswith("retr")]
        if misspelt:
            refuse_misspelt(model, misspelt)
        if state.is_watched and model.training and torch.is_grad_enabled():
            refuse_partitioned(model)
        penalty = None
        if state.is_penalised and model.training and torch.is_grad_enabled():
            given = inspect.signature(model.forward).bind_partial(*args).arguments if args else {}
            penalty = penalty_call({**given, **kwargs}, getattr(model, "config", None), state.loop)
        ambient = state.ambient
        values = CallValues(
            ambient.retrieval_quality if quality is None else quality,
            ambient.retrieval_scores if scores is None else scores,
            ambient.adapter_names,
            penalty,
            ambient.may_repeat,
        )
        batch = batch_of(args, kwargs)
        if batch is not None:
            values.check_rows(batch)
        if model.training and torch.is_grad_enabled():
            _bind_checkpointing(model, state)
        state.push(ambient, values)
        return args, kwargs


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The rows of a call of a model; None: its arguments do not tell."""
    # here and below no next(..., default), which torch 2.7 does not compile
    named = [kwargs.get(n) for n in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")]
    for value in (*named, *args):
        if isinstance(value, torch.Tensor) and value.dim():
            return int(value.shape[0])
    return None


class _EndCall:
    def __init__(self, state: CallState) -> None:
        self.state = state

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        penalty = self.state.values.penalty
        self.state.pop()
        if penalty is not None and output is not None:  # None: the forward pass raised
            loss = output.get("loss") if isinstance(output, dict) else output[0] if isinstance(output, tuple) else None
            own = loss if isinstance(loss, torch.Tensor) and loss.requires_grad and loss.dim() == 0 else None
            if penalty.compiled:
                output = _with_loss(output, penalty.with_compiled(_required(own)))
                self.state.log.record_compiled(penalty.compiled)
            if own is not None and not torch.compiler.is_compiling():
                own.register_hook(penalty.receive_loss_gradient)
            penalty.is_over = True
        return output


def _with_loss(output: Any, loss: torch.Tensor) -> Any:
    """The output of a model with another loss."""
    if isinstance(output, tuple):
        return loss, *output[1:]
    output["loss"] = loss
    return output


def _required(loss: torch.Tensor | None) -> torch.Tensor:
    if loss is None:
        raise RuntimeError(
            "a penalty that is compiled reaches the gradient by the model's own loss, and this call has none: give the "
            "model `labels`, or train without torch.compile."
        )
    return loss


def _bind_checkpointing(model: nn.Module, state: CallState) -> None:
    """Let each checkpointed block take the values of its call along into the backward pass."""
    for block in model.modules():
        function = block.__dict__.get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, _BoundCheckpoint):
            block.__dict__["_gradient_checkpointing_func"] = _BoundCheckpoint(function, state)


class _BoundCheckpoint:
    def __init__(self, function: Callable[..., Any], state: CallState) -> None:
        self.function, self.state = function, state

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state, values = self.state, self.state.values

        def run(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with state.using(values):
                return block(*inner_args, **inner_kwargs)

        return self.function(run, *args, **kwargs)


class _GiveNames:
    """Forward pre-hook of a module that is trained whole (`modules_to_save`): the adapter names of the call."""

    def __init__(self, call: CallState) -> None:
        self.call = call

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = self.call.values.adapter_names
        if names is None or "adapter_names" in kwargs:
            return args, kwargs
        rows = batch_of(args, kwargs)
        repeats = 1 if rows is None else max(1, rows // len(names))
        return args, {**kwargs, "adapter_names": [name for name in names for _ in range(repeats)]}


def give_names_to(module: nn.Module, call: CallState) -> None:
    """Put `_GiveNames` on the module, once: a hook a call would be seen by other calls."""
    hooks: Any = module._forward_pre_hooks
    if not any(isinstance(hook, _GiveNames) for hook in list(hooks.values())):
        module.register_forward_pre_hook(_GiveNames(call), with_kwargs=True)


def _take_names_from(module: nn.Module) -> None:
    hooks: Any = module._forward_pre_hooks
    for number in [number for number, hook in hooks.items() if isinstance(hook, _GiveNames)]:
        del hooks[number]
        module._forward_pre_hooks_with_kwargs.pop(number, None)


def find_call_state(model: nn.Module) -> CallState | None:
    """The state that the adapters of `model` share, or None where it has none of ours."""
    for module in model.modules():
        state = getattr(module, "call", None)
        if isinstance(state, CallState):
            return state
    return None


def _ambient(model: nn.Module, may_repeat: bool, **values: Values) -> AbstractContextManager[None]:
    state = find_call_state(model)
    if state is None:
        raise ValueError("the model has no bem_peft adapter: call get_peft_model or add_adapter first.")
    checked = {name: CHECKS[name](value, state.retrieval) for name, value in values.items()}
    return state.using_ambient(**checked, may_repeat=may_repeat)


def retrieval_quality(model: nn.Module, quality: Values, *, may_repeat: bool = False) -> AbstractContextManager[None]:
    """Context manager: each call of `model` inside it gets `quality` (batch,) or (batch, tokens), in [0, 1].

    For models that were adapted by transformers' own `add_adapter`; a `PeftModel` takes it as a keyword argument too.
    It holds in the thread and async task that opened it.

    Args:
        may_repeat: a value may stand for n rows that follow each other, as `generate` with n beams or n returned
            sequences makes them; without it a batch of other size is an error.

    Raises:
        ValueError: no adapter of the model reads retrieval quality, or the shape is wrong; in a call: its rows are
            others.
    """
    return _ambient(model, may_repeat, retrieval_quality=quality)


def retrieval_scores(model: nn.Module, scores: Values, *, may_repeat: bool = False) -> AbstractContextManager[None]:
    """Context manager: as `retrieval_quality`, for a retriever's scores (batch, documents), -inf where none."""
    return _ambient(model, may_repeat, retrieval_scores=scores)
