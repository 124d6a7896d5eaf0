"""A model's scores on the items of an evaluation: the loss of each completion, and metrics of generated text.

items.jsonl: {"id", "group", "sha256", "nll", "tokens"} a line, and where text was generated {"reference",
"prediction", "scores": {metric: value, or the counts of a corpus metric}}; {"id", "group", "sha256", "too_long": true}
of an item that was left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from bem_peft.evaluation.corpus import corpus_score
from bem_peft.evaluation.metrics import CORPUS, LOSS, corpus_metric, text_scores
from bem_peft.experiments.encoding import EncodedItems
from bem_peft.experiments.generation import generate_texts
from bem_peft.experiments.items import Item, score_items
from bem_peft.experiments.sections import EvaluationSection
from bem_peft.experiments.seed_folder import BLOCK, PartialScores
from bem_peft.whole_file import write_whole


@dataclass
class ItemScores:
    """nll: (sum in nats, tokens) of each item. predictions: where text was generated. scores: as `text_scores`.
    left_out: items that were too long."""

    items: Sequence[Item]
    nll: list[tuple[float, int]]
    predictions: list[str] | None = None
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: Sequence[Item] = ()

    def metrics(self) -> dict[str, float]:
        """Loss in nats a token; every other metric over all items."""
        tokens = sum(count for _, count in self.nll)
        found = {"loss": sum(value for value, _ in self.nll) / max(1, tokens), "items": len(self.nll), "tokens": tokens}
        for name, values in self.scores.items():
            found[name] = corpus_score(corpus_metric(name), values) if name in CORPUS else float(values.mean())
        return found

    def write(self, path: Path) -> None:
        lines = []
        for i, (item, (value, count)) in enumerate(zip(self.items, self.nll, strict=True)):
            line: dict[str, Any] = {**_about(item), "nll": value, "tokens": count}
            if self.predictions is not None:
                scores = {name: values[i].tolist() for name, values in self.scores.items()}
                line |= {"reference": item.completion, "prediction": self.predictions[i], "scores": scores}
            lines.append(json.dumps(line, ensure_ascii=False))
        lines += [json.dumps({**_about(item), "too_long": True}, ensure_ascii=False) for item in self.left_out]
        write_whole(path, "\n".join(lines) + "\n")


def _about(item: Item) -> dict[str, Any]:
    return {"id": item.id, "group": item.group, "sha256": item.sha256}


def score_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, fitting: EncodedItems, folder: Path, *,
    evaluation: EvaluationSection, batch: int, label: str, is_quiet: bool = False,
) -> ItemScores:  # fmt: skip
    """All scores that `evaluation` asks for, with a progress bar named `label`. They are written to `folder` as they
    are made; what a stopped evaluation left there is taken up. The caller removes it once it has written the whole."""
    names = [name for name in evaluation.metrics if name != LOSS]
    partial = PartialScores(folder)
    lines = partial.read()
    starts = range(len(lines), len(fitting.items), BLOCK)
    score_block = _block_scorer(model, tokenizer, fitting, evaluation if names else None, batch)
    for start in tqdm(starts, desc=f"scoring {label}", disable=is_quiet):
        block = score_block(start)
        partial.add(block)
        lines += block
    found = ItemScores(fitting.items, [(line["nll"], line["tokens"]) for line in lines], left_out=fitting.left_out)
    if names:
        found.predictions = [line["prediction"] for line in lines]
        found.scores = text_scores(names, found.predictions, [item.completion for item in fitting.items])
    return found


def _block_scorer(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, fitting: EncodedItems,
    evaluation: EvaluationSection | None, batch: int,
) -> Callable[[int], list[dict[str, Any]]]:  # fmt: skip
    """The function that scores the block of items from `start`; with `evaluation`, it generates answers too."""
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)

    def quietly(steps: range) -> Iterable[int]:
        return steps

    def block(start: int) -> list[dict[str, Any]]:
        items, encoded = fitting.items[start : start + BLOCK], fitting.encoded[start : start + BLOCK]
        losses = score_items(model, encoded, collator, batch, quietly)
        lines: list[dict[str, Any]] = [
            {"id": item.id, "nll": nll, "tokens": count} for item, (nll, count) in zip(items, losses, strict=True)
        ]
        if evaluation is not None:
            answers = generate_texts(
                model, tokenizer, [item.prompt for item in items], max_new_tokens=evaluation.max_new_tokens,
                stop=evaluation.stop, batch=batch, progress=quietly,
            )  # fmt: skip
            for line, answer in zip(lines, answers, strict=True):
                line["prediction"] = answer
        return lines

    return block
