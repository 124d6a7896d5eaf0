"""Work of adapters around an optimizer step, without a call that a user could forget.

torch runs hooks at each step of every optimizer, so the HF Trainer, accelerate and a bare loop are served alike. They
are registered with the first adapter that needs them, and look only at adapters whose parameters the optimizer holds.

What adapters do, they do once a training step: an optimizer that steps another one inside counts once; several
optimizers that each hold a part of an adapter take one step together, which ends when one of them steps again; a step
that a GradScaler lets a fused optimizer skip is none. With `step(closure)` the gradients are judged after the closure.

What adapters remember between steps is stored in the optimizer's `state_dict`, with the parameters' own states, and
taken out of a state that was loaded.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from bem_peft.tuners.steps.sharded import own_part

Arguments = tuple[Any, ...]
Options = dict[str, Any]
STATE_PREFIX = "bem_peft_"  # of what stands in a parameter's optimizer state


class Watched(nn.Module):
    """A module that may have something to do around the steps that train it; by itself it has nothing to do."""

    is_watched: bool = False
    watch_order: int = 0

    def watch(self) -> None:
        """Be told of each step of an optimizer that holds one of the parameters, from now on."""
        self.is_watched = True
        self.watch_order = next(_order)  # the same order in every process
        _watched.add(self)
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_before_step))
            _handles.append(register_optimizer_step_post_hook(_after_step))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.is_watched:
            self.watch()

    def on_added(self) -> None:
        """Called when the module has been added to a model, and when the model's caps have changed."""

    def judge(self, modules: Sequence[Any], starting: Set[Watched]) -> bool:
        """Asked of one of `modules`, all of its class, before each use of their gradients: is there an emergency?

        `starting`: those of all watched modules whose training step begins now.
        """
        return False

    def before_optimizer_step(self) -> None:
        """Called before each step of an optimizer that holds one of the parameters."""

    def after_optimizer_step(self, is_first: bool) -> None:
        """Called after each such step; `is_first`: the first one of a training step."""

    def training_state(self) -> dict[str, dict[str, Any]]:
        """What is remembered between steps, tensors like the parameter or numbers: parameter -> name -> value."""
        return {}

    def restore_training_state(self, name: str, state: dict[str, Any]) -> None:
        """Remember again what `training_state` gave for the parameter `name`."""


_watched: weakref.WeakSet[Watched] = weakref.WeakSet()
_stepped_by: weakref.WeakKeyDictionary[Watched, weakref.WeakSet[Optimizer]] = weakref.WeakKeyDictionary()
_storing: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # optimizers whose state_dict has our hook
_order = itertools.count()
_handles: list[Any] = []


@dataclass
class _Step:
    """A `step` call that runs now."""

    optimizer: Optimizer
    frame: FrameType  # of torch's wrapper around `step`
    concerned: list[Watched] = field(default_factory=list)
    starting: set[Watched] = field(default_factory=set)  # adapters whose training step began with it
    is_prepared: bool = False
    is_skipped: bool = False


class _Running(threading.local):
    def __init__(self) -> None:
        self.steps: list[_Step] = []


_running = _Running()


def refuse_partitioned(model: nn.Module) -> None:
    """Raise where DeepSpeed's ZeRO keeps the parameters' masters, which no hook of an optimizer step would reach.

    Raises:
        RuntimeError: the modules of `model` that are watched are in the hands of ZeRO.
    """
    for module in model.modules():
        if isinstance(module, Watched) and module.is_watched:
            if any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in module.parameters()):
                raise RuntimeError(
                    "under DeepSpeed's ZeRO nothing can be done around an optimizer step, because ZeRO keeps copies of "
                    "the parameters: set emergency_stabilization=False, and leave max_singular_value, fro_budget and "
                    "decorrelation_anneal_steps out; or use DDP or FSDP2."
                )
            return


def watched_by(optimizer: Optimizer) -> list[Watched]:
    """The watched adapters that `optimizer` trains, in the order of their creation."""
    if not _watched:
        return []
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    concerned = [a for a in _watched if any(id(p) in held for p in a._parameters.values())]
    return sorted(concerned, key=lambda adapter: adapter.watch_order)


def _before_step(optimizer: Optimizer, args: Arguments, kwargs: Options) -> tuple[Arguments, Options] | None:
    frame = sys._getframe(1)
    running = _running.steps
    while running and not _is_running(running[-1].frame, frame):  # it ended in an exception
        for adapter in running.pop().starting:
            _stepped_by.pop(adapter, None)
    step = _Step(optimizer, frame)
    running.append(step)
    if len(running) > 1:  # inside another optimizer's step
        return None
    step.concerned = watched_by(optimizer)
    if not step.concerned:
        return None
    _restore(optimizer, step.concerned)
    if optimizer not in _storing:
        optimizer.register_state_dict_post_hook(_store)
        _storing.add(optimizer)
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        _prepare(step)
        return None
    judged = _judged(closure, step)
    if len(args) > 1:
        return (args[0], judged, *args[2:]), kwargs
    return args, {**kwargs, "closure": judged}


