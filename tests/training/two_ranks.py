"""A short training run on one process or two: torchrun --nproc_per_node N -m THIS FOLDER MODE KIND.

MODE: one, ddp, fsdp2, zero2, zero3. KIND: penalised, watched, experts. The adapter is saved to FOLDER/MODE-KIND.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from torch import distributed

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    PTTrainer,
    PTTrainingConfig,
    ResidualFiLMConfig,
)
from tests.tiny_models import build
from tests.training.equalities import collate, penalised, rows

ROOT = Path(__file__).parents[2]


def options_of(mode: str) -> dict[str, Any]:
    if mode == "fsdp2":
        return {"fsdp": True, "fsdp_config": json.loads((ROOT / "examples/distributed/fsdp2.json").read_text())}
    if mode.startswith("zero"):
        return {"deepspeed": str(ROOT / f"examples/distributed/deepspeed_{mode}.json")}
    return {}


def watched() -> Any:
    """What does something around an optimizer step: caps, annealing, the brake. No dropout: ranks draw apart."""
    config = CompositeConfig(
        [
            HeadGroupGatingConfig(decorrelation_strength=2.0, decorrelation_anneal_steps=5, max_singular_value=0.05),
            KroneckerConfig(u_rank=3, v_rank=2, fro_budget=0.05),
            ResidualFiLMConfig(gamma_dim=3, beta_dim=2),
        ],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(build("llama"), config).train()


def on_experts() -> Any:
    """Adapters of each expert of a mixture, the caps of their updates, what all share."""
    config = CompositeConfig(
        [KroneckerConfig(u_rank=3, v_rank=2, fro_budget=0.05), DynamicRankMaskConfig(total_rank=4, active_rank=2)],
        task_type="CAUSAL_LM", expert_sharing="factors",
    )  # fmt: skip
    return get_peft_model(build("qwen2_moe"), config).train()


KINDS = {"penalised": penalised, "watched": watched, "experts": on_experts}


def let_accelerate_shard_on_cpus() -> None:
    """accelerate knows FSDP on accelerators alone; sharding itself works between processes without one."""
    original = AcceleratorState.__init__

    def patched(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


def main(folder: Path, mode: str, kind: str) -> None:
    torch.set_num_threads(1)
    out = folder / f"{mode}-{kind}"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = PTTrainingConfig(
        str(out), max_steps=3, per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2,
        learning_rate=1e-2, lr_scheduler_type="linear", use_cpu=True, report_to="none", disable_tqdm=True, seed=3,
        dataloader_pin_memory=False, save_strategy="no", logging_steps=1, max_grad_norm=1.0, optim="adamw_torch",
        **options_of(mode),
    )  # fmt: skip
    if mode == "fsdp2":
        let_accelerate_shard_on_cpus()
    model = KINDS[kind]()
    trainer = PTTrainer(model, arguments, train_dataset=rows(8), data_collator=collate)
    trainer.train()
    trainer.save_model(str(out / "adapter"))
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "loss" in log]
        (out / "logs.json").write_text(json.dumps(logs))
    if distributed.is_initialized():
        distributed.barrier()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(200, exit=True)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    sys.stdout.flush()
    os._exit(0)  # without the group's destructor, which can wait for a thread that waits for the GIL
