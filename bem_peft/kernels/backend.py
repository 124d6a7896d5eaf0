"""Which form of the methods computes: chosen before the call, by BEM_PEFT_KERNELS or `use_kernels`.

    auto     on a CPU "cpp" where its library was proved right on this machine (`bem-peft kernels --build`), which is
             never built unasked; on a GPU "triton" where that was (`bem-peft kernels --prove`), but for a compiler or a
             transform; else "torch"
    torch    the torch forms: the specification of the others
    cpp      one C++ operator a site, for inference and training on a CPU; built on first use (`kernels.cpp`)
    triton   Triton's kernels on CUDA and ROCm, for training and inference; on a CPU in Triton's interpreter alone

What a chosen form does not know (a device, a dtype, a mode of a method) takes the torch form, by rules that each method
states (`fits_operator`, `takes_triton`), never because something failed.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bem_peft.kernels import cpp, cpp_library
from bem_peft.kernels.plain_call import is_plain_thread

VARIABLE = "BEM_PEFT_KERNELS"
CHOICES = ("auto", "torch", "cpp", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
logger = logging.getLogger(__name__)


class _Chosen:
    """The choice as plain attributes, which cost nothing to read at each call."""

    name = "auto"
    is_cpp = False
    is_triton = False
    asks_gpu = False  # `auto`: whether Triton's kernels were proved right on the device of a call
    untold: str | None = None  # why `auto` does not take the C++ operators, until a call on a CPU has said it


chosen = _Chosen()


def use_kernels(name: str) -> None:
    """Choose for this process; "cpp" builds the operators now, if they are not yet, "auto" looks again for proved ones.

    Raises:
        ValueError: an unknown name.
        RuntimeError: "triton" where the package is not installed; "cpp" without a compiler.
    """
    _choose(name)
    if chosen.is_cpp:
        cpp.build()


def _choose(name: str) -> None:
    if name not in CHOICES:
        raise ValueError(f"{VARIABLE} = {name!r}: must be one of {', '.join(CHOICES)}.")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            f"{VARIABLE} = 'triton', and the package triton is not installed: pip install 'bem_peft[triton]' (Linux), "
            f"or choose {', '.join(CHOICES[:3])}."
        )
    chosen.name, chosen.is_cpp, chosen.is_triton, chosen.untold = name, name == "cpp", name == "triton", None
    chosen.asks_gpu = name == "auto"
    _is_proved.cache_clear()
    if name == "auto":
        chosen.untold = _obstacle()
        chosen.is_cpp = chosen.untold is None


def _obstacle() -> str | None:
    """Why the C++ operators cannot be taken unasked; None: they are loaded."""
    found = cpp_library.standing()
    if not found.is_proved:
        return f"refused: {found.why}" if found.is_refused else found.why
    try:
        cpp.load_proved()
    except cpp.BuildError as error:
        return f"refused: {error}"
    return None


def tell() -> None:
    """Say once that a CPU computes by the torch forms, and how to have the C++ operators."""
    logger.warning(
        "%s=auto takes the torch forms on this CPU, which are slower than the C++ operators: %s. To have those, run: "
        "%s. To choose the torch forms, set %s=torch.",
        VARIABLE, chosen.untold, cpp_library.COMMAND, VARIABLE,
    )  # fmt: skip
    chosen.untold = None


def takes_triton(y: torch.Tensor, *weights: Any) -> bool:
    """Whether an operator that returns a tensor like y runs as Triton's kernel, which wants tensors as weights.

    Raises:
        RuntimeError: y is on a device that Triton's kernels cannot run on.
    """
    if not chosen.is_triton and not (chosen.asks_gpu and y.is_cuda and _takes_unasked(y)):
        return False
    if any(not isinstance(weight, torch.Tensor) for weight in weights if weight is not None):
        return False  # matrices of each expert
    kind = y.device.type
    if kind == "meta" or y.dtype not in TRITON_DTYPES:
        return False
    if kind != "cuda" and not (kind == "cpu" and is_interpreted()):
        raise RuntimeError(
            f"{VARIABLE} = 'triton', and Triton's kernels do not run on a {kind} device: move the model to CUDA or "
            f"ROCm, choose {', '.join(CHOICES[:3])}, or, to try the kernels on a CPU, set TRITON_INTERPRET=1 before "
            "Python starts (Triton's interpreter, very slow)."
        )
    return True


def _takes_unasked(y: torch.Tensor) -> bool:
    return not torch.compiler.is_compiling() and is_plain_thread() and _is_proved(y.get_device())


@functools.cache
def _is_proved(index: int) -> bool:
    from bem_peft.kernels import triton_mark

    return triton_mark.obstacle(torch.device("cuda", index)) is None


def form(device: torch.device | None = None) -> str:
    """What computes on `device` (a CPU) in this process, where it can: "cpp", "triton" or "torch"."""
    if device is not None and device.type == "cuda" and chosen.asks_gpu:
        return "triton" if _is_proved(device.index or 0) else "torch"
    return "cpp" if chosen.is_cpp else "triton" if chosen.is_triton else "torch"


@contextmanager
def torch_forms() -> Iterator[None]:
    """The torch forms inside the block, in every thread, whatever is chosen: to hold another form to them."""
    before = chosen.is_cpp, chosen.is_triton, chosen.asks_gpu
    chosen.is_cpp = chosen.is_triton = chosen.asks_gpu = False
    try:
        yield
    finally:
        chosen.is_cpp, chosen.is_triton, chosen.asks_gpu = before


def is_interpreted() -> bool:
    """Whether the kernels were made for Triton's interpreter."""
    from bem_peft.kernels.triton_tiles import IS_INTERPRETED

    return IS_INTERPRETED


_choose(os.environ.get(VARIABLE, "auto"))  # "cpp" builds with the first adapter: not for an import
