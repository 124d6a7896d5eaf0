"""bem-peft kernels: what computes the methods here and why; the C++ operators built, Triton's kernels proved right."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `kernels`."""
    command = commands.add_parser("kernels", help="print what computes the methods on this machine, and why")
    command.add_argument(
        "--build", action="store_true",
        help="build the C++ operators for this machine (g++ or clang++; half a minute), compare them with the torch "
        "forms in float64, and mark them as proved right, so that `auto` takes them before those of a wheel",
    )  # fmt: skip
    command.add_argument(
        "--prove", action="store_true",
        help="compare Triton's kernels on every kind of GPU here with the torch forms in float64, and mark them as "
        "proved right, so that `auto` takes them on it",
    )  # fmt: skip
    command.set_defaults(run=_kernels)


def _kernels(arguments: argparse.Namespace) -> int:
    if (arguments.build and not _build()) or (arguments.prove and not prove()):
        return 1
    print("\n".join(_lines()))
    return 0


def _build() -> bool:
    """Whether the operators are proved right now; says what stands in the way."""
    from bem_peft.kernels import cpp_build, cpp_library
    from bem_peft.tuners.cpp_proof import proof

    before = cpp_library.standing()
    path = cpp_library.library()
    if before.is_refused and before.path == path:  # nothing of it is kept
        print(f"removed: {before.why}")
        shutil.rmtree(path.parent)
    try:
        found = proof(cpp_build.build_here())
    except cpp_build.BuildError as error:
        print(error)
        return False
    print("".join(f"{line}\n" for line in found.broken), end="")
    print(
        f"{found.compared} outputs and gradients compared with float64; {len(found.broken)} beyond twice the torch "
        "forms' error"
    )
    if found.broken:
        print("the C++ operators are not right on this machine: please report this; `auto` does not take them")
        return False
    cpp_library.write_mark({"compared": found.compared})
    return True


def prove() -> bool:
    """Whether Triton's kernels are proved right on the GPUs here; says what stands in the way."""
    from importlib.util import find_spec

    import torch

    from bem_peft.kernels import triton_mark

    if not torch.cuda.is_available():
        print("there is no GPU to prove Triton's kernels on: torch sees no CUDA or ROCm device")
        return False
    if find_spec("triton") is None:
        print("the package triton is not installed: pip install 'bem_peft[triton]' (Linux)")
        return False
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    kinds = {str(triton_mark.identity(device)): device for device in reversed(devices)}
    return all([_prove_on(device) for device in kinds.values()])


def _prove_on(device: torch.device) -> bool:
    import torch

    from bem_peft.kernels import triton_mark
    from bem_peft.kernels.parity import proof

    name = torch.cuda.get_device_name(device)
    print(f"{name}: compiling Triton's kernels and comparing them, some minutes", flush=True)
    triton_mark.remove_mark(device)
    with torch.cuda.device(device):
        compared, broken = proof(device)
    print("".join(f"{line}\n" for line in broken), end="")
    print(f"{compared} outputs and gradients compared with float64; {len(broken)} beyond twice the torch forms' error")
    if broken:
        print(f"Triton's kernels are not right on {name}: please report this; `auto` does not take them")
        return False
    triton_mark.write_mark(device, {"compared": compared})
    return True


def _lines() -> Iterable[str]:
    from importlib.util import find_spec

    import torch

    from bem_peft.kernels import cpp, cpp_library, triton_mark
    from bem_peft.kernels.backend import VARIABLE, chosen

    found, used = cpp_library.standing(), cpp.loaded()
    yield f"{VARIABLE} = {chosen.name}"
    yield f"auto on a CPU    {'cpp' if found.is_proved else 'torch'}"
    for index in range(torch.cuda.device_count()):
        why = triton_mark.obstacle(torch.device("cuda", index))
        yield f"auto on cuda:{index}   {'triton' if why is None else f'torch: {why}'}"
    if not torch.cuda.device_count():
        yield f"auto on a GPU    torch, or triton where it was proved right there ({triton_mark.COMMAND})"
    yield f"cpp              {'refused: ' if found.is_refused else ''}{found.why}"
    if not found.is_proved:
        yield f"                 {cpp_library.COMMAND}"
    elif chosen.name == "auto" and chosen.untold is not None:
        yield f"                 not in use: {chosen.untold}"
    if used is not None and used != found.path:
        yield f"                 this process has loaded {used}"
    yield f"triton           {'installed' if find_spec('triton') else 'not installed'}"
