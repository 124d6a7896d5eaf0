"""The pages of docs/methods say what is so: their examples run, their costs are those that are counted, their errors
those that are raised, their tables those of the configs and of the newest results. Links, messages and blocks of all
pages: test_docs_text.py, test_docs_blocks.py."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import bem_peft
from bem_peft import CompositeConfig, count_flops, count_parameters
from bem_peft.tuners.base.adapter import Adapter
from bem_peft.tuners.base.adapter_config import AdapterConfig
from bem_peft.tuners.methods import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in (DOCS / "methods").glob("*.md") if page.name != "README.md")
SEQUENCES, LENGTH = 2, 16


@pytest.fixture
def field_tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("field_tables")


def stem(page: Path) -> str:
    return page.stem


def model_of_the_pages() -> nn.Module:
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(SEQUENCES * LENGTH).view(SEQUENCES, LENGTH)}


def code_spans(text: str) -> list[str]:
    """What stands between one backtick and one, or two and two."""
    return [found.strip() for _, found in re.findall(r"(?<!`)(``?)(?!`)(.+?)(?<!`)\1(?!`)", text)]


def table_after(page: Path, heading: str) -> list[dict[str, str]]:
    """The rows of the table whose first head is `heading`; no cell of it holds a bar."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith(f"| {heading} |")), None)
    if start is None:
        return []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[start], *lines[start + 2 :])]
    end = next(i for i, line in enumerate(lines[start + 2 :]) if not line.startswith("|"))
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1 : end + 1]]


# pages and their tables of fields


def test_every_method_has_a_page_and_every_page_a_method(field_tables: Any) -> None:
    of_methods = {config for model in METHODS for config, _ in model.adapter_classes.values()} | {CompositeConfig}
    assert set(field_tables.configs().values()) == of_methods
    assert {page.name for page in PAGES} == set(field_tables.configs())


def test_the_tables_of_fields_are_those_of_the_configs(field_tables: Any) -> None:
    assert field_tables.stale() == [], "python docs/field_tables.py --write"


def test_a_page_that_is_missing_stale_or_without_a_place_for_its_table_is_found(
    field_tables: Any, tmp_path: Path
) -> None:
    for page in PAGES:
        (tmp_path / page.name).write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    assert field_tables.stale(tmp_path) == []
    page = tmp_path / "pt3_kronecker.md"
    whole = page.read_text(encoding="utf-8")
    page.write_text(whole.replace("| `u_rank` | `int` | `8` |", "| `u_rank` | `int` | `9` |"), encoding="utf-8")
    assert field_tables.stale(tmp_path) == [page]
    assert field_tables.written(page, field_tables.configs()[page.name]) == whole
    page.write_text(whole.replace(field_tables.END, ""), encoding="utf-8")
    with pytest.raises(ValueError, match="has no place for its table of fields"):
        field_tables.stale(tmp_path)
    page.unlink()
    with pytest.raises(FileNotFoundError):
        field_tables.stale(tmp_path)


def test_a_table_has_every_field_with_its_help(field_tables: Any) -> None:
    of_peft = {f.name for f in fields(PeftConfig)}
    for config in field_tables.configs().values():
        rows = field_tables.field_table(config).splitlines()[2:]
        named = [code_spans(row)[0] for row in rows]
        assert set(named) == {f.name for f in fields(config)} - of_peft
        assert len(named) == len(set(named))
        for name, row in zip(named, rows, strict=True):
            help_text = next(f for f in fields(config) if f.name == name).metadata["help"]
            assert row.replace("\\|", "|").endswith(f"| {help_text} |")


# what the pages say


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    namespace: dict[str, Any] = {}
    with contextlib.chdir(tmp_path):
        for block in blocks:
            exec(compile(block, str(page), "exec"), namespace)
    assert isinstance(namespace["config"], AdapterConfig)


