"""Items of an experiment: prompts and completions from a file or a dataset, split, and scored one by one.

A prompt is a text, or the messages of a conversation up to the answer. The loss is on the completion alone. A split by
`eval_share` depends on each item's group alone, so that it is the same for every seed and every adapter.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bem_peft.experiments.records import Template, as_text, columns_of, missing_columns, read_records
from bem_peft.experiments.sections import DataSection

IGNORED = -100
Message = dict[str, Any]  # {"role": ..., "content": ...}, and what else the chat template reads
Prompt = str | tuple[Message, ...]
Encoded = dict[str, list[int]]
Collator = Callable[[list[Encoded]], Mapping[str, torch.Tensor]]
Progress = Callable[[range], Iterable[int]]  # wraps the batches while they are run, as tqdm does


@dataclass(frozen=True)
class Item:
    """One prompt and its completion. `id` names it among all items of the experiment."""

    id: str
    prompt: Prompt
    completion: str
    group: str

    @property
    def sha256(self) -> str:
        """Of the content: items that are the same have the same."""
        prompt = self.prompt
        if not isinstance(prompt, str):
            prompt = json.dumps(prompt, ensure_ascii=False, default=str)
        return hashlib.sha256(f"{prompt}\0{self.completion}".encode()).hexdigest()


def read_items(data: DataSection) -> tuple[list[Item], list[Item]]:
    """(training, evaluation).

    Raises:
        ValueError: a template names a column that is not there or that a record has no value of, an id stands twice,
        or a
            part is empty; or what `read_records` raises.
        OSError: the file cannot be read.
    """
    if data.eval is not None:  # `group` splits nothing then, and is of the evaluation items alone
        return read_items_of(replace(data, group=None, group_pattern=None), data.train), read_evaluation_items(data)
    training = read_items_of(data, data.train)
    share = data.eval_share or 0.0
    evaluation = [item for item in training if _unit(item.group) < share]
    training = [item for item in training if _unit(item.group) >= share]
    _check_share(share, len({item.group for item in training}), len({item.group for item in evaluation}))
    for name, items in (("training", training), ("evaluation", evaluation)):
        if not items:
            raise ValueError(f"no {name} item is left of {data.train!r}: change `eval_share` or `group`.")
    return training, selected(evaluation, data.eval_items)


def trained_on(training: Sequence[Item], evaluation: Sequence[Item]) -> list[Item]:
    """The evaluation items whose prompt and completion are trained on, with a warning where there are any."""
    seen = {item.sha256 for item in training}
    found = [item for item in evaluation if item.sha256 in seen]
    if found:
        some = ", ".join(repr(item.id) for item in found[:3]) + (", ..." if len(found) > 3 else "")
        warnings.warn(
            f"{len(found)} of {len(evaluation)} evaluation items are trained on, with the same prompt and completion, "
            f"as {some}: their scores are no test. Take them out of one of the two.",
            stacklevel=2,
        )
    return found


def _check_share(share: float, training: int, evaluation: int) -> None:
    """Warn where so many groups would come out as this by a chance of one in a million: the data were picked by a hash.

    A group is held out by the sha256 of its name, and who cut the data by the same hash before has cut the split.
    """
    groups = training + evaluation
    expected, spread = share * groups, (groups * share * (1.0 - share)) ** 0.5
    if groups and abs(evaluation - expected) > 5.0 * spread + 1.0:
        warnings.warn(
            f"data.eval_share = {share}: {evaluation} of {groups} groups are held out, expected were {expected:.0f}; "
            "they are chosen by the sha256 of their names, by which these data seem to have been selected before. Give "
            "`group` another text, {id} of another column for instance, or a file as `eval`.",
            stacklevel=3,
        )


def read_evaluation_items(data: DataSection) -> list[Item]:
    """The items that are scored. Raises as `read_items`."""
    return selected(read_items_of(data, data.eval), data.eval_items) if data.eval is not None else read_items(data)[1]


def selected(items: Sequence[Item], count: int | None) -> list[Item]:
    """`count` of the items (None: all), the same ones by whatever road and in whatever order they come."""
    return sorted(items, key=lambda item: (_unit(item.id), item.id))[:count]


def read_items_of(data: DataSection, source: str) -> list[Item]:
    """All items of one file or dataset, one or more, in its order. Raises as `read_items`."""
    templates = templates_of(data)
    name, group = templates.get("id"), templates.get("group")
    items: list[Item] = []
    seen: dict[str, str] = {}
    for number, (where, record) in enumerate(read_records(source)):
        if number == 0:
            for template in templates.values():
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
        items.append(Item(own, *_prompt_and_completion(data, templates, where, record), together))
    if not items:
        raise ValueError(f"{source}: holds no item.")
    return items


def templates_of(data: DataSection) -> dict[str, Template]:
    """Field of `data` -> its template. Raises ValueError for one that is none."""
    texts = {name: getattr(data, name) for name in ("prompt", "completion", "id", "group")}
    found = {name: Template(text, f"data.{name}") for name, text in texts.items() if text is not None}
    if data.messages is not None:
        found["messages"] = Template(f"{{{data.messages}}}", "data.messages")
    return found


def _prompt_and_completion(
    data: DataSection, templates: Mapping[str, Template], where: str, record: Mapping[str, Any]
) -> tuple[Prompt, str]:
    if data.messages is not None:
        if record.get(data.messages) is None:
            templates["messages"].fill(where, record)  # raises, and says whether it is null or missing
        messages = read_messages(record[data.messages], where, data.messages)
        return tuple(messages[:-1]), messages[-1]["content"]
    prompt, completion = (templates[name].fill(where, record) for name in ("prompt", "completion"))
    return ({"role": "user", "content": prompt},) if data.chat else prompt, completion


def read_messages(value: Any, where: str, name: str) -> list[Message]:
    """A conversation, as a list or as JSON of one. Raises ValueError where it is none, or ends in no answer."""
    rule = f'{where}: {name!r} must be a list of {{"role": ..., "content": ...}}'
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{rule}, or JSON of it, and is no JSON ({error}).") from None
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise ValueError(f"{rule}, not {value!r:.60}.")
    messages = [
        {key: part for key, part in message.items() if part is not None or key in ("role", "content")}
        for message in value
    ]
    for number, message in enumerate(messages, 1):
        for key in ("role", "content"):
            if type(message.get(key)) is not str:
                raise ValueError(f"{rule}, both texts; message {number} has {key} {message.get(key)!r:.60}.")
            as_text(message[key], where, name)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"{rule} that ends in an answer of the role 'assistant'; its roles are: {roles or 'none'}.")
    return messages


def _check_columns(template: Template, record: Mapping[str, Any], source: str) -> None:
    """A JSON record may lack a column that others have; then the record itself is named when it is filled."""
    missing = template.missing(record)
    if missing:
        columns = columns_of(source)
        missing = template.missing(columns)
        if missing:
            raise ValueError(f"{template.field} = {template.text!r}: {source} {missing_columns(missing, columns)}.")


def _unit(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


@torch.no_grad()
def score_items(
    model: nn.Module, encoded: Sequence[Encoded], collator: Collator, batch: int, progress: Progress
) -> list[tuple[float, int]]:
    """(negative log likelihood in nats, summed over the completion's tokens; number of tokens) of each item.

    Batches are of items of like length, so that little is padding; the order is that of `encoded`.
    """
    model.eval()
    device = next(model.parameters()).device
    is_seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]["input_ids"]), i))
    scores: dict[int, tuple[float, int]] = {}
    for start in progress(range(0, len(order), batch)):
        rows = order[start : start + batch]
        inputs = {k: v.to(device) for k, v in collator([encoded[i] for i in rows]).items()}
        labels = inputs["labels"] if is_seq2seq else inputs.pop("labels")
        logits = model(**inputs).logits
        if not is_seq2seq:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(labels.shape)
        counts = (labels != IGNORED).sum(1)
        scores |= zip(rows, zip(losses.sum(1).tolist(), counts.tolist(), strict=True), strict=True)
    return [scores[i] for i in range(len(encoded))]
