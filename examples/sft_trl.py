"""Fine-tune with TRL's SFTTrainer, all settings in a YAML file.

    python examples/sft_trl.py [examples/sft.yaml] [--set sft.max_steps=20]

The penalties of the adapter reach the gradient although SFTTrainer computes the loss itself, and stand in its logs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from archaic_modern import read_verses, split_verses
from datasets import Dataset
from smollm2 import default_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from bem_peft.experiments.experiment import adapter_config
from bem_peft.experiments.fields import Problems, build_config
from bem_peft.experiments.yaml_document import changed_document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=Path(__file__).with_name("sft.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()

    problems = Problems()
    document = changed_document(options.file.read_text(), options.set, problems)
    adapter = adapter_config(document["adapter"], "adapter", problems)
    defaults = {"bf16": torch.cuda.is_available(), "dataloader_pin_memory": torch.cuda.is_available()}
    arguments = build_config(SFTConfig, {**defaults, **document["sft"]}, "sft", problems)
    if problems:
        raise SystemExit("\n".join(problems))

    set_seed(0)
    name = document["model"] or default_checkpoint()
    verses, _ = split_verses(read_verses())
    data = Dataset.from_list([{"prompt": verse.prompt, "completion": f" {verse.modern}"} for verse in verses[:2000]])
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16),
        args=arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(name),
        peft_config=adapter,
    )
    trainer.train()
    trainer.save_model(str(Path(arguments.output_dir) / "adapter"))
    logged = [log for log in trainer.state.log_history if "penalty/total" in log]
    print(f"adapter: {arguments.output_dir}/adapter; loss {logged[-1]['loss']:.3f}", end="")
    print("".join(f", {key} {value:.4f}" for key, value in logged[-1].items() if key.startswith("penalty/")))


if __name__ == "__main__":
    main()
