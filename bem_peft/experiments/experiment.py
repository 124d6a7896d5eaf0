"""An experiment as a YAML file: read, and checked whole before anything is loaded.

    name: pt3-kronecker
    model:    {path: HuggingFaceTB/SmolLM2-135M-Instruct, dtype: bfloat16}
    adapter:  {method: kronecker, u_rank: 8, v_rank: 8}
    budget:   {anchor: {method: lora, r: 8}, match: [u_rank, v_rank]}
    data:     {train: verses.jsonl, prompt: "Archaic: {archaic}", completion: " {modern}", eval_share: 0.05}
    evaluation: {metrics: [nll, chrf], max_new_tokens: 96}
    training: {max_steps: 300, learning_rate: 8e-3}
    seeds: [0, 1, 2]
    output_dir: runs/pt3

`adapter` and `budget.anchor` take any method that PEFT knows and its config's fields; `training` takes the fields of
`PTTrainingConfig`. Every unknown key, wrong type and impossible combination is reported at once.
"""

from __future__ import annotations

import copy
import csv
import gzip
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig

from bem_peft.budget.check import QUANTITIES
from bem_peft.budget.enforce import POLICIES
from bem_peft.evaluation.metrics import metric_problem
from bem_peft.experiments.fields import Problems, build_config, fill, fits
from bem_peft.tuners.base import registry

DTYPES = ("auto", "float32", "bfloat16", "float16")
# set for each seed, or from another section
RESERVED_TRAINING = ("output_dir", "seed", "data_seed", "budget_anchor", "budget_policy", "budget_tolerance_ratio")


class ExperimentError(ValueError):
    """All that is wrong with an experiment."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        super().__init__(f"{source}: {len(problems)} problem(s)\n" + "\n".join(f"  {p}" for p in problems))
        self.problems = list(problems)


@dataclass
class ModelSection:
    path: str
    dtype: str = "auto"
    revision: str | None = None
    attn_implementation: str | None = None


@dataclass
class DataSection:
    """`train` and `eval`: a file (jsonl, json, csv, parquet; .gz) or a dataset's hub id. Templates name columns."""

    train: str
    prompt: str
    completion: str
    eval: str | None = None
    eval_share: float | None = None
    group: str | None = None  # template of what must not be split between training and evaluation
    group_pattern: str | None = None  # regular expression; its first group is taken from `group`
    id: str | None = None  # template of an item's name; default its number
    max_tokens: int = 512
    eval_items: int | None = None


@dataclass
class BudgetSection:
    anchor: dict[str, Any]
    # fields of the adapter that are chosen to meet the anchor; or field -> the values to choose from (null: any)
    match: list[str] | dict[str, Any] = field(default_factory=list)
    quantities: list[str] = field(default_factory=lambda: ["params", "flops"])
    tolerance_ratio: float = 0.05
    policy: str = "raise"


@dataclass
class EvaluationSection:
    """What is measured on the evaluation items. Metrics but the loss ("nll") are of greedily generated text."""

    metrics: list[str] = field(default_factory=lambda: ["nll"])
    max_new_tokens: int = 128
    stop: str | None = None  # text that ends an answer, and is no part of it


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


