"""I5: two DDP ranks with half of the batch each have the gradients of one process with all of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.contract.invariants import assert_same_gradients, gradients, loss_of
from tests.contract.methods import METHODS, adapted, adapter_parameters
from tests.tiny_models import tokens


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    ids = tokens(batch=4)[rank * 2 : rank * 2 + 2]
    for method in METHODS:
        model = adapted(method, "llama").train()
        parallel = DistributedDataParallel(model)  # raises if a parameter takes no part in the loss
        found = gradients(model, loss_of(parallel, "llama", ids))
        if rank == 0:
            torch.save(found, f"{folder}/{method}.pt")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # the hooks of the step run in both ranks
        optimizer.step()
        for parameter in adapter_parameters(model).values():
            mine = parameter.detach().clone()
            distributed.all_reduce(mine)
            assert torch.equal(mine, parameter * 2), f"{method}: the ranks' weights differ after a step"
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(_rank, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_i5_two_ranks_have_the_gradients_of_one(method: str, two_ranks: Path) -> None:
    model = adapted(method, "llama").train()
    expected = gradients(model, loss_of(model, "llama", tokens(batch=4)))
    found = torch.load(two_ranks / f"{method}.pt", weights_only=True)
    assert_same_gradients(found, expected, 1e-4)
