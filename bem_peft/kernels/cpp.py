"""The methods as one C++ operator a site, on a CPU; built by torch's own tools on first use.

The torch forms in the methods' files are the specification (`tests/kernels`). An operator takes rows in float32 or
bfloat16 and sums in float32.

Inference (`film`): wide weights come in the dtype of the rows, small ones in float32, padded to 16 columns. Each has a
form that writes into y (`film_`), for a y that nobody else holds.

Training (`film_train`): the masters come as they are, float32; they are rounded to the dtype of the rows and folded
inside. The backward is one operator (`film_backward`) and gives float32 gradients; one that is differentiated again
goes through the torch form of the adapter that called (`name_caller`).

Building takes half a minute, a C++ compiler (g++ or clang++) and ninja, once; torch keeps the result in its folder of
extensions (`TORCH_EXTENSIONS_DIR`). Who finds another process building waits for it, `WAIT_SECONDS` at most.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import platform
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.file_baton import FileBaton
from torch.utils.flop_counter import register_flop_formula

FOLDER = Path(__file__).with_name("csrc")
SOURCES = sorted(FOLDER.glob("*.cpp"))
CFLAGS = [
    "-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno",
    "-DAT_PER_OPERATOR_HEADERS",  # torch's headers without all of its operators, which take as long as the rest
]  # fmt: skip
WAIT_SECONDS = 600.0  # for another process that builds
LANES = 16
# set by `build`: make_site(kind, module._parameters, packed, options), and run_site(site, module._parameters, x, y,
# may_overwrite), the operator without the dispatcher, or None where that is needed or a master has changed
make_site: Any = None
run_site: Any = None
_name_caller: Any = None  # name_caller(number, is_training), of the next training operator of this thread
DTYPES = (torch.float32, torch.bfloat16)


class BuildError(RuntimeError):
    """The C++ operators could not be built or loaded."""


_building = threading.RLock()


def build() -> Any:
    """The operators, `torch.ops.bem_peft_cpu`, built if they are not yet.

    Raises:
        BuildError: no compiler or no ninja, the compiler's own error, or a lock that another build left behind.
    """
    with _building:
        return _built()


class _Baton(FileBaton):
    """torch's lock on a folder of extensions, which waits for ever where the process that took it was killed."""

    def wait(self) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while Path(self.lock_file_path).exists():
            if time.monotonic() > end:
                raise BuildError(
                    f"waited {WAIT_SECONDS:g} s for another process to build the C++ operators: its lock "
                    f"{self.lock_file_path} is still there. If no other process is building now, one was killed while "
                    f"it did: delete that file and start again; or choose BEM_PEFT_KERNELS=torch."
                )
            time.sleep(self.wait_seconds)


def _load(may_retry: bool = True) -> Any:
    from torch.utils import cpp_extension

    name = f"bem_peft_cpu_{processor_key()}_{source_key()}"
    # from torch 2.15 on the lock is the system's, which ends with the process that holds it
    original = getattr(cpp_extension, "FileBaton", None)
    if original is not None:
        cpp_extension.FileBaton = _Baton  # type: ignore[misc]
    try:
        return cpp_extension.load(
            name=name,
            sources=[str(source) for source in SOURCES],
            extra_cflags=CFLAGS,
        )
    except (RuntimeError, ImportError, OSError) as error:
        cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(name, None)  # or torch never builds it again in this process
        if isinstance(error, BuildError):
            raise
        if not (isinstance(error, ImportError) and may_retry):
            raise BuildError(
                f"the C++ operators could not be built: {error}\nThey need a C++ compiler (g++ or clang++), ninja, the "
                "headers of Python, and a folder to write to (TORCH_EXTENSIONS_DIR); or choose BEM_PEFT_KERNELS=torch."
            ) from error
    finally:
        if original is not None:
            cpp_extension.FileBaton = original  # type: ignore[misc]
    return _load(may_retry=False)  # the process that was waited for has built nothing


@functools.cache
def _built() -> Any:
    module = _load()
    global make_site, run_site, _name_caller
    make_site, run_site, _name_caller = module.site, module.run, module.name_caller
    module.set_torch_form(_torch_gradients)
    formulas = {
        "film": _film_flops, "kronecker": _kronecker_flops, "rank_mask": _rank_mask_flops,
        "head_gating": _head_gating_flops,
    }  # fmt: skip
    for name, count in formulas.items():
        for form, fake in ((name, _like_y), (f"{name}_", _y_itself)):
            torch.library.register_fake(f"bem_peft_cpu::{form}", fake)
            register_flop_formula(getattr(torch.ops.bem_peft_cpu, form))(count)
    for name, formula in TRAINING_FLOPS.items():
        torch.library.register_fake(f"bem_peft_cpu::{name}", TRAINING_FAKES[name])
        register_flop_formula(getattr(torch.ops.bem_peft_cpu, name))(formula)
    return torch.ops.bem_peft_cpu


