"""The emergency brake: a training step whose output, gradient or weight is not sound is not taken.

A `Braked` adapter remembers its parameters as they were before the last step that was taken. Where an output is not
finite or exceeds `explosion_threshold`, or a gradient or a parameter is not finite, the coming update is undone: the
gradients are zeroed, and after the step the adapter goes back to what it remembers. The event is logged and counted.

An output counts with its gradient: a forward pass that nobody differentiates, or whose gradients are thrown away, is no
part of a step. What is remembered has the parameters' own dtype and lies in memory, no part of a saved adapter; with an
optimizer's state it is stored and resumed (`optimizer_hooks`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Set
from typing import Any, ClassVar, cast

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from bem_peft.tuners.steps.optimizer_hooks import Watched
from bem_peft.tuners.steps.sharded import is_distributed, own_part

logger = logging.getLogger("bem_peft")


class Braked(Watched):
    """For adapters that go back to their last good values. `is_guarded`: this one does; else it does nothing here."""

    site_name: str
    # of files before the brake's memory left them
    obsolete_keys: ClassVar[tuple[str, ...]] = ("last_good_", "emergency_count")

    def set_brake(self, is_guarded: bool, explosion_threshold: float) -> None:
        """For `__init__`. explosion_threshold: the largest |output| that still counts as sound."""
        self.is_guarded, self.explosion_threshold = is_guarded, explosion_threshold
        # a gradient that is held now is of an unsound output; on the CPU also where a model is made on another device
        self.is_unstable = torch.zeros((), dtype=torch.bool, device="cpu")
        self.is_reverting = False  # the step that is taken now is undone
        self.last_good: dict[str, torch.Tensor] = {}
        self.emergency_count = 0
        self.backward_pass = -1  # the last one that reached the adapter
        if self.is_guarded:
            self.watch()
            self.register_state_dict_pre_hook(_settle_before_saving)

    # in the forward and the backward pass

    def is_watching_output(self) -> bool:
        """Whether this forward pass may become part of a training step."""
        return self.is_guarded and self.training and torch.is_grad_enabled()

    def watch_output(self, out: torch.Tensor) -> None:
        """Judge the output (N, out) of a forward pass in training. No host synchronisation."""
        if self.is_watching_output() and out.numel():
            largest = out.detach().abs().amax().float()  # in float16 the threshold itself may be infinite
            self.flag_with_gradient(out, ~(largest <= self.explosion_threshold))

    def flag_with_gradient(self, out: torch.Tensor, flag: torch.Tensor) -> None:
        """Let `is_unstable` become `flag` once the gradient of `out` arrives."""
        if torch.compiler.is_compiling():  # a compiled region takes no hook: the forward pass alone counts
            self.is_unstable.logical_or_(flag)
        elif (
            out.requires_grad and torch._C._functorch.peek_interpreter_stack() is None
        ):  # no optimizer step follows vmap
            out.register_hook(_Flag(self, flag))

    def receive_flag(self, flag: torch.Tensor) -> None:
        """In the backward pass, before the gradients of this call reach the parameters."""
        current = torch._C._current_graph_task_id()
        held = [own_part(p.grad) for p in self.parameters() if p.grad is not None]
        if current != self.backward_pass and not held:  # the first one after `zero_grad`
            self.is_unstable = flag
        elif current != self.backward_pass:
            is_kept = (torch.stack(torch._foreach_norm(held)) != 0).any().to(flag.device)
            self.is_unstable = (self.is_unstable.to(flag.device) & is_kept) | flag
        else:
            self.is_unstable = self.is_unstable.to(flag.device) | flag
        self.backward_pass = current

    # around an optimizer step

    def judge(self, modules: Sequence[Braked], starting: Set[Watched]) -> bool:
        return _judge(modules, starting)

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        if self.is_reverting:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()  # so that no optimizer state is made of it

    @torch.no_grad()
    def after_optimizer_step(self, is_first: bool) -> None:
        self.is_unstable.zero_()
        if self.is_reverting:
            self.revert()
            self.emergency_count += is_first

    @torch.no_grad()
    def keep_as_good(self) -> None:
        """Remember the present values as the last good ones."""
        if self.is_guarded:
            _keep_as_good([self])

    @torch.no_grad()
    def revert(self) -> None:
        """Go back to the last good values."""
        for name, parameter in self.named_parameters():
            own_part(parameter).copy_(self.last_good[name])

    @torch.no_grad()
    def unstable_flag(self) -> torch.Tensor:
        """A scalar bool tensor: a gradient or a parameter now, or the output that gave the gradient, is not sound."""
        flag = self.is_unstable.to(next(self.parameters()).device)
        for parameter in self.parameters():
            flag = flag | ~torch.isfinite(own_part(parameter)).all()
            if parameter.grad is not None:
                flag = flag | ~torch.isfinite(own_part(parameter.grad)).all()
        return flag

    @torch.no_grad()
    def settle(self) -> None:
        """Undo an update that has overflowed, before anyone reads or saves the parameters. A shard is judged with its
        group at the next step."""
        if not self.last_good or any(isinstance(p, DTensor) or p.is_meta for p in self.parameters()):
            return
        if all(bool(torch.isfinite(p).all()) for p in self.parameters()):
            return
        self.revert()
        self.emergency_count += 1
        logger.warning("emergency stabilisation of %s: its last update overflowed, and is undone", self.site_name)

    def train(self, mode: bool = True) -> Braked:
        if not mode and self.training:
            self.settle()
        super().train(mode)
        return self

    # what is kept

    def training_state(self) -> dict[str, dict[str, Any]]:
        if not self.is_guarded or not self.last_good:
            return {}
        state: dict[str, dict[str, Any]] = {name: {"last_good": good} for name, good in self.last_good.items()}
        next(iter(state.values()))["emergencies"] = self.emergency_count
        return state

    def restore_training_state(self, name: str, state: dict[str, Any]) -> None:
        if "last_good" in state:
            self.last_good[name] = own_part(state["last_good"]).detach().clone()
        if "emergencies" in state:
            self.emergency_count = int(state["emergencies"])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.last_good = {name: fn(good) for name, good in self.last_good.items()}
        self.is_unstable = torch.zeros((), dtype=torch.bool, device=fn(self.is_unstable).device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.keep_as_good()


class _Flag:
    def __init__(self, adapter: Braked, flag: torch.Tensor) -> None:
        self.adapter, self.flag = adapter, flag

    def __call__(self, gradient: torch.Tensor) -> None:
        self.adapter.receive_flag(self.flag)


def _settle_before_saving(module: nn.Module, *_: object) -> None:
    cast(Braked, module).settle()


@torch.no_grad()
def _keep_as_good(guarded: Sequence[Braked]) -> None:
    """Remember the present values of guarded adapters; all at once, at each step."""
    kept, now = [], []
    for adapter in guarded:
        for name, parameter in adapter.named_parameters():
            part, good = own_part(parameter), adapter.last_good.get(name)
            if good is None or good.shape != part.shape or good.dtype is not part.dtype or good.device != part.device:
                adapter.last_good[name] = part.detach().clone()
            else:
                kept.append(good)
                now.append(part)
    if kept:
        torch._foreach_copy_(kept, now)


@torch.no_grad()
def _may_be_unstable(guarded: Sequence[Braked], device: torch.device) -> torch.Tensor:
    """A scalar bool tensor: true wherever an `unstable_flag` is, by one norm over all parameters and gradients, at a
    sixth of the time. (Squares overflow before the numbers do: then it is true, and the flags say no.)"""
    held = [p for adapter in guarded for p in adapter.parameters()]
    parts = [own_part(tensor) for p in held for tensor in (p, p.grad) if tensor is not None]
    norm = nn.utils.get_total_norm([part for part in parts if part.numel()])
    seen = torch.stack([adapter.is_unstable.to(device) for adapter in guarded]).any()
    return seen | ~torch.isfinite(norm.to(device))


def any_process(flags: torch.Tensor) -> torch.Tensor:
    """Boolean flags that are true where they are so in any process of the group."""
    if not is_distributed():
        return flags
    as_int = flags.to(torch.int32)
    distributed.all_reduce(as_int, op=distributed.ReduceOp.MAX)
    return as_int.bool()


def _judge(adapters: Sequence[Braked], starting: Set[Watched]) -> bool:
    """Decide for all guarded adapters at once whether the step that comes is taken: one host synchronisation a step
    (two in an emergency, when it is asked which). With several processes the verdict is the same in all of them.

    Args:
        adapters: those that the optimizer holds. starting: those of them for which a new training step begins; where
            another optimizer has taken its part of it already, its verdict stands.
    """
    guarded = [adapter for adapter in adapters if adapter.is_guarded]
    begun = [adapter for adapter in guarded if adapter in starting]
    if not guarded:
        return False
    for adapter in begun:
        adapter.is_reverting = False
    device = next(guarded[0].parameters()).device
    if not any_process(_may_be_unstable(guarded, device)).item():
        _keep_as_good(begun)
        return any(adapter.is_reverting for adapter in guarded)
    flags = torch.stack([adapter.unstable_flag().to(device) for adapter in guarded])
    verdicts = any_process(flags).tolist()
    _keep_as_good([a for a, is_unstable in zip(guarded, verdicts, strict=True) if a in begun and not is_unstable])
    found = [a for a, is_unstable in zip(guarded, verdicts, strict=True) if is_unstable and not a.is_reverting]
    for adapter in found:
        adapter.is_reverting = True
    if found:
        logger.warning(
            "emergency stabilisation: %d of %d FiLM adapters had a non-finite or exploding output, gradient or weight "
            "and go back to their last good values (first: %s)",
            len(found),
            len(guarded),
            found[0].site_name,
        )
    return any(adapter.is_reverting for adapter in guarded)


def emergency_count(model: nn.Module) -> int:
    """Emergencies of all FiLM adapters of the model so far."""
    return sum(module.emergency_count for module in model.modules() if isinstance(module, Braked))


def emergency_stabilize(model: nn.Module) -> dict[str, int]:
    """Send every FiLM adapter of `model` that is unsound now back to its last good values, at once.

    Training does this by itself at each optimizer step.

    Returns:
        For each guarded adapter, `<site>:<adapter name>` -> number of emergencies so far, this one included.
    """
    counts = {}
    for name, module in model.named_modules():
        if isinstance(module, Braked) and module.is_guarded:
            if bool(module.unstable_flag()):
                module.revert()
                module.emergency_count += 1
                module.is_unstable = torch.zeros_like(module.is_unstable)
                logger.warning("emergency stabilisation of %s: back to its last good values", module.site_name)
            counts[f"{module.site_name}:{name.rpartition('.')[2]}"] = module.emergency_count
    return counts