@dataclass
class _Document:
    name: str
    model: dict[str, Any]
    adapter: dict[str, Any]
    data: dict[str, Any]
    output_dir: str
    evaluation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] | None = None
    seeds: list[int] = field(default_factory=lambda: [0])


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that stands twice and reads 1e-3 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """The document of `text`. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def read_experiment(path: str | Path, changes: Sequence[str] = ()) -> Experiment:
    """The experiment of a file, with `changes` ("training.max_steps=10") made to it.

    Raises:
        ExperimentError: with everything that is wrong.
        OSError: the file cannot be read.
    """
    problems = Problems()
    document = changed_document(Path(path).read_text(encoding="utf-8"), changes, problems)
    experiment = None
    if isinstance(document, dict):
        experiment = check_experiment(document, problems)
    if problems or experiment is None:
        raise ExperimentError(str(path), problems)
    return experiment


def changed_document(text: str, changes: Sequence[str], problems: Problems) -> Any:
    """The mapping that the YAML `text` holds, with the "key=value" of `changes`; None with `problems` filled."""
    try:
        document = parse_yaml(text)
    except yaml.YAMLError as error:
        problems.append(f"no YAML: {error}")
        return None
    if not isinstance(document, dict):
        problems.append("must be a mapping with the keys name, model, adapter, data, output_dir, ...")
        return None
    for change in changes:
        _change(document, change, problems)
    return document


def _change(document: dict[str, Any], change: str, problems: Problems) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        problems.append(f"--set {change}: write key=value, with dots between the levels of the key")
        return
    *parents, last = key.split(".")
    place: Any = document
    for name in parents:
        place = place.setdefault(name, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        problems.append(f"--set {change}: {'.'.join(parents)} is no mapping")
        return
    try:
        place[last] = parse_yaml(text)
    except yaml.YAMLError:
        problems.append(f"--set {change}: the value is no YAML")


def check_experiment(document: Mapping[str, Any], problems: Problems) -> Experiment | None:
    """The experiment that `document` describes, or None with `problems` filled."""
    whole = fill(_Document, document, "", problems)
    sections = {name: document.get(name) for name in ("model", "adapter", "data", "evaluation", "training", "budget")}
    given = {name: value for name, value in sections.items() if isinstance(value, dict)}
    model = fill(ModelSection, given["model"], "model", problems) if "model" in given else None
    data = fill(DataSection, given["data"], "data", problems) if "data" in given else None
    budget = fill(BudgetSection, given["budget"], "budget", problems) if "budget" in given else None
    evaluation = fill(EvaluationSection, given.get("evaluation", {}), "evaluation", problems)
    adapter = adapter_config(given["adapter"], "adapter", problems) if "adapter" in given else None
    anchor = None
    if budget is not None and isinstance(budget.anchor, dict):
        anchor = adapter_config(budget.anchor, "budget.anchor", problems)
    training = dict(given.get("training", {}))
    _check_training(training, problems)
    if model is not None and model.dtype not in DTYPES:
        problems.append(f"model.dtype = {model.dtype!r}: must be one of {', '.join(DTYPES)}")
    if data is not None:
        _check_data(data, problems)
    if evaluation is not None:
        check_evaluation(evaluation, "evaluation.", problems)
    if budget is not None:
        _check_budget(budget, adapter, problems)
    seeds = document.get("seeds", [0])
    if fits(seeds, list[int]) and (not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0):
        problems.append(f"seeds = {seeds}: must be different whole numbers of at least 0, one or more")
    if problems or whole is None or model is None or data is None or adapter is None or evaluation is None:
        return None
    return Experiment(
        whole.name, model, adapter, data, evaluation, training, budget, anchor, seeds, whole.output_dir,
        copy.deepcopy(dict(document)),
    )  # fmt: skip


def adapter_config(section: Mapping[str, Any], where: str, problems: Problems) -> PeftConfig | None:
    """The PEFT config of {method: kronecker, u_rank: 8, ...}; a composite's `methods` are such mappings too."""
    known = registry.config_classes()
    fields = dict(section)
    method = fields.pop("method", None)
    cls = known.get(str(method).lower()) or known.get(f"bem_{str(method).lower()}")
    if cls is None:
        names = ", ".join(sorted(name.removeprefix("bem_") for name in known))
        problems.append(f"{where}.method = {method!r}: must be one of {names}")
        return None
    if "methods" in fields and isinstance(fields["methods"], list):
        parts = [
            adapter_config(part, f"{where}.methods[{i}]", problems) if isinstance(part, dict) else part
            for i, part in enumerate(fields["methods"])
        ]
        if any(part is None for part in parts):
            return None
        fields["methods"] = parts
    config = build_config(cls, fields, where, problems)
    return config if isinstance(config, PeftConfig) else None


def _check_training(training: dict[str, Any], problems: Problems) -> None:
    from bem_peft.training.trainer import PTTrainingConfig

    for name in RESERVED_TRAINING:
        if name in training:
            other = "budget" if name.startswith("budget") else "seeds" if "seed" in name else "output_dir"
            problems.append(f"training.{name}: is set by `{other}`; remove it")
            del training[name]
    build_config(PTTrainingConfig, training, "training", problems)