_callers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_next_number = itertools.count(1)


def name_caller(adapter: Any) -> None:
    """Say whose training operator runs next in this thread: its `torch_gradients` is asked where the operator's
    backward is differentiated again."""
    number = _numbers.get(adapter)
    if number is None:
        number = _numbers[adapter] = next(_next_number)
        _callers[number] = adapter
    _name_caller(number, adapter.training)


def _torch_gradients(
    number: int, is_training: bool, inputs: list[torch.Tensor | None], gradient: torch.Tensor
) -> list[torch.Tensor | None] | None:
    """The gradients of inputs (x, y, masters) by the torch form; None: the operator knows this gradient."""
    if type(gradient) is FakeTensor and not torch.is_grad_enabled():
        return None
    adapter = _callers.get(number)
    if adapter is None:
        raise RuntimeError(
            "a C++ operator by itself has no second derivative (create_graph=True) and no vmap of its backward; its "
            "adapter has, as long as the model is alive: keep it until the gradients are computed, or choose "
            "BEM_PEFT_KERNELS=torch."
        )
    found: list[torch.Tensor | None] = adapter.torch_gradients(is_training, inputs, gradient)
    return found


def source_key() -> str:
    """Eight hexadecimal digits of the operators' source and torch's version: each has a library of its own."""
    digest = hashlib.sha256(torch.__version__.encode())
    for source in sorted(FOLDER.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:8]


def processor_key() -> str:
    """Eight hexadecimal digits of the processor's instruction set, which the library is compiled for."""
    return hashlib.sha256(_instructions().encode()).hexdigest()[:8]


def _instructions() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    flags = [line for line in lines if line.lower().startswith(("flags", "features"))]
    return flags[0] if flags else f"{platform.machine()} {platform.processor()}"


def padded(weight: torch.Tensor) -> torch.Tensor:
    """(n, r) -> contiguous float32 (n, r rounded up to 16), zeros in the new columns."""
    return torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % LANES)).contiguous()


def _y_itself(x: torch.Tensor, y: torch.Tensor, *rest: Any) -> torch.Tensor:
    return y


