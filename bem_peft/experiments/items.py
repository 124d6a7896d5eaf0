"""Items of an experiment: prompts and completions from a file or a dataset, split, tokenised, and scored one by one.

The loss is on the completion alone. A split by `eval_share` depends on each item's group alone, so that it is the same
for every seed and every adapter.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from bem_peft.experiments.sections import DataSection

IGNORED = -100
Encoded = dict[str, list[int]]
Collator = Callable[[list[Encoded]], Mapping[str, torch.Tensor]]
Progress = Callable[[range], Iterable[int]]  # wraps the batches while they are run, as tqdm does


@dataclass(frozen=True)
class Item:
    """One prompt and its completion. `id` names it among all items of the experiment."""

    id: str
    prompt: str
    completion: str
    group: str

    @property
    def sha256(self) -> str:
        """Of the content: items that are the same have the same."""
        return hashlib.sha256(f"{self.prompt}\0{self.completion}".encode()).hexdigest()


def read_items(data: DataSection) -> tuple[list[Item], list[Item]]:
    """(training, evaluation).

    Raises:
        ValueError: a template names a column that is not there, an id stands twice, or a part is empty.
        FileNotFoundError: from the reader of the file.
    """
    training = read_items_of(data, data.train)
    if data.eval is not None:
        evaluation = read_items_of(data, data.eval)
    else:
        share = data.eval_share or 0.0
        evaluation = [item for item in training if _unit(item.group) < share]
        training = [item for item in training if _unit(item.group) >= share]
    for name, items in (("training", training), ("evaluation", evaluation)):
        if not items:
            raise ValueError(f"no {name} item is left of {data.train!r}: change `eval_share` or `group`.")
    evaluation.sort(key=lambda item: _unit(item.id))
    return training, evaluation[: data.eval_items]


def read_items_of(data: DataSection, source: str) -> list[Item]:
    """All items of one file or dataset, in its order. Raises as `read_items`."""
    from datasets import load_dataset

    if is_file_name(source):
        kind = re.sub(r"\.gz$", "", source).rpartition(".")[2]
        rows = load_dataset("json" if kind in ("json", "jsonl") else kind, data_files=str(Path(source)), split="train")
    else:
        rows = load_dataset(source, split="train")
    columns = set(rows.column_names)
    for name in ("prompt", "completion", "group", "id"):
        template = getattr(data, name)
        missing = sorted(set(re.findall(r"\{(\w+)\}", template or "")) - columns)
        if missing:
            raise ValueError(f"data.{name} = {template!r}: {source} has no column {missing}; it has {sorted(columns)}.")
    items = []
    for number, row in enumerate(rows):
        name = str(number) if data.id is None else _fill(data.id, row)
        group = name if data.group is None else _fill(data.group, row)
        if data.group_pattern is not None:
            match = re.search(data.group_pattern, group)
            if match is None:
                raise ValueError(f"data.group_pattern = {data.group_pattern!r} does not match {group!r} (item {name}).")
            group = match.group(1)
        items.append(Item(name, _fill(data.prompt, row), _fill(data.completion, row), group))
    names = [item.id for item in items]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"data.id = {data.id!r}: {twice!r} stands twice in {source}; an id must name one item.")
    return items


def columns_of(path: Path) -> set[str]:
    """The columns of a file's first 1,000 records; empty for a .json file, which would have to be read whole.

    Raises:
        ValueError, OSError, EOFError: the file is not what its name says.
    """
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        from pyarrow import parquet

        return set(parquet.read_schema(path).names)
    if kind == "json":
        return set()
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        if kind == "csv":
            return set(next(csv.reader(file), []))
        records = [json.loads(line) for line in itertools.islice(file, 1000) if line.strip()]
    if not all(isinstance(record, dict) for record in records):
        raise ValueError("a line is no JSON object")
    return set().union(*records)


def is_file_name(text: str) -> bool:
    """Whether `text` names a file, not a dataset of the hub."""
    return re.search(r"\.(jsonl|json|csv|parquet)(\.gz)?$", text) is not None


def _fill(template: str, row: Mapping[str, Any]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: str(row[match.group(1)]), template)


def _unit(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def encode(item: Item, tokenizer: PreTrainedTokenizerBase, max_tokens: int, is_seq2seq: bool) -> Encoded:
    """input_ids, attention_mask, labels; labels are -100 on a causal model's prompt."""
    prompt = list(tokenizer(item.prompt)["input_ids"])
    if is_seq2seq:
        labels = list(tokenizer(text_target=item.completion)["input_ids"])[:max_tokens]
        prompt = prompt[:max_tokens]
        return {"input_ids": prompt, "attention_mask": [1] * len(prompt), "labels": labels}
    answer = [*tokenizer(item.completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = (prompt + answer)[:max_tokens]
    labels = ([IGNORED] * len(prompt) + answer)[:max_tokens]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


@torch.no_grad()
def score_items(
    model: nn.Module, encoded: Sequence[Encoded], collator: Collator, batch: int, progress: Progress
) -> list[tuple[float, int]]:
    """(negative log likelihood in nats, summed over the completion's tokens; number of tokens) of each item."""
    model.eval()
    device = next(model.parameters()).device
    is_seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    scores: list[tuple[float, int]] = []
    for start in progress(range(0, len(encoded), batch)):
        inputs = {k: v.to(device) for k, v in collator(list(encoded[start : start + batch])).items()}
        labels = inputs["labels"] if is_seq2seq else inputs.pop("labels")
        logits = model(**inputs).logits
        if not is_seq2seq:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(labels.shape)
        counts = (labels != IGNORED).sum(1)
        scores += list(zip(losses.sum(1).tolist(), counts.tolist(), strict=True))
    return scores