def _is_running(frame: FrameType, current: FrameType) -> bool:
    """Whether `frame` is `current` or one of its callers."""
    caller: FrameType | None = current
    while caller is not None:
        if caller is frame:
            return True
        caller = caller.f_back
    return False


def _judged(closure: Callable[[], Any], step: _Step) -> Callable[[], Any]:
    """`closure`, after which the gradients are judged; an optimizer may call it several times a step."""

    def run() -> Any:
        result = closure()
        _prepare(step)
        return result

    return run


@torch.no_grad()
def _prepare(step: _Step) -> None:
    """Judge the gradients as they are now, and let the adapters act before they are used."""
    found_inf = getattr(step.optimizer, "found_inf", None)  # of a GradScaler, where the optimizer itself skips
    step.is_skipped = found_inf is not None and bool(found_inf)
    if step.is_skipped:
        return
    starting: set[Watched] = set()
    if not step.is_prepared:  # a closure may be called again within one step
        starting = step.starting = {adapter for adapter in step.concerned if _begins_step(adapter, step.optimizer)}
    step.is_prepared = True
    is_emergency = False
    for kind in dict.fromkeys(type(adapter) for adapter in step.concerned):
        same = [adapter for adapter in step.concerned if type(adapter) is kind]
        is_emergency |= same[0].judge(same, starting)
    if is_emergency:
        _drop_unsound_gradients(step.optimizer)
    for adapter in step.concerned:
        adapter.before_optimizer_step()


def _begins_step(adapter: Watched, optimizer: Optimizer) -> bool:
    """Whether a training step of `adapter` begins with this step of `optimizer`: no other one has begun it, or
    `optimizer` has taken its part of that one."""
    seen = _stepped_by.get(adapter)
    begins = seen is None or not len(seen) or optimizer in seen
    if begins:
        _stepped_by[adapter] = weakref.WeakSet((optimizer,))
    elif seen is not None:
        seen.add(optimizer)
    return begins


@torch.no_grad()
def _drop_unsound_gradients(optimizer: Optimizer) -> None:
    """In an emergency, what is not finite must not reach the other parameters that the optimizer holds."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                gradient = own_part(parameter.grad)
                gradient.masked_fill_(~torch.isfinite(gradient).all(), 0.0)


def _after_step(optimizer: Optimizer, args: Arguments, kwargs: Options) -> None:
    running, frame = _running.steps, sys._getframe(1)
    while running and running[-1].frame is not frame:
        running.pop()
    if not running:
        return
    step = running.pop()
    if running or step.is_skipped:
        return
    if step.concerned and not step.is_prepared:  # it never called its closure
        step.starting = {adapter for adapter in step.concerned if _begins_step(adapter, optimizer)}
    for adapter in step.concerned:
        adapter.after_optimizer_step(adapter in step.starting)


# what is remembered, in the optimizer's state


def _parameters(adapters: list[Watched]) -> dict[int, tuple[Watched, str]]:
    return {id(p): (a, name) for a in adapters for name, p in a._parameters.items() if p is not None}


def _store(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's `state_dict` with what its adapters remember beside the parameters' states."""
    adapters = watched_by(optimizer)
    states = {adapter: adapter.training_state() for adapter in adapters}
    owners, index, states_out = _parameters(adapters), 0, dict(state_dict["state"])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            adapter, name = owners.get(id(parameter), (None, ""))
            remembered = {} if adapter is None else states[adapter].get(name, {})
            if remembered:
                ours = {STATE_PREFIX + key: value for key, value in remembered.items()}
                states_out[index] = {**states_out.get(index, {}), **ours}
            index += 1
    return {**state_dict, "state": states_out}


def _restore(optimizer: Optimizer, adapters: list[Watched]) -> None:
    """Take what was remembered out of a state that was loaded."""
    owners = _parameters(adapters)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state or id(parameter) not in owners:
                continue
            ours = {key: state.pop(key) for key in list(state) if isinstance(key, str) and key.startswith(STATE_PREFIX)}
            if ours:
                adapter, name = owners[id(parameter)]
                adapter.restore_training_state(name, {k.removeprefix(STATE_PREFIX): v for k, v in ours.items()})
                if not state:  # an optimizer makes its state where it finds none
                    del optimizer.state[parameter]