def _like_y(x: torch.Tensor, y: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


# FLOPs of the products, without the padding: what the torch forms are counted as


def _rows(y: Any) -> int:
    return math.prod(y[:-1])


def _film_flops(x: Any, y: Any, w: Any, bias: Any, gamma: Any, beta: Any, *rest: Any, **options: Any) -> int:
    return 2 * _rows(y) * (x[-1] * w[0] + y[-1] * (gamma[0] + beta[0]))


def _kronecker_flops(x: Any, y: Any, u: Any, v_t: Any, b: Any, v_rank: int, *rest: Any, **options: Any) -> int:
    return 2 * _rows(y) * (u[0] * x[-1] + u[0] * v_t[0] * v_rank + b[0] * y[-1])


def _rank_mask_flops(x: Any, y: Any, a_t: Any, b: Any, gate_t: Any, mask_t: Any, active: int, is_task_mask: bool,
                     *rest: Any, **options: Any) -> int:  # fmt: skip
    rank = b[0]
    control = (rank if gate_t[0] else 0) + (0 if is_task_mask else rank)
    return 2 * _rows(y) * (rank * (x[-1] + y[-1]) + rank * control)


def _head_gating_flops(
    x: Any, y: Any, a_t: Any, b: Any, gate_w: Any, bias: Any, heads: int, ranks: Any, *rest: Any, **options: Any
) -> int:
    return 2 * _rows(y) * (x[-1] * max(ranks) + b[0] * y[-1] + gate_w[0] * len(ranks))


# A product with a weight costs two of its size in the backward, one of them where x wants no gradient. PT3 projects x
# once more, since what stands between its factors is not kept.


def _film_train(x: Any, y: Any, w: Any, bias: Any, gamma: Any, beta: Any, *rest: Any, **options: Any) -> int:
    return 2 * _rows(y) * (x[-1] * w[0] + y[-1] * _units(gamma, beta))


def _film_backward(
    gradient: Any, x: Any, y: Any, w: Any, gamma: Any, beta: Any, c: Any, rms: Any, s: Any, clamp: Any, largest: Any,
    needs_x: bool, **options: Any,
) -> int:  # fmt: skip
    return 2 * _rows(y) * (x[-1] * w[0] * (1 + needs_x) + 2 * y[-1] * _units(gamma, beta))


def _units(*weights: Any) -> int:
    return sum(weight[1] for weight in weights if weight is not None)


def _kronecker_train(x: Any, y: Any, u: Any, v: Any, b: Any, *rest: Any, **options: Any) -> int:
    return 2 * _rows(y) * (u[0] * x[-1] + u[0] * v[1] * v[0] + b[1] * y[-1])


def _kronecker_backward(
    gradient: Any, x: Any, u: Any, v: Any, b: Any, z: Any, s: Any, needs_x: bool, **options: Any
) -> int:
    left, right = u[0] * x[-1], u[0] * v[1] * v[0]
    return 2 * _rows(gradient) * (left * (2 + needs_x) + 2 * right + 2 * b[1] * gradient[-1])


def _rank_mask_train(
    x: Any, y: Any, a: Any, b: Any, c: Any, m: Any, active: int, is_task_mask: bool, *rest: Any, **options: Any
) -> int:
    control = a[0] * a[0] * ((c is not None) + (not is_task_mask))
    return 2 * _rows(y) * (a[0] * (x[-1] + y[-1]) + control)


def _rank_mask_backward(
    gradient: Any, x: Any, a: Any, b: Any, c: Any, m: Any, z: Any, active: int, is_task_mask: bool, hadamard: bool,
    temperature: Any, s: Any, needs_x: bool, **options: Any,
) -> int:  # fmt: skip
    control = a[0] * a[0] * ((c is not None) + (not is_task_mask))
    return 2 * _rows(gradient) * (a[0] * x[-1] * (1 + needs_x) + 2 * a[0] * gradient[-1] + 2 * control)


def _head_gating_train(
    x: Any, y: Any, a: Any, b: Any, gate_w: Any, bias: Any, heads: int, ranks: Any, *rest: Any, **options: Any
) -> int:
    return 2 * _rows(y) * (x[-1] * max(ranks) + b[1] * y[-1] + gate_w[0] * gate_w[1])


def _head_gating_backward(
    gradient: Any, x: Any, a: Any, b: Any, gate_w: Any, bias: Any, low: Any, half: Any, heads: int, ranks: Any,
    temperature: Any, s: Any, needs_x: bool, **options: Any,
) -> int:  # fmt: skip
    into_x = (x[-1] * max(ranks) + gate_w[0] * gate_w[1]) * (1 + needs_x)
    return 2 * _rows(gradient) * (into_x + 2 * b[1] * gradient[-1])


TRAINING_FLOPS: dict[str, Any] = {
    "film_train": _film_train, "film_backward": _film_backward,
    "kronecker_train": _kronecker_train, "kronecker_backward": _kronecker_backward,
    "rank_mask_train": _rank_mask_train, "rank_mask_backward": _rank_mask_backward,
    "head_gating_train": _head_gating_train, "head_gating_backward": _head_gating_backward,
}  # fmt: skip


# shapes alone, as of one process's fake tensors: what a budget is counted on


def _coefficients(y: torch.Tensor, width: int) -> torch.Tensor:
    return y.new_empty(_rows(y.shape), width, dtype=torch.float32)


def _whole_vectors(width: int) -> int:
    return width + -width % LANES


def _gradients(needs_x: bool, x: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
    return (torch.empty_like(x) if needs_x else None, *(None if t is None else torch.empty_like(t) for t in rest))


def _film_train_fake(x: Any, y: Any, w: Any, bias: Any, gamma: Any, beta: Any, s: Any, clamp: Any, largest: Any,
                     is_rms: bool, *rest: Any) -> tuple[Any, ...]:  # fmt: skip
    rms = _coefficients(y, 1).squeeze(1) if is_rms and beta is not None else y.new_empty(0, dtype=torch.float32)
    return torch.empty_like(y), _coefficients(y, _whole_vectors(w.shape[0])), rms


TRAINING_FAKES: dict[str, Any] = {
    "film_train": _film_train_fake,
    "film_backward": lambda grad, x, y, w, gamma, beta, c, rms, s, clamp, largest, needs_x: _gradients(
        needs_x, x, y, w, w[:, 0], gamma, beta
    ),
    "kronecker_train": lambda x, y, u, v, b, s: (torch.empty_like(y), _coefficients(y, b.shape[1])),
    "kronecker_backward": lambda grad, x, u, v, b, z, s, needs_x: _gradients(needs_x, x, u, v, b),
    "rank_mask_train": lambda x, y, a, *rest: (torch.empty_like(y), _coefficients(y, _whole_vectors(a.shape[0]))),
    "rank_mask_backward": lambda grad, x, a, b, c, m, *rest: _gradients(rest[-1], x, a, b, c, m),
    "head_gating_train": lambda x, y, a, b, gate_w, *rest: (
        torch.empty_like(y), _coefficients(y, a.shape[0]), _coefficients(y, _whole_vectors(gate_w.shape[0])),
    ),
    "head_gating_backward": lambda grad, x, a, b, gate_w, bias, *rest: _gradients(rest[-1], x, a, b, gate_w, bias),
}  # fmt: skip
