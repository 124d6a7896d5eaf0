"""A model's scores on the items of an evaluation: the loss of each completion, and metrics of generated text.

items.jsonl: {"id", "group", "sha256", "nll", "tokens"} a line, and where text was generated {"reference",
"prediction", "scores": {metric: value, or the counts of a corpus metric}}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from bem_peft.evaluation.corpus import corpus_score
from bem_peft.evaluation.metrics import CORPUS, LOSS, corpus_metric, text_scores
from bem_peft.experiments.generation import generate_texts
from bem_peft.experiments.items import Item, Progress, encode, score_items
from bem_peft.experiments.sections import EvaluationSection
from bem_peft.whole_file import write_whole


@dataclass
class ItemScores:
    """nll: (sum in nats, tokens) of each item. predictions: where text was generated. scores: as `text_scores`."""

    nll: list[tuple[float, int]]
    predictions: list[str] | None = None
    scores: dict[str, np.ndarray] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Loss in nats a token; every other metric over all items."""
        tokens = sum(count for _, count in self.nll)
        found = {"loss": sum(value for value, _ in self.nll) / max(1, tokens), "items": len(self.nll), "tokens": tokens}
        for name, values in self.scores.items():
            found[name] = corpus_score(corpus_metric(name), values) if name in CORPUS else float(values.mean())
        return found

    def write(self, path: Path, items: Sequence[Item]) -> None:
        lines = []
        for i, (item, (value, count)) in enumerate(zip(items, self.nll, strict=True)):
            line: dict[str, Any] = {
                "id": item.id, "group": item.group, "sha256": item.sha256, "nll": value, "tokens": count
            }  # fmt: skip
            if self.predictions is not None:
                scores = {name: values[i].tolist() for name, values in self.scores.items()}
                line |= {"reference": item.completion, "prediction": self.predictions[i], "scores": scores}
            lines.append(json.dumps(line, ensure_ascii=False))
        write_whole(path, "\n".join(lines) + "\n")


def score_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], *, max_tokens: int,
    evaluation: EvaluationSection, batch: int, label: str, is_quiet: bool = False,
) -> ItemScores:  # fmt: skip
    """All scores that `evaluation` asks for, with progress bars named `label`."""

    def progress(what: str) -> Progress:
        return lambda steps: tqdm(steps, desc=f"{what} {label}", disable=is_quiet)

    is_seq2seq = bool(model.config.is_encoder_decoder)
    encoded = [encode(item, tokenizer, max_tokens, is_seq2seq) for item in items]
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    found = ItemScores(score_items(model, encoded, collator, batch, progress("loss of")))
    names = [name for name in evaluation.metrics if name != LOSS]
    if names:
        found.predictions = generate_texts(
            model, tokenizer, [item.prompt for item in items], max_new_tokens=evaluation.max_new_tokens,
            stop=evaluation.stop, batch=batch, progress=progress("generating with"), max_prompt_tokens=max_tokens,
        )  # fmt: skip
        found.scores = text_scores(names, found.predictions, [item.completion for item in items])
    return found
