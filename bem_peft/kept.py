"""A scope in which nobody trains: what is derived from parameters may be kept inside it, and nowhere else.

Nothing tells every write to a parameter: fused optimizers, `.data`, numpy views, flat buffers, other processes leave
version counters, addresses and hooks as they are. So a kept weight is bound to a scope that cannot outlive a call:
`generate` of a PEFT model opens one, and `with kept_weights(model):` is one. A scope belongs to the thread and the
async task that opened it. See docs/design/kept_weights.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

Kept = dict[Any, Any]  # of one module: what it derived, by its own keys
_scope: ContextVar[dict[nn.Module, Kept] | None] = ContextVar("bem_peft_kept", default=None)


@contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """Let the adapters of `model` derive their weights once inside the `with` block, not at every forward pass.

    For a loop of single decoding steps outside `generate`, which does this itself. Write no parameter of `model`
    inside: a step of an optimizer there would not be seen before the block ends. Forward passes with gradients keep
    nothing, inside as outside.
    """
    outer = _scope.get() or {}
    token = _scope.set({**outer, **{module: {} for module in model.modules()}})
    try:
        yield
    finally:
        _scope.reset(token)


def kept_of(module: nn.Module) -> Kept | None:
    """What `module` keeps in the scope that is open here; None: no scope holds it."""
    scope = _scope.get()
    return None if scope is None else scope.get(module)
