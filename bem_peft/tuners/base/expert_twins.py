"""Adapters of each expert: parameters with a leading axis of experts, and the formula on those of one expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from bem_peft.tuners.base.adapter import Adapter
from bem_peft.tuners.steps.brake import Braked

AdapterT = TypeVar("AdapterT", bound=Adapter)


def stack(adapter: Adapter, experts: int, reached: int | None, names: Iterable[str]) -> None:
    """Give the parameters `names` of `adapter` a leading axis: one for each of so many experts.

    reached: how many experts a token reaches; None: unknown.
    """
    adapter.num_experts, adapter.experts_per_token, adapter.stacked = experts, reached, tuple(names)
    for name in adapter.stacked:
        parameter = adapter._parameters[name]
        assert parameter is not None
        adapter._parameters[name] = nn.Parameter(parameter.new_empty(experts, *parameter.shape))


def twin(adapter: AdapterT, parameters: Mapping[str, torch.Tensor]) -> AdapterT:
    """The formula of `adapter` on one expert's parameters. Nothing of it is kept, so that threads share nothing."""
    made: AdapterT = object.__new__(type(adapter))
    made.__dict__.update(adapter.__dict__)
    made.__dict__.update(_parameters=dict(parameters), num_experts=None, stacked=(), has_operator=False)
    made.__dict__.update(is_watched=False, is_penalised=False)  # both are the whole adapter's
    if isinstance(adapter, Braked):  # so is the brake
        made.__dict__.update(flag_with_gradient=adapter.flag_with_gradient, last_good={})
    return made


def twins(
    adapter: AdapterT, experts: Sequence[int] | None = None, values: Mapping[str, torch.Tensor] | None = None
) -> list[AdapterT]:
    """One for each expert, or for each of `experts`. The gradients of all of them come together in one stack.

    values: what is read in place of the parameters.
    """
    assert adapter.num_experts is not None
    shared = {name: p for name, p in (adapter._parameters if values is None else values).items() if p is not None}
    stacks = {name: shared.pop(name) for name in adapter.stacked}
    if experts is not None and len(experts) < adapter.num_experts:
        chosen = torch.tensor(experts, device=next(iter(stacks.values())).device)
        stacks = {name: p.index_select(0, chosen) for name, p in stacks.items()}
    own = {name: p.unbind(0) for name, p in stacks.items()}
    count = adapter.num_experts if experts is None else len(experts)
    return [twin(adapter, {**shared, **{name: part[i] for name, part in own.items()}}) for i in range(count)]
