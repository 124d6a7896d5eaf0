"""The methods as one C++ operator a site, on a CPU.

The torch forms in the methods' files are the specification (`tests/kernels`). An operator takes rows in float32 or
bfloat16 and sums in float32.

Inference (`film`): wide weights come in the dtype of the rows, small ones in float32, padded to 16 columns. Each has a
form that writes into y (`film_`), for a y that nobody else holds.

Training (`film_train`): the masters come as they are, float32; they are rounded to the dtype of the rows and folded
inside. The backward is one operator (`film_backward`) and gives float32 gradients; one that is differentiated again
goes through the torch form of the adapter that called (`cpp_operators`).

The library is a file that knows nothing of torch (`csrc`): built here by one call of a compiler (`cpp_build`), or
carried by the wheel (`cpp_library`). What is loaded is tried before it is used (`cpp_self_test`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from bem_peft.kernels import cpp_build, cpp_library, cpp_operators, cpp_self_test, cpp_threads
from bem_peft.kernels.cpp_build import BuildError
from bem_peft.kernels.cpp_counts import FLOPS, LANES

DTYPES = (torch.float32, torch.bfloat16)
logger = logging.getLogger(__name__)
# set where a library is loaded: make_site(method, module._parameters, packed, options, dtype), and run_site(site,
# module._parameters, x, y, may_overwrite), the operator without the dispatcher, or None where that is needed or a
# master has changed
make_site: Any = None
run_site: Any = None

_loading = threading.RLock()
_defined: torch.library.Library | None = None
_path: Path | None = None


def loaded() -> Path | None:
    """The library that this process computes with, if it has loaded one."""
    return _path


def build() -> Any:
    """The operators, `torch.ops.bem_peft_cpu`, of the library that was proved right, or that is built now if need be.

    Raises:
        BuildError: no compiler, the compiler's own error, or a library that cannot be loaded or fails its test.
    """
    if _path is None:
        with _loading:
            if _path is None:
                _load(_wanted())
    return torch.ops.bem_peft_cpu


def load_proved() -> None:
    """Load the library that was proved right here; `build` gives its operators from then on.

    Raises:
        BuildError: the system cannot load it, or it fails its test.
    """
    load(cpp_library.standing().path)


def load(path: Path) -> None:
    """Compute with this library, unless this process has one. Raises BuildError as `load_proved` does."""
    with _loading:
        if _path is None:
            _load(path)


def _wanted() -> Path:
    """What is asked for by name, proved right or not."""
    found = cpp_library.standing()
    if found.is_proved:
        return found.path
    here = cpp_library.library()
    if found.is_refused or not here.is_file():
        refused = f" ({found.why} is refused)" if found.is_refused else ""
        compiler = " ".join(cpp_build.compiler())
        logger.warning("building the C++ operators with %s%s, half a minute, once: %s", compiler, refused, here)
        cpp_build.build_here()
    return here


def _load(path: Path) -> None:
    global make_site, run_site, _defined, _path
    try:
        module = cpp_library.load(path)
        functions = torch._C
        known = (torch.Tensor, torch.nn.Parameter, torch.empty_like, torch.get_num_threads, forward_ad)
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.bool)
        watchers = (
            torch.is_grad_enabled, functions._functorch.peek_interpreter_stack, functions._get_tracing_state,
            functions._len_torch_function_stack, functions._len_torch_dispatch_stack,
            functions._autograd._profiler_enabled,
        )  # fmt: skip
        module.setup(cpp_threads.addresses(), known + dtypes, watchers)
    except (ImportError, cpp_threads.ThreadsError) as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error
    defined = cpp_operators.define(module.run)
    try:
        wrong = cpp_self_test.wrong_operators()
    except RuntimeError as error:
        wrong = [str(error)]
    if wrong:
        defined._destroy()
        raise BuildError(f"{path} fails its test against the torch forms: {', '.join(wrong)}")
    for name, formula in FLOPS.items():
        register_flop_formula(getattr(torch.ops.bem_peft_cpu, name))(formula)
    make_site, run_site, _defined, _path = module.site, module.run_site, defined, path


def train(
    adapter: cpp_operators.Caller, name: str, x: torch.Tensor, y: torch.Tensor,
    masters: Sequence[torch.Tensor | None], options: tuple[Any, ...],
) -> torch.Tensor:  # fmt: skip
    """y' by a training operator; autograd knows it, and asks the adapter where its backward is differentiated again."""
    build()
    return cpp_operators.trained(adapter, name, x, y, masters, options)


def padded(weight: torch.Tensor) -> torch.Tensor:
    """(n, r) -> contiguous float32 (n, r rounded up to 16), zeros in the new columns."""
    return torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % LANES)).contiguous()
