"""Settings of every test: one thread (they run in parallel), no hub, Triton interpreted, no warnings of others.

The methods run in their torch forms, on every machine: what `auto` takes depends on what was built and proved there. A
test of another form chooses it (`use_kernels`), and every test starts with the torch forms, or with what
BEM_PEFT_KERNELS says: `BEM_PEFT_KERNELS=cpp make test` runs all of them with the C++ operators."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# before anything imports Triton, whose own functions are made for the interpreter or for a GPU when they are imported
os.environ["TRITON_INTERPRET"] = "1"

KERNELS = os.environ.setdefault("BEM_PEFT_KERNELS", "torch")

import pytest
import torch
from filelock import FileLock

from bem_peft import use_kernels  # registers the methods

torch.set_num_threads(1)


OWN_WARNINGS_ONLY = os.environ.get("BEM_PEFT_WARNINGS") == "own"  # `make versions`, `make newest`


def pytest_configure(config: pytest.Config) -> None:
    lines = [
        # peft 0.21 asks transformers 5.23 for an attribute that was renamed
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
        "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
        # torch's own modules, met when inductor is imported
        "ignore:.*:DeprecationWarning:torch.*",
    ]
    if OWN_WARNINGS_ONLY:  # what other packages of another version say to each other is not ours to fail by
        lines = ["default", "error:::bem_peft", "error:::tests", "error:.*(past_key_values|cache_params).*", *lines]
    for line in lines:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported is not looked through at every collection


@pytest.fixture(autouse=True)
def _seed_and_form() -> None:
    torch.manual_seed(0)
    use_kernels(KERNELS)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of SmolLM2-135M-Instruct, written by examples/smollm2.py, once for all test processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    checkpoint = folder / "SmolLM2-135M-Instruct"
    with FileLock(folder / "smollm2.lock"):
        if not checkpoint.exists():
            script = Path(__file__).parents[1] / "examples" / "smollm2.py"
            subprocess.run([sys.executable, "-W", "ignore", str(script), str(checkpoint)], cwd=folder, check=True)
    return checkpoint
