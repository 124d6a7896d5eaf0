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
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from bem_peft.budget.check import QUANTITIES
from bem_peft.budget.enforce import POLICIES
from bem_peft.evaluation.metrics import metric_problem
from bem_peft.experiments.encoding import TOO_LONG
from bem_peft.experiments.fields import Problems, build_config, fill, fits, without_followers
from bem_peft.experiments.records import Template, columns_of, is_file_name, missing_columns
from bem_peft.experiments.sections import (
    DTYPES,
    BudgetSection,
    DataSection,
    EvaluationSection,
    Experiment,
    ModelSection,
)
from bem_peft.experiments.training_fields import check_training
from bem_peft.experiments.yaml_document import changed_document
from bem_peft.json_text import text_of
from bem_peft.tuners.adapter_spec import AdapterSpecError, config_class, parse_adapter, unknown_method


class ExperimentError(ValueError):
    """All that is wrong with an experiment."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        super().__init__(f"{source}: {len(problems)} problem(s)\n" + "\n".join(f"  {p}" for p in problems))
        self.problems = list(problems)


@dataclass
class _Document:
    name: str
    model: dict[str, Any]
    adapter: dict[str, Any]
    data: dict[str, Any]
    output_dir: str
    evaluation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] | str | None = None
    seeds: list[int] = field(default_factory=lambda: [0])


def read_experiment(path: str | Path, changes: Sequence[str] = ()) -> Experiment:
    """The experiment of a file, with `changes` ("training.max_steps=10") made to it.

    Raises:
        ExperimentError: with everything that is wrong.
        OSError: the file cannot be read.
    """
    problems = Problems()
    document = changed_document(text_of(Path(path)), changes, problems)
    experiment = None
    if isinstance(document, dict):
        experiment = check_experiment(document, problems)
    if problems or experiment is None:
        raise ExperimentError(str(path), problems)
    return experiment


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
    if isinstance(document.get("budget"), str):  # one dial: sizes and rate by an anchor
        budget = BudgetSection({}, match=None)
        anchor = _one_line(document["budget"], "budget", problems)
    elif budget is not None and isinstance(budget.anchor, str):
        anchor = _one_line(budget.anchor, "budget.anchor", problems)
    elif budget is not None and isinstance(budget.anchor, dict):
        anchor = adapter_config(budget.anchor, "budget.anchor", problems)
    training = dict(given.get("training", {}))
    check_training(training, adapter, problems)
    if model is not None and model.dtype not in DTYPES:
        problems.append(f"model.dtype = {model.dtype!r}: must be one of {', '.join(DTYPES)}")
    if model is not None and isinstance(model.path, str):
        _check_path(model.path, problems)
    if data is not None:
        found = Problems()
        _check_data(data, found)
        wrong = [name for name, value in given["data"].items() if getattr(data, name, value) is not value]
        problems += without_followers(found, wrong, "data")
    check_evaluation(evaluation, "evaluation.", problems)
    if budget is not None:
        _check_budget(budget, adapter, problems)
    seeds = document.get("seeds", [0])
    if fits(seeds, list[int]) and (not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0):
        problems.append(f"seeds = {seeds}: must be different whole numbers of at least 0, one or more")
    if problems or model is None or data is None or adapter is None:
        return None
    return Experiment(
        whole.name, model, adapter, data, evaluation, training, budget, anchor, seeds, whole.output_dir,
        copy.deepcopy(dict(document)),
    )  # fmt: skip


def _one_line(text: str, where: str, problems: Problems) -> PeftConfig | None:
    """The config of an adapter in one line, "lora:r=8"."""
    try:
        return parse_adapter(text)
    except AdapterSpecError as error:
        problems.append(f"{where}: {error}")
        return None


def adapter_config(section: Mapping[str, Any], where: str, problems: Problems) -> PeftConfig | None:
    """The PEFT config of {method: kronecker, u_rank: 8, ...}; a composite's `methods` are such mappings too."""
    fields = dict(section)
    method = fields.pop("method", None)
    cls = config_class(str(method))
    if cls is None:
        problems.append(f"{where}.method = {method!r}: is no method; {unknown_method(str(method))}")
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


def _check_path(path: str, problems: Problems) -> None:
    """A path that can be no hub id must be there."""
    is_local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if is_local and not os.path.isdir(path):  # which a name that is too long is not either
        home = "; ~ is not expanded" if path.startswith("~") else ""
        problems.append(f"model.path = {path!r}: there is no such folder, seen from {Path.cwd()}{home}")


