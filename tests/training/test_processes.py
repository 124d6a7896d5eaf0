"""I5 and promise 8: two processes end where one does, and save the same file, under DDP, FSDP2 and DeepSpeed's ZeRO.

accelerate shards with FSDP on accelerators alone; here its own code runs with that one check answered otherwise
(`two_ranks.let_accelerate_shard_on_cpus`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def run(folder: Path, mode: str, kind: str, processes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST", "TORCHINDUCTOR"))}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [*command, "tests.training.two_ranks", str(folder), mode, kind], cwd=ROOT, env=environment, text=True,
        capture_output=True, stdin=subprocess.DEVNULL, timeout=280,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what one process makes of each kind."""
    folder = tmp_path_factory.mktemp("processes")
    for kind in ("penalised", "watched", "experts"):
        result = run(folder, "one", kind, 1)
        assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("ddp", "penalised"),
        ("ddp", "watched"),
        ("fsdp2", "penalised"),
        ("fsdp2", "watched"),
        ("ddp", "experts"),
        ("fsdp2", "experts"),
        pytest.param("zero2", "penalised", marks=NEEDS_DEEPSPEED),
        pytest.param("zero3", "penalised", marks=NEEDS_DEEPSPEED),
    ],
)
def test_two_processes_end_where_one_does(mode: str, kind: str, alone: Path) -> None:
    result = run(alone, mode, kind, 2)
    assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-3000:]
    expected = load_file(alone / f"one-{kind}" / "adapter" / "adapter_model.safetensors")
    found = load_file(alone / f"{mode}-{kind}" / "adapter" / "adapter_model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    for name, tensor in expected.items():  # Adam turns the rounding of a gradient near 0 into a step
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert sorted(p.name for p in (alone / f"{mode}-{kind}" / "adapter").iterdir()) == sorted(
        p.name for p in (alone / f"one-{kind}" / "adapter").iterdir()
    )
    logs = [json.loads((alone / f"{m}-{kind}" / "logs.json").read_text()) for m in ("one", mode)]
    assert [log["loss"] for log in logs[1]] == pytest.approx([log["loss"] for log in logs[0]], rel=1e-4)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_zero_refuses_what_it_would_undo(mode: str, tmp_path: Path) -> None:
    """Caps, annealing and the emergency brake act around an optimizer step, on parameters that ZeRO overwrites."""
    result = run(tmp_path, mode, "watched", 2)
    assert result.returncode != 0
    assert "set emergency_stabilization=False" in result.stdout + result.stderr
