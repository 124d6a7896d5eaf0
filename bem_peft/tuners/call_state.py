"""What one call of the model gives to its adapters beside the hidden states.

One `CallState` a model is shared by its layers. A forward pre-hook on the model fills it from the keyword arguments,
so that `retrieval_quality=` works whatever the model's own signature is. A block under gradient checkpointing runs
again in the backward pass, when the call is over: its values are bound to it (`_bind_checkpointing`), not to the model.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bem_peft.tuners.penalty_call import LoopScale, PenaltyCall, PenaltyLog, penalty_call


@dataclass(frozen=True)
class CallValues:
    """Values of one call. quality (B,) or (B, T) in [0, 1]; scores (B, K); penalty: in training, if one is on."""

    retrieval_quality: torch.Tensor | None = None
    retrieval_scores: torch.Tensor | None = None
    penalty: PenaltyCall | None = None

    def rows(self, rows: torch.Tensor, batch: int) -> CallValues:
        """The values of some rows (indices) of a batch; a value for each sequence that became n rows is repeated."""

        def pick(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else repeat_rows(value, batch)[rows]

        return CallValues(pick(self.retrieval_quality), pick(self.retrieval_scores), self.penalty)


class CallState:
    """Shared by the adapters of one model; `lead` is the shape of the leading axes of the site that runs now."""

    def __init__(self) -> None:
        self.values = CallValues()
        self.ambient = CallValues()
        self.adapter_names: list[str] | None = None
        self.lead: torch.Size = torch.Size()
        self.retrieval: set[str] = set()  # kinds that some adapter of the model reads: "quality", "scores"
        self.is_penalised = False  # some adapter of the model carries a penalty
        self.watched: nn.Module | None = None  # an adapter that does something around an optimizer step
        self.loop = LoopScale()
        self.pending: weakref.WeakSet[PenaltyCall] = weakref.WeakSet()
        self.log = PenaltyLog()
        self.handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copied or stored model starts without calls."""
        fresh = ("values", "adapter_names", "lead", "loop", "pending", "log")
        return {name: value for name, value in self.__dict__.items() if name not in fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    @contextmanager
    def using(self, values: CallValues) -> Iterator[None]:
        previous, self.values = self.values, values
        try:
            yield
        finally:
            self.values = previous


def repeat_rows(value: torch.Tensor, batch: int) -> torch.Tensor:
    """(b, ...) -> (batch, ...), each row batch/b times in a row: beams, or tokens that were flattened.

    Raises:
        ValueError: batch is no multiple of b.
    """
    given = value.shape[0]
    if given == batch:
        return value
    if given == 0 or batch % given:
        raise ValueError(f"values for {given} sequences were given to a batch of {batch}: must be one a sequence.")
    return value.repeat_interleave(batch // given, dim=0)


def check_quality(quality: object, kinds: set[str]) -> torch.Tensor:
    if "quality" not in kinds:
        raise ValueError(
            '`retrieval_quality` was given, but no adapter reads it; set retrieval="quality" in HeadGroupGatingConfig.'
        )
    tensor = torch.as_tensor(quality)
    if tensor.dim() not in (1, 2) or not tensor.is_floating_point():
        raise ValueError(
            f"`retrieval_quality` has shape {tuple(tensor.shape)} and dtype {tensor.dtype}: must be floating point, "
            "one value a sequence (batch,) or a token (batch, tokens)."
        )
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not ((tensor >= 0) & (tensor <= 1)).all():
        raise ValueError(f"`retrieval_quality` lies in [{tensor.min():g}, {tensor.max():g}]: must lie in [0, 1].")
    return tensor


def check_scores(scores: object, kinds: set[str]) -> torch.Tensor:
    if "scores" not in kinds:
        raise ValueError(
            '`retrieval_scores` was given, but no adapter reads it; set retrieval="scores" in HeadGroupGatingConfig.'
        )
    tensor = torch.as_tensor(scores)
    if tensor.dim() != 2 or not tensor.is_floating_point() or tensor.shape[1] < 1:
        raise ValueError(
            f"`retrieval_scores` has shape {tuple(tensor.shape)} and dtype {tensor.dtype}: must be floating point, "
            "(batch, retrieved documents); fill short lists with -inf."
        )
    return tensor


def attach_call_state(model: nn.Module, state: CallState) -> None:
    """Put the hooks that fill `state` on the model, once."""
    if not state.handles:
        pre = model.register_forward_pre_hook(_ReceiveCall(state), with_kwargs=True)
        post = model.register_forward_hook(_EndCall(state), always_call=True)
        state.handles.extend((pre, post))


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
        if state.watched is not None and model.training and torch.is_grad_enabled():
            refuse_partitioned(state.watched)
        penalty = None
        if state.is_penalised and model.training and torch.is_grad_enabled():
            given = inspect.signature(model.forward).bind_partial(*args).arguments if args else {}
            penalty = penalty_call({**given, **kwargs}, getattr(model, "config", None), state.loop, state.pending)
        state.values = CallValues(
            state.ambient.retrieval_quality if quality is None else quality,
            state.ambient.retrieval_scores if scores is None else scores,
            penalty,
        )
        if model.training and torch.is_grad_enabled():
            _bind_checkpointing(model, state)
        return args, kwargs


def refuse_partitioned(adapter: nn.Module) -> None:
    """Raise where DeepSpeed's ZeRO keeps the parameters' masters, which no hook of an optimizer step would reach.

    Raises:
        RuntimeError: the adapter is in the hands of ZeRO.
    """
    parameter = next(adapter.parameters())
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        raise RuntimeError(
            "under DeepSpeed's ZeRO nothing can be done around an optimizer step, because ZeRO keeps copies of the "
            "parameters: set emergency_stabilization=False, and leave max_singular_value, fro_budget and "
            "decorrelation_anneal_steps out; or use DDP or FSDP2."
        )


class _EndCall:
    def __init__(self, state: CallState) -> None:
        self.state = state

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        penalty = self.state.values.penalty
        if penalty is not None:
            loss = output.get("loss") if isinstance(output, dict) else output[0] if isinstance(output, tuple) else None
            if isinstance(loss, torch.Tensor) and loss.requires_grad and loss.dim() == 0:
                loss.register_hook(penalty.receive_loss_gradient)
        self.state.values = CallValues()


def _bind_checkpointing(model: nn.Module, state: CallState) -> None:
    """Let each checkpointed block see this call's values again when it runs in the backward pass."""
    for block in model.modules():
        function = block.__dict__.get("_gradient_checkpointing_func")
        if function is not None and getattr(block, "gradient_checkpointing", False):
            if isinstance(function, _BoundCheckpoint):
                function = function.function
            block.__dict__["_gradient_checkpointing_func"] = _BoundCheckpoint(function, state, state.values)


class _BoundCheckpoint:
    def __init__(self, function: Callable[..., Any], state: CallState, values: CallValues) -> None:
        self.function, self.state, self.values = function, state, values

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state, values = self.state, self.values

        def run(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with state.using(values):
                return block(*inner_args, **inner_kwargs)

        return self.function(run, *args, **kwargs)


def find_call_state(model: nn.Module) -> CallState | None:
    """The state that the adapters of `model` share, or None where it has none of ours."""
    for module in model.modules():
        state = getattr(module, "call", None)
        if isinstance(state, CallState):
            return state
    return None


@contextmanager
def _ambient(model: nn.Module, **values: Any) -> Iterator[None]:
    state = find_call_state(model)
    if state is None:
        raise ValueError("the model has no bem_peft adapter: call get_peft_model or add_adapter first.")
    checked = {
        "retrieval_quality": lambda value: check_quality(value, state.retrieval),
        "retrieval_scores": lambda value: check_scores(value, state.retrieval),
    }
    previous = state.ambient
    given = {name: checked[name](value) for name, value in values.items()}
    state.ambient = CallValues(**{**vars(previous), **given})
    try:
        yield
    finally:
        state.ambient = previous


def retrieval_quality(model: nn.Module, quality: Any) -> Any:
    """Context manager: each call of `model` inside it gets `quality` (batch,) or (batch, tokens), in [0, 1].

    For models that were adapted by transformers' own `add_adapter`; a `PeftModel` takes it as a keyword argument too.

    Raises:
        ValueError: no adapter of the model reads retrieval quality, or the shape is wrong.
    """
    return _ambient(model, retrieval_quality=quality)


def retrieval_scores(model: nn.Module, scores: Any) -> Any:
    """Context manager: as `retrieval_quality`, for a retriever's scores (batch, documents), -inf where none."""
    return _ambient(model, retrieval_scores=scores)
