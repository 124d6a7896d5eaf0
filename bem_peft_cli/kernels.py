"""bem-peft kernels: what computes the methods here and why; the C++ operators built and proved right."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `kernels`."""
    command = commands.add_parser("kernels", help="print what computes the methods on this machine, and why")
    command.add_argument(
        "--build", action="store_true",
        help="build the C++ operators (g++ or clang++, ninja; half a minute), compare them with the torch forms in "
        "float64, and mark them as proved right on this machine, so that `auto` takes them",
    )  # fmt: skip
    command.set_defaults(run=_kernels)


def _kernels(arguments: argparse.Namespace) -> int:
    if arguments.build and not _build():
        return 1
    print("\n".join(_lines()))
    return 0


def _build() -> bool:
    """Whether the operators are proved right now; says what stands in the way."""
    from bem_peft.kernels import cpp, cpp_library
    from bem_peft.tuners.cpp_proof import deviations

    before = cpp_library.standing()
    if before.is_refused:  # nothing of it is kept
        print(f"removed: {before.why}")
        shutil.rmtree(before.path.parent)
    cpp_library.remove_mark()
    try:
        found = deviations()
    except cpp.BuildError as error:
        print(error)
        return False
    broken = [one for one in found if not one.is_kept]
    for one in broken:
        print(
            f"{one.case}, {one.dtype}, {one.tensor}: {one.error:.3g} from float64, allowed {one.allowed:.3g} "
            f"(the torch form {one.torch_error:.3g})"
        )
    print(
        f"{len(found)} outputs and gradients compared with float64; {len(broken)} beyond twice the torch forms' error"
    )
    if broken:
        print("the C++ operators are not right on this machine: please report this; `auto` takes the torch forms")
        return False
    cpp_library.write_mark({"compared": len(found)})
    return True


def _lines() -> Iterable[str]:
    from importlib.util import find_spec

    from bem_peft.kernels import cpp_library
    from bem_peft.kernels.backend import VARIABLE, chosen

    found = cpp_library.standing()
    yield f"{VARIABLE} = {chosen.name}"
    yield f"auto on a CPU    {'cpp' if found.is_proved else 'torch'}"
    yield "auto on a GPU    torch: no GPU has proved the Triton kernels"
    yield f"cpp              {'refused: ' if found.is_refused else ''}{found.why}"
    if not found.is_proved:
        yield f"                 {cpp_library.COMMAND}"
    yield f"triton           {'installed' if find_spec('triton') else 'not installed'}"
