"""Which form of the methods computes: chosen before the call, by BEM_PEFT_KERNELS or `use_kernels`."""

from __future__ import annotations

import os

CHOICES = ("auto", "torch", "cpp")


class _Chosen:
    """The choice as plain attributes, which cost nothing to read at each call."""

    is_cpp = False


chosen = _Chosen()


def use_kernels(name: str) -> None:
    """Choose for this process. Raises ValueError for an unknown name."""
    if name not in CHOICES:
        raise ValueError(f"BEM_PEFT_KERNELS = {name!r}: must be one of {', '.join(CHOICES)}.")
    chosen.is_cpp = name == "cpp"


use_kernels(os.environ.get("BEM_PEFT_KERNELS", "auto"))
