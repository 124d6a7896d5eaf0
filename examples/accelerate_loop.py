"""A training loop of one's own with accelerate: groups, budget, penalties, caps, checkpoints; one process or many.

accelerate launch examples/accelerate_loop.py [--steps 40]
accelerate launch --config_file examples/distributed/ddp.yaml examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from archaic_modern import read_verses, split_verses, tokenize
from peft import LoraConfig, get_peft_model
from smollm2 import default_checkpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_cosine_schedule_with_warmup

from bem_peft import (
    BudgetConstraints,
    DynamicRankMaskConfig,
    LearningRates,
    check_budget,
    parameter_groups,
    penalty_values,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct from its PyPI package")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps, of two micro-batches each")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate"))
    options = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    with accelerator.main_process_first():  # the others find what it has prepared
        name = options.model or default_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    anchor = LoraConfig(r=8, target_modules=["o_proj", "down_proj"])
    budget = BudgetConstraints.from_anchor(base, anchor)
    config = DynamicRankMaskConfig(
        task_type="CAUSAL_LM", total_rank=8, active_rank=4, balance_strength=0.05, max_singular_value=5.0
    )
    model = get_peft_model(base, config)
    check_budget(accelerator, model, budget)

    verses, _ = split_verses(read_verses())
    loader = DataLoader(
        tokenize(verses, tokenizer), batch_size=options.batch, shuffle=True,
        collate_fn=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parameter_groups(model, LearningRates(8e-3, group_lr_multipliers={"mask": 0.5})))
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, options.steps * accelerator.num_processes)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    step = 0
    while step < options.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)  # the penalties come with it
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                if step % max(1, options.steps // 4) == 0:
                    values = penalty_values(accelerator.unwrap_model(model))
                    texts = [f"{name} {value:.5f}" for name, value in values.items()]
                    accelerator.print(f"step {step}: loss {loss.item():.3f},", ", ".join(texts))
                if step == options.steps:
                    break
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        options.output / "adapter",
        is_main_process=accelerator.is_main_process,
        state_dict=accelerator.get_state_dict(model),
    )
    accelerator.print(f"adapter: {options.output}/adapter")
    accelerator.end_training()


if __name__ == "__main__":
    main()
