"""The operators compute on torch's own threads, as many as torch may use, and others may run meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from bem_peft.kernels import cpp, cpp_threads
from tests.kernels.test_cpp_operators import CASES, made, pytestmark, torch_form_after

__all__ = ["pytestmark", "torch_form_after"]
# how many threads of the process an operator on many rows has started
PROGRAM = """
import os, sys, threading, torch
count = lambda: len(os.listdir("/proc/self/task"))
runtimes = lambda: {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}
torch.set_num_threads(int(sys.argv[1]))
from bem_peft.kernels import cpp
at_first, loaded = count(), runtimes()
operators = cpp.build()
assert runtimes() == loaded, runtimes()
def call(before):
    x, y = torch.zeros(3000, 6), torch.zeros(3000, 4)
    operators.kronecker(x, y, torch.zeros(1, 3), torch.zeros(2, 16), torch.zeros(1, 4), 1, 1.0)
    print(count() - (before or count_in_thread))
def call_in_thread():
    global count_in_thread
    count_in_thread = count()
    call(0)
if sys.argv[2] == "main":
    call(at_first)
else:
    thread = threading.Thread(target=call_in_thread); thread.start(); thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("where", ["main", "a thread of Python"])
def test_torchs_number_of_threads_is_that_of_the_operators(where: str, number: int) -> None:
    """One that computes is there already; a thread of Python has a team of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(number), where], capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[-1]) == number - 1


def test_a_library_brings_no_runtime_of_its_own() -> None:
    cpp.build()
    path = cpp.loaded()
    assert path is not None
    held = path.read_bytes()
    assert not [name for name in (b"libgomp", b"libomp", b"libiomp", b"libtorch") if name in held]


@pytest.mark.parametrize("dtype", cpp.DTYPES, ids=str)
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_number_of_threads_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    cpp.build()
    adapter = made(name, CASES[name][2][0], 200).train()
    x = torch.randn(333, adapter.in_features, dtype=dtype, requires_grad=True)
    y = torch.randn(333, 200, dtype=dtype, requires_grad=True)
    found = []
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            out = adapter.training_operator(x, y)
            wanted = [x, y, *adapter.parameters()]
            found.append([out, *torch.autograd.grad(out.float().square().sum(), wanted)])
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_an_operator_lets_other_threads_run() -> None:
    """The other thread waits for a lock that is released just before; with the interpreter held it would not come."""
    cpp.build()
    run = cpp.make_site.__self__.run  # past torch, whose own functions let others run as well
    x, y, out = torch.randn(3000, 1536), torch.randn(3000, 200), torch.empty(3000, 200)
    arguments = x, y, torch.randn(5, 48), torch.randn(32, 16), torch.randn(15, 200), 3, 1.0, out
    gate, seen = threading.Lock(), []
    gate.acquire()
    other = threading.Thread(target=lambda: (gate.acquire(), seen.append(True)))
    other.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100.0)  # nobody is asked to give the interpreter away
    try:
        gate.release()
        for _ in range(200):  # the system may be slow to wake it
            run("kronecker", arguments)
            if came := bool(seen):
                break
    finally:
        sys.setswitchinterval(interval)
    other.join()
    assert came


def test_a_torch_whose_threads_are_not_found_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(cpp_threads.addresses()) == 5
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        with pytest.raises(cpp_threads.ThreadsError, match=r"runtime was found that is not torch's: .* torch 77"):
            cpp_threads.addresses()
    with monkeypatch.context() as patch:
        patch.setattr(torch.__config__, "parallel_info", lambda: "ATen parallel backend: native thread pool")
        with pytest.raises(cpp_threads.ThreadsError, match="computes without OpenMP"):
            cpp_threads.addresses()
    monkeypatch.setattr(cpp_threads, "FUNCTIONS", ("GOMP_parallel", "no_such_function"))
    with pytest.raises(cpp_threads.ThreadsError, match=r"was not found: neither the process nor .*libtorch_cpu"):
        cpp_threads.addresses()


def test_an_operator_without_torchs_threads_is_an_error_that_says_so() -> None:
    code = (
        "import torch; torch.__config__.parallel_info = lambda: 'none'; from bem_peft.kernels import backend, cpp\n"
        "try:\n    cpp.build()\nexcept cpp.BuildError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "cannot be loaded: this torch computes without OpenMP" in done.stdout
