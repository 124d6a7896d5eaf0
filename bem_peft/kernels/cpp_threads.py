"""torch's own OpenMP runtime, which the C++ operators share: its functions, found in the process.

They are looked up where the system's linker looked them up for torch: among what all libraries see, then in what
torch's own library came with. A second runtime would bring a second pool of threads, which `torch.set_num_threads`
does not reach.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

FUNCTIONS = ("GOMP_parallel", "omp_get_max_threads", "omp_get_num_threads", "omp_get_thread_num", "omp_in_parallel")


class ThreadsError(RuntimeError):
    """torch's threads were not found."""


def torch_library() -> Path:
    """The library that torch computes with on a CPU."""
    return Path(torch.__file__).with_name("lib") / f"libtorch_cpu.{'dylib' if sys.platform == 'darwin' else 'so'}"


def addresses() -> tuple[int, ...]:
    """Those of `FUNCTIONS`, in the runtime that torch's threads belong to.

    Raises:
        ThreadsError: this torch has no OpenMP, or none that has these functions and torch's number of threads.
    """
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        raise ThreadsError("this torch computes without OpenMP, whose threads the C++ operators share")
    scopes = {"the process": None, str(torch_library()): str(torch_library())}
    for name in scopes.values():
        try:
            scope = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            found = [getattr(scope, function) for function in FUNCTIONS]
        except (OSError, AttributeError):
            continue
        mine, torchs = found[1](), torch.get_num_threads()
        if mine != torchs:
            raise ThreadsError(
                f"an OpenMP runtime was found that is not torch's: it has {mine} threads, torch {torchs}"
            )
        pointers = [ctypes.cast(function, ctypes.c_void_p).value for function in found]
        return tuple(pointer for pointer in pointers if pointer is not None)
    raise ThreadsError(
        f"torch's OpenMP runtime, whose threads the C++ operators share, was not found: neither "
        f"{' nor '.join(scopes)} has {', '.join(FUNCTIONS)}"
    )
