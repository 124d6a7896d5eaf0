"""I5: two DDP ranks with half of the batch each have the gradients of one process with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.contract.invariants import assert_same_gradients, gradients, loss_of
from tests.contract.methods import METHODS, adapted
from tests.tiny_models import tokens

ROOT = Path(__file__).parents[2]
SECONDS = 240


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the gradients of rank 0, after both ranks ended well."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST", "TORCHINDUCTOR"))}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    logs = [folder / f"rank_{rank}.log" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-W", "ignore", "-m", "tests.contract.two_ranks", str(rank), str(folder)]
        with log.open("w") as output:
            ranks.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
                )
            )
    deadline = time.monotonic() + SECONDS
    try:  # until both ended well, or one did not: the other would wait for it
        while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    texts = [f"rank {rank}: exit {ranks[rank].returncode}\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs)]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(texts)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_i5_two_ranks_have_the_gradients_of_one(method: str, two_ranks: Path) -> None:
    model = adapted(method, "llama").train()
    expected = gradients(model, loss_of(model, "llama", tokens(batch=4)))
    found = torch.load(two_ranks / f"{method}.pt", weights_only=True)
    assert_same_gradients(found, expected, 1e-4)
