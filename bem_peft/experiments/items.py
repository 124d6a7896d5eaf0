"""Items of an experiment: prompts and completions from a file or a dataset, split, tokenised, and scored one by one.

The loss is on the completion alone. A split by `eval_share` depends on each item's group alone, so that it is the same
for every seed and every adapter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bem_peft.experiments.records import Template, columns_of, read_records
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
        ValueError: a template names a column that is not there or that a record has no value of, an id stands twice,
        or a
            part is empty; or what `read_records` raises.
        OSError: the file cannot be read.
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
    return training, selected(evaluation, data.eval_items)


def selected(items: Sequence[Item], count: int | None) -> list[Item]:
    """`count` of the items (None: all), the same ones by whatever road and in whatever order they come."""
    return sorted(items, key=lambda item: (_unit(item.id), item.id))[:count]


def read_items_of(data: DataSection, source: str) -> list[Item]:
    """All items of one file or dataset, in its order. Raises as `read_items`."""
    prompt, completion = Template(data.prompt, "data.prompt"), Template(data.completion, "data.completion")
    name, group = (
        None if text is None else Template(text, f"data.{field}")
        for field, text in (("id", data.id), ("group", data.group))
    )
    templates = [template for template in (prompt, completion, name, group) if template is not None]
    items: list[Item] = []
    seen: dict[str, str] = {}
    for number, (where, record) in enumerate(read_records(source)):
        if number == 0:
            for template in templates:
                _check_columns(template, record, source)
        own = str(number) if name is None else name.fill(where, record)
        if own in seen:
            raise ValueError(
                f"{where}: data.id = {data.id!r}: {own!r} stands twice, first at {seen[own]}; an id names one item."
            )
        seen[own] = where
        together = own if group is None else group.fill(where, record)
        if data.group_pattern is not None:
            match = re.search(data.group_pattern, together)
            if match is None:
                raise ValueError(f"{where}: data.group_pattern = {data.group_pattern!r} does not match {together!r}.")
            together = match.group(1)
        items.append(Item(own, prompt.fill(where, record), completion.fill(where, record), together))
    return items


def _check_columns(template: Template, record: Mapping[str, Any], source: str) -> None:
    """A JSON record may lack a column that others have; then the record itself is named when it is filled."""
    missing = template.missing(record)
    if missing:
        columns = columns_of(source)
        missing = template.missing(columns)
        if missing:
            raise ValueError(
                f"{template.field} = {template.text!r}: {source} has no column {missing}; it has {columns}."
            )


def _unit(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


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