def _check_data(data: DataSection, problems: Problems) -> None:
    for name in ("prompt", "completion", "group", "id"):
        template = getattr(data, name)
        if template is not None and not re.search(r"\{\w+\}", template):
            problems.append(f"data.{name} = {template!r}: must name a column, as {{text}}")
    if (data.eval is None) == (data.eval_share is None):
        problems.append("data.eval, data.eval_share: give one of them")
    if data.eval_share is not None and not 0.0 < data.eval_share < 1.0:
        problems.append(f"data.eval_share = {data.eval_share}: must lie between 0 and 1")
    if data.group is not None and data.eval is not None:
        problems.append("data.group: splits by `eval_share`, and `eval` is given")
    for name in ("max_tokens", "eval_items"):
        value = getattr(data, name)
        if value is not None and value < 1:
            problems.append(f"data.{name} = {value}: must be at least 1")
    if data.group_pattern is not None:
        if data.group is None:
            problems.append("data.group_pattern: needs `group`")
        try:
            if re.compile(data.group_pattern).groups < 1:
                problems.append(f"data.group_pattern = {data.group_pattern!r}: must have a group, as ^(.+):")
        except re.error as error:
            problems.append(f"data.group_pattern = {data.group_pattern!r}: {error}")
    for name in ("train", "eval"):
        path = getattr(data, name)
        if path is not None and is_file_name(path) and not Path(path).is_file():
            problems.append(f"data.{name} = {path!r}: there is no such file, seen from {Path.cwd()}")
        elif path is not None and is_file_name(path):
            _check_columns(data, name, Path(path), problems)


def _check_columns(data: DataSection, part: str, path: Path, problems: Problems) -> None:
    try:
        columns = columns_of(path)
    except (ValueError, OSError, EOFError) as error:
        problems.append(f"data.{part} = {str(path)!r}: cannot be read ({error})")
        return
    for name in ("prompt", "completion", "group", "id"):
        template = getattr(data, name)
        missing = sorted(set(re.findall(r"\{(\w+)\}", template or "")) - columns)
        if columns and missing:
            problems.append(f"data.{name} = {template!r}: {path} has no column {missing}; it has {sorted(columns)}")


def columns_of(path: Path) -> set[str]:
    """The columns of a file's first 1,000 records; empty for a .json file, which would have to be read whole.

    Raises:
        ValueError, OSError, EOFError: the file is not what its name says.
    """
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        from pyarrow import parquet  # type: ignore[import-untyped]

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


def check_evaluation(evaluation: EvaluationSection, where: str, problems: list[str]) -> None:
    """Append what is wrong with the metrics and the generation to `problems`; `where` stands before a field's name."""
    for name in evaluation.metrics:
        problem = metric_problem(name)
        if problem is not None:
            problems.append(f"{where}metrics: {name!r} {problem}")
    if len(set(evaluation.metrics)) != len(evaluation.metrics):
        problems.append(f"{where}metrics = {evaluation.metrics}: one stands twice")
    if evaluation.max_new_tokens < 1:
        problems.append(f"{where}max_new_tokens = {evaluation.max_new_tokens}: must be at least 1")
    if evaluation.stop == "":
        problems.append(f"{where}stop = '': must be some text, or null for none")


def _check_budget(budget: BudgetSection, adapter: PeftConfig | None, problems: Problems) -> None:
    unknown = sorted(set(budget.quantities) - set(QUANTITIES))
    if unknown or not budget.quantities:
        problems.append(f"budget.quantities = {budget.quantities}: must be a choice of {', '.join(QUANTITIES)}")
    if budget.policy not in POLICIES:
        problems.append(f"budget.policy = {budget.policy!r}: must be one of {', '.join(POLICIES)}")
    if not 0.0 <= budget.tolerance_ratio <= 1.0:
        problems.append(f"budget.tolerance_ratio = {budget.tolerance_ratio}: must lie in [0, 1]; 0.05 is 5 %")
    if adapter is None:
        return
    sizes = getattr(adapter, "size_fields", ())
    for name in budget.match:
        if name not in sizes and not hasattr(adapter, name):
            problems.append(f"budget.match: {name!r} is no field of {type(adapter).__name__}")
    if isinstance(budget.match, dict):
        for name, values in budget.match.items():
            if values is not None and (not values or not fits(values, list[int])):
                problems.append(f"budget.match.{name} = {values!r}: must be a list of whole numbers, or null for any")


def is_file_name(text: str) -> bool:
    """Whether `text` names a file, not a dataset of the hub."""
    return re.search(r"\.(jsonl|json|csv|parquet)(\.gz)?$", text) is not None
