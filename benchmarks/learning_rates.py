"""Learning-rate multipliers of the methods: short runs on real text, at LoRA's parameters and FLOPs.

    python benchmarks/learning_rates.py CHECKPOINT [--steps 60] [--seeds 0] [--methods pt1 pt2 ...]

Each run multiplies the learning rate of one method, or of one group of its parameters, and reports the loss on held-out
verses. One row a run is added to benchmarks/results/learning_rates.csv; runs that stand there are not run again, unless
--again says so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
import transformers
from archaic_modern import read_verses, split_verses, tokenize
from demo import METHODS, Settings, load_base
from peft import get_peft_model
from results_table import ResultsTable, add_output, read
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from bem_peft import PTTrainer, PTTrainingConfig, match_budget

COLUMNS = ("method", "variant_multiplier", "group_multipliers", "seed", "steps", "learning_rate", "loss")
RUN = COLUMNS[:5]  # what tells a run
BASE = 8e-3
# method -> (variant multiplier, group multipliers)
RUNS: dict[str, list[tuple[float, dict[str, float]]]] = {
    "lora": [(1.0, {})],
    "pt1": [(1.0, {}), (2.0, {}), (0.5, {}), (1.0, {"controller": 0.1})],
    "pt2": [(1.0, {}), (0.5, {}), (2.0, {}), (1.0, {"mask": 0.1})],
    "pt3": [(1.0, {}), (1.5, {}), (0.5, {}), (1.0, {"factors": 2.0})],
    "pt4": [(1.0, {}), (0.1, {}), (2.0, {}), (1.0, {"controller": 0.1})],
}


def run(name: str, variant: float, groups: dict[str, float], seed: int, options: Any, data: Any) -> float:
    """The loss on held-out verses after training."""
    train, held_out, tokenizer = data
    base = load_base(options.checkpoint)
    match = match_budget(base, METHODS[name].config(), METHODS["lora"].config(), free=METHODS[name].free)
    transformers.set_seed(seed)
    model = get_peft_model(base, match.config)
    rate = BASE * (variant if name == "lora" else 1.0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = PTTrainingConfig(
            folder, max_steps=options.steps, per_device_train_batch_size=8, learning_rate=rate, warmup_steps=5,
            lr_scheduler_type="cosine", save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False, seed=seed, per_device_eval_batch_size=16, logging_steps=options.steps,
            variant_lr_multipliers={name.upper(): variant} if name != "lora" else {}, group_lr_multipliers=groups,
        )  # fmt: skip
        trainer = PTTrainer(
            model, arguments, train_dataset=train, eval_dataset=held_out,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )  # fmt: skip
        trainer.train()
        return float(trainer.evaluate()["eval_loss"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--again", action="store_true", help="also what stands in the table")
    add_output(parser)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    table = ResultsTable(options.out, "learning_rates.csv", COLUMNS, depends_on=("examples",))
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    training, held_out = split_verses(read_verses())
    data = (
        tokenize(training, tokenizer),
        tokenize(held_out[: Settings.from_environment().eval_verses], tokenizer),
        tokenizer,
    )
    done = set()
    if table.path is not None and table.path.is_file() and not options.again:
        done = {tuple(row[name] for name in RUN) for row in read(table.path)}
    for seed in options.seeds:
        for i in range(max(len(runs) for runs in RUNS.values())):
            for name in options.methods:
                if i >= len(RUNS[name]):
                    continue
                variant, groups = RUNS[name][i]
                key = (
                    name,
                    str(variant),
                    " ".join(f"{k}={v}" for k, v in groups.items()),
                    str(seed),
                    str(options.steps),
                )
                if key in done:
                    continue
                loss = run(name, variant, groups, seed, options, data)
                table.append([{**dict(zip(RUN, key, strict=True)), "learning_rate": BASE, "loss": f"{loss:.4f}"}])
                print(*key, f"{loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