def symbols(adapter: Any) -> dict[str, int]:
    """What the formulas of costs are written in."""
    names = ("num_groups", "num_heads", "gamma_dim", "beta_dim")
    found = {name: getattr(adapter, name) for name in names if hasattr(adapter, name)}
    found |= {"d_in": adapter.in_features, "d_out": adapter.out_features}
    if adapter.variant == "PT1":
        found |= {"R": sum(adapter.ranks), "r": max(adapter.ranks), "G": adapter.num_groups, "heads": adapter.num_heads}
    elif adapter.variant == "PT2":
        found |= {"R": len(adapter.A), "k": adapter.active_rank, "G": adapter.num_blocks}
    elif adapter.variant == "PT3":
        found |= dict(zip(("u_rank", "u_dim", "v_rank", "v_dim"), (*adapter.U.shape, *adapter.V.shape), strict=True))
    elif adapter.variant == "PT4":
        found |= {"units": max(adapter.gamma_dim, adapter.beta_dim)}
    return {**found, "tokens": SEQUENCES * LENGTH, "length": LENGTH}


COLUMNS = ("parameters a site", "of them used by a token", "FLOPs forward, a token and site", "backward")
COSTS = [(page, i) for page in PAGES for i in range(len(table_after(page, "config")))]


@pytest.mark.parametrize(("page", "row"), COSTS, ids=lambda value: value.stem if isinstance(value, Path) else value)
@pytest.mark.filterwarnings("ignore:retrieval=.*this training step was given no:UserWarning")
def test_the_costs_of_a_page_are_those_that_are_counted(page: Path, row: int, field_tables: Any) -> None:
    rows = table_after(page, "config")
    label = rows[row]["config"]
    given = eval(f"dict({'' if label == 'defaults' else code_spans(label)[0]})")
    model = get_peft_model(model_of_the_pages(), field_tables.configs()[page.name](**given))
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    costs: dict[str, float] = {}
    for name in set(COLUMNS) & set(rows[row]):
        said = next(r[name] for r in rows[row::-1] if r[name] != "as above")
        if said != "twice":
            costs[name] = sum(eval(code_spans(said)[0], symbols(adapter)) for adapter in adapters)
    parameters, flops = count_parameters(model), count_flops(model, batch())
    assert parameters.trainable == costs[COLUMNS[0]]
    assert parameters.active == costs.get(COLUMNS[1], parameters.trainable)
    assert flops.adapter_forward == flops.tokens * costs[COLUMNS[2]]
    assert flops.adapter_backward == flops.tokens * costs.get(COLUMNS[3], 2 * costs[COLUMNS[2]])


def test_a_composite_costs_the_sum_of_its_methods() -> None:
    methods = [config() for model in METHODS for config, _ in model.adapter_classes.values()]
    assert len(methods) == 4
    whole, *parts = (get_peft_model(model_of_the_pages(), config) for config in (CompositeConfig(methods), *methods))
    assert count_parameters(whole).trainable == sum(count_parameters(part).trainable for part in parts)
    assert count_parameters(whole).active == sum(count_parameters(part).active for part in parts)
    counted, *apart = (count_flops(model, batch()) for model in (whole, *parts))
    for name in ("adapter_forward", "adapter_backward"):
        assert getattr(counted, name) == sum(getattr(part, name) for part in apart)


REFUSALS = [(page, i) for page in PAGES for i in range(len(table_after(page, "refused")))]


