"""One rank of `test_two_ranks.py`: python -m tests.contract.two_ranks RANK FOLDER."""

from __future__ import annotations

import faulthandler
import sys
from datetime import timedelta

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.contract.invariants import gradients, loss_of
from tests.contract.methods import METHODS, adapted, adapter_parameters
from tests.tiny_models import tokens


def main(rank: int, folder: str) -> None:
    faulthandler.dump_traceback_later(200, exit=True)
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=100)
    )
    ids = tokens(batch=4)[rank * 2 : rank * 2 + 2]
    # kept until the group ends: gloo's thread must not free the last reference to a tensor of Python while the group's
    # destructor, which holds the GIL, waits for that thread
    reduced = []
    for method in METHODS:
        model = adapted(method, "llama").train()
        parallel = DistributedDataParallel(model)  # raises if a parameter takes no part in the loss
        found = gradients(model, loss_of(parallel, "llama", ids))
        if rank == 0:
            torch.save(found, f"{folder}/{method}.pt")
        torch.optim.SGD(model.parameters(), lr=0.1).step()  # the hooks of the step run in both ranks
        for parameter in adapter_parameters(model).values():
            both = parameter.detach().clone()
            reduced.append(both)
            distributed.all_reduce(both)
            if not torch.equal(both, parameter * 2):
                raise AssertionError(f"{method}: the ranks' weights differ after a step")
        del parallel
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
