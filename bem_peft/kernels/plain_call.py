"""Whether a call is nothing but the values of its tensors, so that an operator of our own may stand for the torch form.

Transforms (`torch.func`, forward-mode differentiation), tracers (`torch.jit.trace`, `make_fx`), modes and subclasses of
tensors know torch's operators and not ours: they get the torch form. Modes that only count take ours: torch's
FlopCounterMode and FakeTensorMode, and any mode with an attribute `only_counts` that is true.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

PLAIN_TENSORS = (nn.Parameter, torch.Tensor, FakeTensor)  # not sharded, not of a subclass
_functions, _dispatches = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
_transforms, _tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state


def is_plain_call(*tensors: torch.Tensor | None) -> bool:
    """Whether `tensors` (None among them stands for nothing) are plain ones on a CPU, and nothing watches the call."""
    if torch.compiler.is_compiling() or not is_plain_thread():
        return False
    return all(
        t is None
        or (
            type(t) in PLAIN_TENSORS
            and t.is_cpu
            and t.layout is torch.strided
            and not (t.is_neg() or t.is_conj() or t._is_zerotensor())
        )
        for t in tensors
    )


def is_plain_thread() -> bool:
    """Whether no transform, tracer, dual level or mode is active, except for modes that only count."""
    if _transforms() is not None or _tracing() is not None or forward_ad._current_level >= 0:
        return False
    if _functions() and any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()):
        return False
    return not _dispatches() or all(_only_counts(mode) for mode in _get_current_dispatch_mode_stack())


def _only_counts(mode: object) -> bool:
    kind = type(mode)
    return (
        kind is FakeTensorMode or kind.__module__ == "torch.utils.flop_counter" or getattr(kind, "only_counts", False)
    )