@pytest.mark.parametrize(("page", "row"), REFUSALS, ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_what_a_page_calls_refused_is_refused_in_its_words(page: Path, row: int, tmp_path: Path) -> None:
    refused, words = (code_spans(cell)[0] for cell in table_after(page, "refused")[row].values())
    namespace = {**vars(bem_peft), "get_peft_model": get_peft_model, "torch": torch, "batches": [batch()]}
    namespace |= {"base": model_of_the_pages(), "folder": tmp_path / "lora"}

    def attempt() -> None:
        made = eval(refused, namespace)
        if isinstance(made, AdapterConfig):
            get_peft_model(namespace["base"], made)

    with pytest.raises((ValueError, TypeError), match=f"^{'.+'.join(map(re.escape, words.split('…')))}"):
        attempt()
    assert not (tmp_path / "lora").exists()


def test_every_page_says_what_is_refused_and_the_methods_what_they_cost() -> None:
    assert {page for page, _ in REFUSALS} == set(PAGES)
    assert {page for page, _ in COSTS} == {page for page in PAGES if page.stem != "composite"}


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "composite"], ids=stem)
def test_the_times_of_a_page_are_the_newest_rows(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    overhead_table = importlib.import_module("overhead_table")
    table = ROOT / "benchmarks/results/overhead_smollm2.csv"
    measured = overhead_table.short_table(overhead_table.newest(table, overhead_table.KEY)).splitlines()
    shown = [line for line in page.read_text(encoding="utf-8").splitlines() if re.match(r"\| (LoRA|PT\d|%) ", line)]
    assert len(shown) == 4
    assert set(shown) <= set(measured), "python benchmarks/overhead_table.py CSV --short"


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_a_page_is_short(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) < 140


def test_the_pages_are_linked_from_the_readme_and_from_their_index() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## The methods")[1].split("\n## ")[0]
    index = (DOCS / "methods/README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"(docs/methods/{page.name})" in section
        assert f"]({page.name})" in index


# docs/experiments.md


def tables_by_heading(page: Path) -> dict[str, list[dict[str, str]]]:
    """Heading -> the rows of the first table below it."""
    found = {}
    for part in page.read_text(encoding="utf-8").split("\n## ")[1:]:
        heading, _, text = part.partition("\n")
        lines = [line for line in text.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        if cells:
            found[heading.strip("`")] = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    return found


@pytest.mark.parametrize("section", ["At the top", "model", "data", "evaluation", "budget"])
def test_every_key_of_an_experiment_is_told_with_its_default(section: str) -> None:
    import dataclasses

    import yaml

    from bem_peft.experiments import experiment, sections

    classes = {
        "At the top": experiment._Document, "model": sections.ModelSection, "data": sections.DataSection,
        "evaluation": sections.EvaluationSection, "budget": sections.BudgetSection,
    }  # fmt: skip
    rows = {row["key"].strip("`"): row["default"] for row in tables_by_heading(DOCS / "experiments.md")[section]}
    known = {field.name: field for field in dataclasses.fields(classes[section])}
    assert rows.keys() == known.keys()
    for name, field in known.items():
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            assert rows[name] == "needed"
        else:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            told = rows[name].strip("`")
            assert (told if told == "{text}" else yaml.safe_load(told)) == default


def test_the_example_of_an_experiment_is_one(tmp_path: Path) -> None:
    from bem_peft.experiments.experiment import read_experiment

    text = re.findall(r"```yaml\n(.*?)```", (DOCS / "experiments.md").read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    (tmp_path / "e.yaml").write_text(text)
    (tmp_path / "records.jsonl").write_text('{"id": "r1", "text": "Ge Yang", "json": "{}"}\n')
    (tmp_path / "other_text.txt").write_text("One.\n\nTwo.\n")
    with contextlib.chdir(tmp_path):
        found = read_experiment("e.yaml")
        assert found.data.chat
        assert read_experiment("e.yaml", ['data.id="{id}"']).data.id == "{id}"


def test_what_a_report_says_is_explained() -> None:
    from bem_peft.evaluation import slices

    page = (DOCS / "reading_a_report.md").read_text(encoding="utf-8")
    for word in ("no worse", "may be worse", "no verdict", "d_z", "detectable", "forgetting", "adjusted p"):
        assert f"| {word} |" in page
    least = inspect.signature(slices.measure_slices).parameters["least_items"].default
    assert f"under {least} items" in page
