"""Short training runs on one process or two: torchrun --nproc_per_node N -m THIS FOLDER MODE KIND [KIND ...].

MODE: one, ddp, fsdp2, zero2, zero3. KIND: penalised, watched, experts, or a family of `tiny_experts`. The adapter is
saved to FOLDER/MODE-KIND.
"""

from __future__ import annotations

import faulthandler
import functools
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
from tests.tiny_experts import small
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


def on_family(kind: str) -> Any:
    """Adapters at the fused experts of a family, with parameters that experts share and some that each has."""
    config = CompositeConfig(
        [KroneckerConfig(u_rank=3, v_rank=2), ResidualFiLMConfig(gamma_dim=2, beta_dim=2, sites=["mlp_down"])],
        task_type="CAUSAL_LM", expert_sharing="factors",
    )  # fmt: skip
    return get_peft_model(small(kind), config).train()


KINDS = {"penalised": penalised, "watched": watched, "experts": on_experts}
FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "nemotron_h")
KINDS |= {kind: functools.partial(on_family, kind) for kind in FAMILIES}


def let_accelerate_shard_on_cpus() -> None:
    """accelerate knows FSDP on accelerators alone; sharding itself works between processes without one."""
    original = AcceleratorState.__init__

    def patched(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


def let_gloo_reduce() -> None:
    """DeepSpeed's own reduction between CPUs would be compiled first, for a minute."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train(folder: Path, mode: str, kind: str) -> None:
    out = folder / f"{mode}-{kind}"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # a family by SGD: Adam turns the rounding of a gradient near 0 into a step
    rate, optimizer = (0.5, "sgd") if kind in FAMILIES else (1e-2, "adamw_torch")
    arguments = PTTrainingConfig(
        str(out), max_steps=3, per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2,
        learning_rate=rate, lr_scheduler_type="linear", use_cpu=True, report_to="none", disable_tqdm=True, seed=3,
        dataloader_pin_memory=False, save_strategy="no", logging_steps=1, max_grad_norm=1.0, optim=optimizer,
        **options_of(mode),
    )  # fmt: skip
    torch.manual_seed(0)
    model = KINDS[kind]()
    trainer = PTTrainer(model, arguments, train_dataset=rows(8), data_collator=collate)
    trainer.train()
    trainer.save_model(str(out / "adapter"))
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "loss" in log]
        (out / "logs.json").write_text(json.dumps(logs))
    if distributed.is_initialized():
        distributed.barrier()


def main(folder: Path, mode: str, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    if mode == "fsdp2":
        let_accelerate_shard_on_cpus()
    if mode.startswith("zero"):
        let_gloo_reduce()
    for kind in kinds:
        print("begins:", kind, flush=True)
        train(folder, mode, kind)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(400, exit=True)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    sys.stdout.flush()
    os._exit(0)  # without the group's destructor, which can wait for a thread that waits for the GIL
