"""One process of `test_enforce.py`'s accelerate run: torchrun --nproc_per_node 2 -m THIS FOLDER CASE [CASE ...]."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bem_peft import BudgetConstraints, BudgetError, KroneckerConfig, check_budget, count_parameters
from tests.tiny_models import build


def main(folder: Path, case: str) -> str:
    accelerator = Accelerator(cpu=True)
    if case == "fsdp2":
        return sharded(folder, accelerator.process_index)
    budget = BudgetConstraints.from_anchor(build("llama"), LoraConfig(r=2, target_modules=["down_proj"]))
    kept = LoraConfig(r=2, target_modules=["down_proj"], use_rslora=True)
    broken = KroneckerConfig(u_rank=4, v_rank=4)
    model = get_peft_model(build("llama"), broken if case == "broken" else kept)
    if case == "one_fails" and accelerator.process_index == 1:
        model.requires_grad_(False)  # nothing to count a backward pass of, on this process only
        budget = BudgetConstraints(flops=budget.flops, inputs={"input_ids": "no tensor"})
    try:
        check_budget(accelerator, accelerator.prepare(model) if case != "one_fails" else model, budget)
    except BudgetError as error:
        outcome = f"BudgetError {error.report.is_met}"
    except RuntimeError as error:
        outcome = f"RuntimeError {error}"
    else:
        outcome = "kept"
    (folder / f"{case}_{accelerator.process_index}.txt").write_text(outcome)
    return outcome


def sharded(folder: Path, rank: int) -> str:
    """Counts of a model whose parameters FSDP2 has cut in two, beside those of the whole one."""
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["down_proj"]))
    whole = count_parameters(model)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    cut = sum(p.to_local().numel() for p in model.parameters()) < sum(p.numel() for p in model.parameters())
    outcome = f"cut {cut}, same {count_parameters(model) == whole}"
    (folder / f"fsdp2_{rank}.txt").write_text(outcome)
    return outcome


if __name__ == "__main__":
    faulthandler.dump_traceback_later(150, exit=True)
    for case in sys.argv[2:]:
        main(Path(sys.argv[1]), case)
