"""I5: two DDP ranks with half of the batch each have the gradients of one process with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contract.invariants import assert_same_gradients, gradients, loss_of
from tests.contract.methods import METHODS, adapted
from tests.tiny_models import tokens

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the gradients of rank 0, after both ranks ended well."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST", "TORCHINDUCTOR"))}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.contract.two_ranks", str(rank), str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output[-3000:]
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_i5_two_ranks_have_the_gradients_of_one(method: str, two_ranks: Path) -> None:
    model = adapted(method, "llama").train()
    expected = gradients(model, loss_of(model, "llama", tokens(batch=4)))
    found = torch.load(two_ranks / f"{method}.pt", weights_only=True)
    assert_same_gradients(found, expected, 1e-4)
