"""I5 and promise 8: two processes end where one does, and save the same file, under DDP, FSDP2 and DeepSpeed's ZeRO.

accelerate shards with FSDP on accelerators alone; here its own code runs with that one check answered otherwise
(`two_ranks.let_accelerate_shard_on_cpus`).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def run(folder: Path, mode: str, kinds: tuple[str, ...], processes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST", "TORCHINDUCTOR"))}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [*command, "tests.training.two_ranks", str(folder), mode, *kinds], cwd=ROOT, env=environment, text=True,
        capture_output=True, stdin=subprocess.DEVNULL, timeout=480,
    )  # fmt: skip


# the kinds of a mode run one after the other in the same processes: to start those takes longer than to train
EXPERTS = ("experts", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "nemotron_h")
ALL = ("penalised", "watched", *EXPERTS)
MODES = {"ddp": ("penalised", "watched", "experts"), "fsdp2": ALL, "zero2": ALL[:1], "zero3": ALL[:1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(folder: Path) -> None:
    """What one process makes of each kind."""
    result = run(folder, "one", ALL, 1)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-3000:]


@pytest.fixture(scope="module")
def together(folder: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """What two processes make of the kinds of a mode, once."""
    return functools.cache(lambda mode: run(folder, mode, MODES[mode], 2))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        pytest.param(mode, kind, marks=NEEDS_DEEPSPEED if mode.startswith("zero") else ())
        for mode, kinds in MODES.items()
        for kind in kinds
    ],
)
def test_two_processes_end_where_one_does(
    mode: str, kind: str, folder: Path, together: Callable[[str], subprocess.CompletedProcess[str]]
) -> None:
    result = together(mode)
    assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-3000:]
    expected = load_file(folder / f"one-{kind}" / "adapter" / "adapter_model.safetensors")
    found = load_file(folder / f"{mode}-{kind}" / "adapter" / "adapter_model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    for name, tensor in expected.items():  # Adam turns the rounding of a gradient near 0 into a step
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert sorted(p.name for p in (folder / f"{mode}-{kind}" / "adapter").iterdir()) == sorted(
        p.name for p in (folder / f"one-{kind}" / "adapter").iterdir()
    )
    logs = [json.loads((folder / f"{m}-{kind}" / "logs.json").read_text()) for m in ("one", mode)]
    assert [log["loss"] for log in logs[1]] == pytest.approx([log["loss"] for log in logs[0]], rel=1e-4)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_zero_refuses_what_it_would_undo(mode: str, tmp_path: Path) -> None:
    """Caps, annealing and the emergency brake act around an optimizer step, on parameters that ZeRO overwrites."""
    result = run(tmp_path, mode, ("watched",), 2)
    assert result.returncode != 0
    assert "set emergency_stabilization=False" in result.stdout + result.stderr
