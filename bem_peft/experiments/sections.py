"""The sections of an experiment, as its YAML file has them, and the experiment that they make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelSection:
    path: str
    dtype: str = "auto"
    revision: str | None = None
    attn_implementation: str | None = None


@dataclass
class DataSection:
    """`train` and `eval`: a file (jsonl, json, csv, tsv, also .gz; parquet, arrow) or a dataset's hub id.

    Templates name columns by whatever name they have, {question} or {Question Text}; {{ and }} are braces, as in
    '{{"answer": {answer}}}'. An item is `prompt` and `completion`; or, with `messages`, a conversation whose last
    answer is the completion.
    """

    train: str
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None  # column of conversations: lists of {"role": ..., "content": ...}
    chat: bool = False  # prompt and completion are a question and its answer in the model's chat template
    eval: str | None = None
    eval_share: float | None = None
    group: str | None = None  # template of what belongs together: is not split by eval_share, and is a cluster
    group_pattern: str | None = None  # regular expression; its first group is taken from `group`
    id: str | None = None  # template of an item's name; default its number
    max_tokens: int = 512
    too_long: str = "error"  # an item of more tokens is an error, or "drop": left out, and counted
    eval_items: int | None = None


@dataclass
class BudgetSection:
    anchor: dict[str, Any] | str
    # fields of the adapter that are chosen to meet the anchor; or field -> the values to choose from (null: any); null:
    # the method's own sizes
    match: list[str] | dict[str, Any] | None = field(default_factory=list)
    quantities: list[str] = field(default_factory=lambda: ["params", "flops"])
    tolerance_ratio: float = 0.05
    policy: str = "raise"


@dataclass
class EvaluationSection:
    """What is measured on the evaluation items. Metrics but the loss ("nll") are of greedily generated text. `retain`:
    a file of text that was not trained on (.txt, or records with the template `retain_text`), for what was
    forgotten."""

    metrics: list[str] = field(default_factory=lambda: ["nll"])
    max_new_tokens: int = 128
    stop: str | None = None  # text that ends an answer, and is no part of it
    retain: str | None = None
    retain_text: str = "{text}"


@dataclass
class Experiment:
    """A checked experiment. `document` is what the file said, with `--set` in it."""

    name: str
    model: ModelSection
    adapter: PeftConfig
    data: DataSection
    evaluation: EvaluationSection
    training: dict[str, Any]
    budget: BudgetSection | None
    anchor: PeftConfig | None
    seeds: list[int]
    output_dir: str
    document: dict[str, Any]