def check_item_fields(data: DataSection, where: str, problems: list[str]) -> None:
    """Append what is wrong with the fields that items are made of; `where` stands before a field's name."""
    pair = f"{where}prompt, {where}completion"
    if data.messages is None and (data.prompt is None or data.completion is None):
        problems.append(f"{pair}: give both, or `messages`, a column of conversations")
    if data.messages is not None and (data.prompt is not None or data.completion is not None):
        problems.append(f"{where}messages = {data.messages!r}: stands in place of prompt and completion; remove those")
    if data.messages is not None and not re.fullmatch(r"[^{}]+", data.messages):
        problems.append(f"{where}messages = {data.messages!r}: must be the name of a column, without braces")
    if data.messages is not None and data.chat:
        problems.append(f"{where}chat: `messages` are a chat already; remove it")


def _check_data(data: DataSection, problems: Problems) -> None:
    check_item_fields(data, "data.", problems)
    for name in ("prompt", "completion", "group", "id"):
        text = getattr(data, name)
        if text is None:
            continue
        try:
            if not Template(text, f"data.{name}").columns:
                problems.append(f"data.{name} = {text!r}: must name a column, as {{text}}")
        except ValueError as error:
            problems.append(str(error))
    if (data.eval is None) == (data.eval_share is None):
        problems.append("data.eval, data.eval_share: give one of them")
    if data.eval_share is not None and not 0.0 < data.eval_share < 1.0:
        problems.append(f"data.eval_share = {data.eval_share}: must lie between 0 and 1")
    if data.too_long not in TOO_LONG:
        problems.append(f"data.too_long = {data.too_long!r}: must be one of {', '.join(TOO_LONG)}")
    check_counts(data, "data.", problems)
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


def check_counts(data: DataSection, where: str, problems: list[str]) -> None:
    """Append what is wrong with the numbers of `data`; `where` stands before a field's name."""
    for name in ("max_tokens", "eval_items"):
        value = getattr(data, name)
        if value is not None and value < 1:
            problems.append(f"{where}{name} = {value}: must be at least 1")


def _check_columns(data: DataSection, part: str, path: Path, problems: Problems) -> None:
    try:
        columns = columns_of(str(path))
    except (ValueError, OSError) as error:
        problems.append(f"data.{part} = {str(path)!r}: cannot be read ({error})")
        return
    if not columns:
        problems.append(f"data.{part} = {str(path)!r}: holds no record")
        return
    names = ["prompt", "completion", "group", "id", "messages"]
    if part == "train" and data.eval is not None:
        names.remove("group")  # it is of the evaluation items alone
    for name in names:
        text = getattr(data, name)
        try:
            whole = f"{{{text}}}" if name == "messages" else text
            missing = [] if text is None else Template(whole, f"data.{name}").missing(columns)
        except ValueError:
            continue  # noted before
        if missing:
            problems.append(f"data.{name} = {text!r}: {path} {missing_columns(missing, columns)}")


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
    if evaluation.retain is not None and not Path(evaluation.retain).is_file():
        problems.append(f"{where}retain = {evaluation.retain!r}: there is no such file, seen from {Path.cwd()}")
    elif evaluation.retain is not None and not (evaluation.retain.endswith(".txt") or is_file_name(evaluation.retain)):
        problems.append(
            f"{where}retain = {evaluation.retain!r}: must be a .txt, or a file of records (jsonl, csv, ...)"
        )
    elif evaluation.retain is not None and not evaluation.retain.endswith(".txt"):
        _check_retain_text(evaluation, evaluation.retain, where, problems)
    if evaluation.stop == "":
        problems.append(f"{where}stop = '': must be some text, or null for none")


def _check_retain_text(evaluation: EvaluationSection, source: str, where: str, problems: list[str]) -> None:
    try:
        columns = columns_of(source)
        missing = Template(evaluation.retain_text, f"{where}retain_text").missing(columns)
    except (ValueError, OSError) as error:
        problems.append(f"{where}retain = {source!r}: {error}")
        return
    if missing:
        problems.append(
            f"{where}retain_text = {evaluation.retain_text!r}: {source} {missing_columns(missing, columns)}"
        )


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
    for name in budget.match or ():
        if name not in sizes and not hasattr(adapter, name):
            problems.append(f"budget.match: {name!r} is no field of {type(adapter).__name__}")
    if isinstance(budget.match, dict):
        for name, values in budget.match.items():
            if values is not None and (not values or not fits(values, list[int])):
                problems.append(f"budget.match.{name} = {values!r}: must be a list of whole numbers, or null for any")
