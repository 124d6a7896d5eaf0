"""Work of adapters around an optimizer step, without a call that a user could forget.

torch runs these two hooks at each step of every optimizer, so the HF Trainer, accelerate and a bare loop are served
alike. They are registered with the first adapter that needs them, and look only at adapters whose parameters the
optimizer holds.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from bem_peft.tuners.sharded import own_part

if TYPE_CHECKING:
    from bem_peft.tuners.adapter import Adapter

_watched: weakref.WeakSet[Adapter] = weakref.WeakSet()
_order = itertools.count()
_handles: list[Any] = []


def watch(adapter: Adapter) -> None:
    """Call the adapter's `before_optimizer_step` and `after_optimizer_step` around the steps that concern it."""
    adapter.watch_order = next(_order)  # the same order in every process
    _watched.add(adapter)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


def watched_by(optimizer: Optimizer) -> list[Adapter]:
    """The watched adapters that `optimizer` trains, in the order of their creation."""
    if not _watched:
        return []
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    concerned = [a for a in _watched if any(id(p) in held for p in a._parameters.values())]
    return sorted(concerned, key=lambda adapter: adapter.watch_order)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    from bem_peft.tuners.pt4_film import judge_stability

    concerned = watched_by(optimizer)
    if concerned:
        if judge_stability(concerned):
            _drop_unsound_gradients(optimizer)
        for adapter in concerned:
            adapter.before_optimizer_step()


@torch.no_grad()
def _drop_unsound_gradients(optimizer: Optimizer) -> None:
    """In an emergency, what is not finite must not reach the other parameters that the optimizer holds."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                gradient = own_part(parameter.grad)
                gradient.masked_fill_(~torch.isfinite(gradient).all(), 0.0)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for adapter in watched_by(optimizer):
        adapter.after_optimizer_step()
