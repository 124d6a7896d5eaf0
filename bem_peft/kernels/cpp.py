"""The methods as one C++ operator a site, on a CPU; built by torch's own tools.

The torch forms in the methods' files are the specification (`tests/kernels`). An operator takes rows in float32 or
bfloat16 and sums in float32.

Inference (`film`): wide weights come in the dtype of the rows, small ones in float32, padded to 16 columns. Each has a
form that writes into y (`film_`), for a y that nobody else holds.

Training (`film_train`): the masters come as they are, float32; they are rounded to the dtype of the rows and folded
inside. The backward is one operator (`film_backward`) and gives float32 gradients; one that is differentiated again
goes through the torch form of the adapter that called (`name_caller`).

Building takes half a minute, a C++ compiler (g++ or clang++) and ninja, once; the result stays in torch's folder of
extensions (`cpp_library`). Who finds another process building waits for it, `WAIT_SECONDS` at most, and builds itself
where that one is gone. A library that was proved right is loaded as it is, without a compiler.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.file_baton import FileBaton
from torch.utils.flop_counter import register_flop_formula

from bem_peft.kernels import cpp_library
from bem_peft.kernels.cpp_counts import FAKES, FLOPS, LANES

WAIT_SECONDS = 600.0  # for another process that builds
OWNED = b"bem_peft"
logger = logging.getLogger(__name__)
# set by `build`: make_site(kind, module._parameters, packed, options), and run_site(site, module._parameters, x, y,
# may_overwrite), the operator without the dispatcher, or None where that is needed or a master has changed
make_site: Any = None
run_site: Any = None
_name_caller: Any = None  # name_caller(number, is_training), of the next training operator of this thread
DTYPES = (torch.float32, torch.bfloat16)


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class BuildError(RuntimeError):
    """The C++ operators could not be built or loaded."""


_building = threading.RLock()
_proved: Any = None  # the module of a library that was proved right


def build() -> Any:
    """The operators, `torch.ops.bem_peft_cpu`, built if they are not yet.

    Raises:
        BuildError: no compiler or no ninja, the compiler's own error, or a lock that another build left behind.
    """
    with _building:
        return _built()


def load_proved() -> None:
    """Load the library that was proved right here; `build` gives its operators from then on.

    Raises:
        BuildError: the system cannot load it.
    """
    global _proved
    with _building:
        if _proved is None and not _built.cache_info().currsize:
            try:
                _proved = cpp_library.load()
            except ImportError as error:
                raise BuildError(f"{cpp_library.library()} cannot be loaded: {error}") from error
        _built()


class _Baton(FileBaton):
    """torch's lock on a folder of extensions, which waits for ever where the process that took it was killed.

    This one's file is locked as well, by the system, for as long as its process lives; `OWNED` in it says so.
    """

    def try_acquire(self) -> bool:
        try:
            file = os.open(self.lock_file_path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        except FileExistsError:
            return False
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.write(file, OWNED)
        self.fd = file  # type: ignore[assignment]
        return True

    def wait(self) -> None:
        end = time.monotonic() + WAIT_SECONDS
        logger.warning(
            "waiting for another process to build the C++ operators (%s), %g s at most", self.lock_file_path,
            WAIT_SECONDS,
        )  # fmt: skip
        while Path(self.lock_file_path).exists():
            if self._remove_where_its_process_is_gone():
                return
            if time.monotonic() > end:
                raise BuildError(
                    f"waited {WAIT_SECONDS:g} s for another process to build the C++ operators: its lock "
                    f"{self.lock_file_path} is still there. If no other process is building now, one was killed while "
                    f"it did: delete that file and start again; or choose BEM_PEFT_KERNELS=torch."
                )
            time.sleep(self.wait_seconds)

    def _remove_where_its_process_is_gone(self) -> bool:
        if fcntl is None:
            return False
        try:
            file = os.open(self.lock_file_path, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_dead = os.read(file, len(OWNED)) == OWNED
            if is_dead and os.path.samestat(os.fstat(file), os.stat(self.lock_file_path)):
                os.remove(self.lock_file_path)
            return is_dead
        except (BlockingIOError, FileNotFoundError):
            return False
        finally:
            os.close(file)


def _load(may_retry: bool = True) -> Any:
    if _proved is not None:
        return _proved
    from torch.utils import cpp_extension

    name, folder = cpp_library.name(), cpp_library.folder()
    # from torch 2.15 on the lock is the system's, which ends with the process that holds it
    original = getattr(cpp_extension, "FileBaton", None)
    if original is not None:
        cpp_extension.FileBaton = _Baton  # type: ignore[misc]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return cpp_extension.load(
            name=name,
            sources=[str(source) for source in cpp_library.sources()],
            extra_cflags=cpp_library.CFLAGS,
            build_directory=str(folder),
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
    for name, formula in FLOPS.items():
        torch.library.register_fake(f"bem_peft_cpu::{name}", FAKES[name])
        register_flop_formula(getattr(torch.ops.bem_peft_cpu, name))(formula)
    return torch.ops.bem_peft_cpu


class Caller(Protocol):
    """An adapter, as far as a training operator knows it."""

    training: bool

    def torch_gradients(
        self, is_training: bool, inputs: list[torch.Tensor | None], gradient: torch.Tensor
    ) -> list[torch.Tensor | None]: ...


_callers: weakref.WeakValueDictionary[int, Caller] = weakref.WeakValueDictionary()
_numbers: weakref.WeakKeyDictionary[Caller, int] = weakref.WeakKeyDictionary()
_next_number = itertools.count(1)


def name_caller(adapter: Caller) -> None:
    """Say whose training operator runs next in this thread: its `torch_gradients` is asked where the operator's
    backward is differentiated again."""
    number = _numbers.get(adapter)
    if number is None:
        number = _numbers[adapter] = next(_next_number)
        _callers[number] = adapter
    if _name_caller is None:  # the first adapter of this process, which came by pickle
        build()
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
    return adapter.torch_gradients(is_training, inputs, gradient)


def padded(weight: torch.Tensor) -> torch.Tensor:
    """(n, r) -> contiguous float32 (n, r rounded up to 16), zeros in the new columns."""
    return torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % LANES)).contiguous()
