"""What a model has forgotten: the loss on plain text that was not trained on, with the adapter and without it.

    forgetting = mean over texts of (nll - base_nll) / tokens,  nats a token; above 0 the adapter is worse at the text

A text longer than `max_tokens` is scored in windows of so many; the first token of a window has no context and no loss.
retain.jsonl: {"id", "group", "sha256", "nll", "tokens", "base_nll"} a line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from bem_peft.experiments.encoding import prompt_tokens
from bem_peft.experiments.items import Encoded, Item, score_items
from bem_peft.experiments.records import Template, read_records
from bem_peft.experiments.sections import EvaluationSection
from bem_peft.json_text import text_of
from bem_peft.whole_file import write_whole


def read_texts(evaluation: EvaluationSection) -> list[Item]:
    """The texts of `evaluation.retain`: the paragraphs of a .txt file, or a record each of any other.

    Raises:
        ValueError: there is none, or what `read_records` raises.
    """
    source = str(evaluation.retain)
    if source.endswith(".txt"):
        found = [part.strip() for part in re.split(r"\n\s*\n", text_of(Path(source)))]
        texts = [(f"{source}: paragraph {i}", text) for i, text in enumerate(found, 1)]
    else:
        template = Template(evaluation.retain_text, "evaluation.retain_text")
        texts = [(where, template.fill(where, record)) for where, record in read_records(source)]
    items = [Item(str(i), "", text, str(i)) for i, (_, text) in enumerate(texts) if text.strip()]
    if not items:
        raise ValueError(f"evaluation.retain = {source!r}: holds no text.")
    return items


@dataclass(frozen=True)
class RetainedTexts:
    """`rows`: windows of tokens; `owners`: the text that each belongs to."""

    texts: list[Item]
    rows: list[Encoded]
    owners: list[int]


def encode_texts(
    texts: Sequence[Item], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, is_seq2seq: bool
) -> RetainedTexts:
    """The texts of at least two tokens, in windows.

    Raises:
        ValueError: an encoder-decoder, which has no loss of a plain text, or no text of two tokens.
    """
    if is_seq2seq:
        raise ValueError("evaluation.retain: an encoder-decoder has no loss of a plain text; leave `retain` out.")
    rows: list[Encoded] = []
    owners: list[int] = []
    for i, text in enumerate(texts):
        ids = prompt_tokens(text.completion, tokenizer)
        for start in range(0, len(ids), max_tokens):
            window = ids[start : start + max_tokens]
            if len(window) > 1:
                rows.append({"input_ids": window, "attention_mask": [1] * len(window), "labels": list(window)})
                owners.append(i)
    if not rows:
        raise ValueError("evaluation.retain: no text has two tokens.")
    return RetainedTexts(list(texts), rows, owners)


def score_texts(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, retained: RetainedTexts, *, batch: int
) -> list[dict[str, Any]]:
    """A line a text, as retain.jsonl has it."""
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    mine = score_items(model, retained.rows, collator, batch, list)
    base = mine
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            base = score_items(model, retained.rows, collator, batch, list)
    lines: dict[int, dict[str, Any]] = {}
    for owner, (nll, _), (base_nll, _), row in zip(retained.owners, mine, base, retained.rows, strict=True):
        text = retained.texts[owner]
        line = lines.setdefault(
            owner,
            {"id": text.id, "group": text.group, "sha256": text.sha256, "nll": 0.0, "tokens": 0, "base_nll": 0.0},
        )
        line["nll"] += nll
        line["base_nll"] += base_nll
        line["tokens"] += len(row["input_ids"]) - 1
    return list(lines.values())


def write_texts(path: Path, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Write retain.jsonl; returns the metrics of it."""
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    own = sum(line["nll"] / line["tokens"] for line in lines) / len(lines)
    base = sum(line["base_nll"] / line["tokens"] for line in lines) / len(lines)
    return {"forgetting": own - base, "retain_nll": own, "base_retain_nll": base}
