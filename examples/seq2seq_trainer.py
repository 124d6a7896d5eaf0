"""Fine-tune an encoder-decoder model with residual FiLM and Seq2SeqTrainer, evaluated by generating (chrF).

python examples/seq2seq_trainer.py [--model google-t5/t5-small] [--steps 100]
python examples/seq2seq_trainer.py --random TOKENIZER_FOLDER      a small random T5, to see that everything runs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from archaic_modern import read_verses, split_verses
from datasets import Dataset
from peft import AutoPeftModelForSeq2SeqLM, get_peft_model
from sacrebleu.metrics import CHRF
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from bem_peft import ResidualFiLMConfig, emergency_stabilize


def base_model(options: argparse.Namespace) -> tuple[Any, Any, str]:
    """(model, tokenizer, where the model can be loaded from again)."""
    if options.random is None:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        return AutoModelForSeq2SeqLM.from_pretrained(options.model, dtype=torch.float32), tokenizer, options.model
    tokenizer = AutoTokenizer.from_pretrained(options.random)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        decoder_start_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    folder = options.output / "random_t5"
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return T5ForConditionalGeneration.from_pretrained(folder), tokenizer, str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google-t5/t5-small")
    parser.add_argument("--random", metavar="TOKENIZER_FOLDER")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--eval", type=int, default=32, help="verses to generate")
    parser.add_argument("--output", type=Path, default=Path("runs/seq2seq"))
    options = parser.parse_args()
    set_seed(0)
    model, tokenizer, name = base_model(options)
    train, held_out = split_verses(read_verses())

    def encode(verse: Any) -> dict[str, list[int]]:
        inputs = tokenizer(f"translate archaic to modern: {verse.archaic}", truncation=True, max_length=128)
        end = [] if options.random is None else [tokenizer.eos_token_id]
        labels = tokenizer(text_target=verse.modern, truncation=True, max_length=127)["input_ids"] + end
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}

    model = get_peft_model(model, ResidualFiLMConfig(task_type="SEQ_2_SEQ_LM", gamma_dim=4, beta_dim=8))
    model.print_trainable_parameters()

    def chrf(predictions: Any) -> dict[str, float]:
        ids = np.where(predictions.predictions < 0, tokenizer.pad_token_id, predictions.predictions)
        truth = np.where(predictions.label_ids < 0, tokenizer.pad_token_id, predictions.label_ids)
        answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return {"chrf": CHRF().corpus_score(answers, [tokenizer.batch_decode(truth, skip_special_tokens=True)]).score}

    arguments = Seq2SeqTrainingArguments(
        output_dir=str(options.output / "checkpoints"), max_steps=options.steps, learning_rate=5e-3,
        per_device_train_batch_size=options.batch, per_device_eval_batch_size=options.batch,
        predict_with_generate=True, generation_max_length=64, logging_steps=max(1, options.steps // 4),
        save_strategy="no", report_to="none", dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list([encode(v) for v in train[:4000]]),
        eval_dataset=Dataset.from_list([encode(v) for v in held_out[: options.eval]]),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model), compute_metrics=chrf,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    model.save_pretrained(options.output / "adapter")
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(options.output / "adapter")
    total = sum(emergency_stabilize(loaded).values())
    print(f"on {name}: loss {metrics['eval_loss']:.3f}, chrF {metrics['eval_chrf']:.1f}; emergencies {total}")
    print(f"adapter: {options.output}/adapter")


if __name__ == "__main__":
    main()
