"""Adapters of each expert: parameters with a leading axis of experts, and the formula on those of one expert.

Rows go through a twin of the adapter: the same formula with no state of its own, on one expert's parameters, or on the
parameters of all with products that take each row's own (`expert_products`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from bem_peft.kept import kept_of
from bem_peft.tuners.base.expert_products import ExpertRows, is_few
from bem_peft.tuners.steps.brake import Braked

if TYPE_CHECKING:
    from bem_peft.tuners.base.adapter import Adapter

AdapterT = TypeVar("AdapterT", bound="Adapter")
_one_pass: ContextVar[dict[Any, list[Any]] | None] = ContextVar("bem_peft_twins", default=None)


def stack(adapter: Adapter, experts: int, reached: int | None, names: Iterable[str]) -> None:
    """Give the parameters `names` of `adapter` a leading axis: one for each of so many experts.

    reached: how many experts a token reaches; None: unknown.
    """
    adapter.num_experts, adapter.experts_per_token, adapter.stacked = experts, reached, tuple(names)
    for name in adapter.stacked:
        parameter = adapter._parameters[name]
        assert parameter is not None
        adapter._parameters[name] = nn.Parameter(parameter.new_empty(experts, *parameter.shape))


def twin(adapter: AdapterT, expert: int | None, parameters: Mapping[str, torch.Tensor]) -> AdapterT:
    """The formula of `adapter` on other parameters, of one expert or of many, without a state of its own: threads share
    nothing."""
    made: AdapterT = object.__new__(type(adapter))
    made.__dict__.update(adapter.__dict__)
    made.__dict__.update(_parameters=dict(parameters), num_experts=None, stacked=(), has_operator=False)
    made.__dict__.update(twin_of=adapter, expert=expert)
    # what is of the parameters alone is the whole adapter's
    made.__dict__.update(is_watched=False, is_penalised=bool(adapter.token_penalties))
    if isinstance(adapter, Braked):  # so is the brake
        made.__dict__.update(flag_with_gradient=adapter.flag_with_gradient, last_good={})
    return made


def twins(adapter: AdapterT, values: Mapping[str, torch.Tensor] | None = None) -> list[AdapterT]:
    """One for each expert. values: what is read in place of the parameters."""
    shared = {name: p for name, p in (adapter._parameters if values is None else values).items() if p is not None}
    own = {name: shared.pop(name).unbind(0) for name in adapter.stacked}
    assert adapter.num_experts is not None
    return [
        twin(adapter, e, {**shared, **{name: part[e] for name, part in own.items()}})
        for e in range(adapter.num_experts)
    ]


def reached(adapter: AdapterT, experts: Sequence[int]) -> list[AdapterT]:
    """The twins of `experts`.

    With gradients all are made, once in a pass: their gradients then are one stack, and not one of zeros each.
    """
    if not torch.is_grad_enabled():
        held = {name: p for name, p in adapter._parameters.items() if p is not None}
        stacked = adapter.stacked
        return [twin(adapter, e, {n: p[e] if n in stacked else p for n, p in held.items()}) for e in experts]
    scope = None if torch.compiler.is_compiling() else _one_pass.get()
    if scope is None:
        made = twins(adapter)
    else:
        made = scope[adapter] = scope.get(adapter) or twins(adapter)
    return [made[e] for e in experts]


@contextmanager
def one_pass() -> Iterator[None]:
    """One forward pass of a layer of experts, which may call its adapters expert by expert."""
    token = _one_pass.set({})
    try:
        yield
    finally:
        _one_pass.reset(token)


def by_expert(adapter: Adapter, x: torch.Tensor, y: torch.Tensor, experts: Any) -> torch.Tensor:
    """y' of rows x, y: the rows of an expert together.

    Args:
        experts: an id, or the ids (N,) of the entries of the first axis; x and y may have rows of each.
    """
    if adapter.is_watched and not torch.compiler.is_compiling():
        adapter.before_forward()
    if adapter.carries_penalties(y):
        y = adapter.carry_parameter_penalties(y)
    ids = torch.as_tensor(experts)
    if ids.numel() == 0:
        return y
    if ids.numel() == 1:
        return reached(adapter, [int(ids)])[0].forward(x, y)
    shape, times = y.shape, y.shape[1:-1].numel()
    ids = ids if times == 1 else ids.repeat_interleave(times)  # an id for each row
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    if is_few(ids):
        return with_rows(adapter, ids).forward(x, y).view(shape)
    order = ids.argsort(stable=True)
    if adapter.call.routing is not None:
        adapter.call.routing.take(order)
    found = with_rows(adapter, ids[order]).forward(x[order], y[order])
    return torch.empty_like(found).index_copy(0, order, found).view(shape)


def with_rows(adapter: AdapterT, ids: torch.Tensor) -> AdapterT:
    """The formula of `adapter` on rows of the experts `ids`, sorted unless they are few."""
    assert adapter.num_experts is not None
    held: dict[str, torch.Tensor] = {name: p for name, p in adapter._parameters.items() if p is not None}
    experts, has_picked, used = adapter.num_experts, False, None
    is_compiled = torch.compiler.is_compiling()
    if not torch.is_grad_enabled() and (is_compiled or kept_of(adapter) is None):
        # nothing is kept: only what rows need is derived, if that is clearly less than all
        if is_few(ids):
            has_picked, used = True, ids
        elif ids.device.type == "cpu" and not is_compiled:
            present, numbers = ids.unique_consecutive(return_inverse=True)
            if 2 * present.shape[0] < experts:
                experts, used, ids = present.shape[0], present, numbers
    if used is not None:
        held.update({name: held[name][used] for name in adapter.stacked})
    made = twin(adapter, None, held)
    made.__dict__.update(rows=ExpertRows(ids, experts, has_picked))
    return made
