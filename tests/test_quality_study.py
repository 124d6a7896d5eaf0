"""The quality study: its search brackets the best rate, its slices share nothing, its scores of JSON are right, and the
runs that are committed are those of the grid."""

from __future__ import annotations

import collections
import copy
import csv
import gzip
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from bem_peft import count_parameters
from bem_peft.tuners.adapter_spec import config_of
from tests.contract.methods import adapted, adapter_parameters
from tests.tiny_models import build

STUDY = Path(__file__).parents[1] / "benchmarks" / "quality"
PARTS = ("grid", "splits", "study", "records_json", "hub", "tables", "inside")


@pytest.fixture(scope="module")
def parts() -> Any:
    """The study's modules by name; they import each other by their own names, as scripts do."""
    before = set(sys.modules)
    sys.path.insert(0, str(STUDY))
    try:
        yield {name: importlib.import_module(name) for name in PARTS}
    finally:
        sys.path.remove(str(STUDY))
        for name in set(sys.modules) - before:
            if name in PARTS or name == "results_table":
                del sys.modules[name]


def searched_through(parts: Any, loss: Any, system: str = "lora_o") -> tuple[int | None, list[int]]:
    """The k that is chosen when a run at k ends with loss(k), and the ks that were tried, in order."""
    grid, known, tried = parts["grid"], {}, list[int]()
    while ks := grid.next_rates(known, "verses", system):
        assert len(tried) < 40
        known[grid.Run("verses", system, ks[0], grid.GRID["search"]["seed"])] = loss(ks[0])
        tried.append(ks[0])
    return grid.best_rate(known, "verses", system), tried


@pytest.mark.parametrize("best", [-9, -3, -2, 0, 2, 5, 9])
def test_the_search_goes_on_until_the_best_rate_lies_inside(parts: Any, best: int) -> None:
    chosen, tried = searched_through(parts, lambda k: 1.0 + 0.01 * (k - best) ** 2)
    assert chosen == best
    assert min(tried) < best < max(tried)
    assert len(set(tried)) == len(tried) >= 5


def test_a_parabola_is_not_led_by_one_lucky_run(parts: Any) -> None:
    grid = parts["grid"]
    assert [grid.GRID["tasks"][task]["choose"] for task in ("verses", "records")] == ["lowest", "parabola"]

    def chosen(task: str, losses: dict[int, float]) -> int | None:
        known = {grid.Run(task, "pt4", k, grid.GRID["search"]["seed"]): loss for k, loss in losses.items()}
        return grid.best_rate(known, task, "pt4")

    lucky = {-2: 1.0620, -1: 1.0519, 0: 1.0521, 1: 1.0558, 2: 1.0430, 3: 1.0941}
    assert chosen("verses", lucky) == 2
    assert chosen("records", lucky) == 0
    assert chosen("records", {k: (k - 1.2) ** 2 for k in range(-2, 4)}) == 1
    assert chosen("records", {-2: 1.0, -1: 0.9, 0: 0.8, 1: math.inf, 2: math.inf}) == 0
    assert chosen("records", {k: 1.0 + 0.1 * abs(k) for k in range(-2, 2)}) is None, "2 was not run"
    flat = {-2: 0.435, -1: 0.436, 0: 0.438, 1: 0.409, 2: 0.355, 3: 0.390}  # the lowest is 2, the parabola's is 3
    assert chosen("records", flat) is None, "what is chosen does not lie at an edge"
    assert chosen("records", flat | {4: 0.43}) == 2


def test_other_sizes_are_searched_around_the_rate_of_the_first_and_an_edge_is_no_end(parts: Any) -> None:
    grid = parts["grid"]
    known = {run: 1.0 + abs(run.k - 1) for run in grid.wanted_runs({}, ["verses"]) if run.system == "pt3"}
    assert grid.best_rate(known, "verses", "pt3") == 1
    assert {run.system for run in grid.wanted_transfers(known, grid.GRID["systems"])} == {"pt3@4", "pt3@16", "pt3@64"}
    while wanted := list(grid.wanted_transfers(known, ["pt3"])):
        known |= {run: 2.0 + abs(run.k + 5) for run in wanted}  # the best k is -5
    for rank in (4, 16, 64):
        tried = grid.searched(known, "verses", f"pt3@{rank}")
        assert grid.best_rate(known, "verses", f"pt3@{rank}") == -5
        assert min(tried) == -6


def test_the_exponent_of_the_size_is_found_again(parts: Any) -> None:
    """Of searches whose best rate is 8e-3 (size)^-0.41; nothing is told before all sizes of a method are searched."""
    grid, known = parts["grid"], {}
    for system, rank in (("pt3", 8), *((f"pt3@{rank}", rank) for rank in (4, 16, 64))):
        assert parts["tables"].transfer_rows(known) == []
        best = -2 * 0.41 * math.log2(rank / 8)
        for k in range(-6, 5):
            known[grid.Run("verses", system, k, grid.GRID["search"]["seed"])] = 1.0 + 0.01 * (k - best) ** 2
    (row,) = parts["tables"].transfer_rows(known)
    assert row == {"system": "pt3", "r=4": "0.82", "r=8": "0.00", "r=16": "-0.82", "r=64": "-2.46", "exponent": "-0.41"}


def test_what_was_changed_after_slice_b_had_been_read_is_not_scored_there(parts: Any) -> None:
    """It is searched as all are, and scored on Slice-D with seeds of its own, at the k next to the parabola."""
    grid, known = parts["grid"], {}
    tasks = list(grid.GRID["tasks"])
    assert not [run for run in grid.wanted_again(known, tasks, ["pt2_blocks"])]
    while wanted := [run for run in grid.wanted_runs(known, tasks, ["pt2_blocks"]) if run.is_search]:
        known[wanted[0]] = 1.0 + 0.01 * (wanted[0].k - 0.8) ** 2 - 0.1 * (wanted[0].k == 2)  # 2: one run's luck
    assert {run.task for run in grid.wanted_runs(known, tasks, ["pt2_blocks"])} == {"definitions"}
    again = list(grid.wanted_again(known, tasks, ["pt2_blocks"]))
    assert {(run.task, run.slice) for run in again} == {("verses", "D"), ("records", "D")}
    assert {run.k for run in again} == {1}
    assert len(again) == 5 + 10


def test_a_search_that_diverges_goes_down_and_one_that_never_ends_is_bounded(parts: Any) -> None:
    search = parts["grid"].GRID["search"]
    chosen, _ = searched_through(parts, lambda k: math.inf if k > -5 else 2.0 - 0.1 * k)
    assert chosen == -5
    assert searched_through(parts, lambda k: math.inf)[1][-1] == search["lowest"]
    assert searched_through(parts, lambda k: -float(k))[0] == search["highest"]


def test_seeds_are_run_at_the_chosen_rate_and_not_before(parts: Any) -> None:
    grid = parts["grid"]
    first = list(grid.wanted_runs({}, ["verses"]))
    assert {run.is_search for run in first} == {True}
    assert len({run.system for run in first}) == len(grid.systems_of("verses"))
    done = {run: 1.0 + 0.1 * abs(run.k) for run in first if run.system == "lora_o"}
    wanted = [run for run in grid.wanted_runs(done, ["verses"]) if run.system == "lora_o"]
    assert [(run.k, run.seed, run.is_search) for run in wanted] == [(0, seed, False) for seed in grid.GRID["seeds"]]
    assert wanted[0].rate == grid.GRID["base_rate"]


@pytest.mark.parametrize("task", ["verses", "records", "definitions"])
def test_slices_share_no_group_and_have_the_sizes_of_the_grid(parts: Any, task: str) -> None:
    items = parts["study"].items_of(task)
    sizes = parts["grid"].GRID["slices"]
    groups: dict[str, set[str]] = {}
    for item in items:
        groups.setdefault(item["slice"], set()).add(item["group"])
    held_out = [groups[name] for name in ("A", "B", "C", "D") if name in groups]
    assert len(set().union(groups["train"], *held_out)) == len(groups["train"]) + sum(map(len, held_out))
    counts = [sum(item["slice"] == name for item in items) for name in ("train", "A", "B")]
    assert counts == [sizes["train"], sizes["a"], sizes["b"]]
    assert len({item["id"] for item in items}) == len(items)
    for name in ("prompt", "completion"):
        assert all(parts["grid"].GRID["tasks"][task][name].format(**item) for item in items)


def test_slice_b_does_not_depend_on_how_much_is_trained_on(parts: Any) -> None:
    splits = parts["splits"]
    items = [{"id": str(i), "group": str(i // 3)} for i in range(300)]
    small, large = (splits.assign_slices(items, splits.Sizes(train, 20, 30)) for train in (50, 200))
    of_b = [[item["id"] for item in found if item["slice"] == "B"] for found in (small, large)]
    assert of_b[0] == of_b[1]
    assert len(of_b[0]) == 30


def test_slice_b_of_the_verses_is_spread_over_chapters_that_no_run_had_touched(parts: Any) -> None:
    """It was 300 verses of 16 chapters at first, on which no interval bore a claim."""
    items = parts["study"].items_of("verses")
    of_a_chapter = collections.Counter(item["group"] for item in items if item["slice"] == "B")
    assert max(of_a_chapter.values()) == 3
    assert len(of_a_chapter) >= 100
    first = sorted((STUDY / "results" / "first_reading").glob("verses/*/*.json.gz"))
    assert first, "the runs of the first reading are kept"
    touched = {item["id"].rpartition(":")[0] for item in parts["splits"].read_items(first[0])[0]["items"]}
    assert touched.isdisjoint(of_a_chapter)


@pytest.mark.parametrize(
    ("prediction", "scores"),  # json_validity, schema_validity, exact_match, field_f1
    [
        ('{"kind": "person", "given_name": "A", "surname": "B"}', (1, 1, 1, 1.0)),
        ('{"surname": "B", "given_name": "A", "kind": "person"}', (1, 1, 1, 1.0)),  # the order says nothing
        ('{"kind": "person", "given_name": "A"}', (1, 1, 0, 0.8)),
        ('{"kind": "person", "zip_code": "A", "surname": "B"}', (1, 0, 0, 2 / 3)),  # of an address
        ('{"kind": "person", "given_name": ["A"], "surname": "B"}', (1, 0, 0, 1.0)),  # a list of one
        ('{"kind": "person", "given_name": 1}', (1, 0, 0, 0.4)),
        ('{"kind": "dog"}', (1, 0, 0, 0.0)),
        ('{"kind": "person", "given_name": "A", "given_name": "A"}', (0, 0, 0, 0.0)),
        ('["A", "B"]', (1, 0, 0, 0.0)),
        ('{"kind": NaN}', (0, 0, 0, 0.0)),
        ('{"kind": "person"', (0, 0, 0, 0.0)),
        ("", (0, 0, 0, 0.0)),
    ],
)
def test_scores_of_json(parts: Any, prediction: str, scores: tuple[float, ...]) -> None:
    reference = '{"kind": "person", "given_name": "A", "surname": "B"}'
    found = parts["records_json"].record_scores([prediction], [reference])
    assert [found[n][0] for n in ("json_validity", "schema_validity", "exact_match", "field_f1")] == pytest.approx(
        scores
    )


def test_what_is_trained_on_too_is_not_read_in_slice_b(parts: Any) -> None:
    """A verse that stands twice in the Bible ("And the LORD spake unto Moses, saying,") may lie in two slices."""
    for task, count in (("verses", 298 + 239 + 299), ("records", 300 + 219), ("definitions", 300)):
        items = {item["id"]: item for item in parts["study"].items_of(task)}
        kept = parts["tables"].unseen(task)
        assert len(kept) == count
        fields = {"verses": ("archaic", "modern"), "records": ("text", "json"), "definitions": ("question", "answer")}
        met = {tuple(i[name] for name in fields[task]) for i in items.values() if i["slice"] in ("train", "A")}
        assert not [key for key in kept if tuple(items[key][name] for name in fields[task]) in met]


def test_every_system_and_ablation_of_the_grid_is_a_config_and_meets_its_anchor(parts: Any) -> None:
    """In parameters, within 4 %: of the systems, their anchors'; of the ablations, their parent's, but where less is
    the point."""
    grid = parts["grid"]
    block = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3,
            vocab_size=128,
        )
    )  # fmt: skip

    def size(system: str) -> int:
        config = config_of({**grid.system_of(system)["config"], "task_type": "CAUSAL_LM"}, system)
        return count_parameters(get_peft_model(copy.deepcopy(block), config)).trainable

    names = [*grid.GRID["systems"], *grid.ablations(grid.GRID["systems"])]
    sizes = {name: size(name) for name in names}
    smaller = {"pt2-task_mask", "pt2-no_value_gate", "pt4-spatial", "pt4-static", "pt3-u_dim_48", "pt3-u_dim_96"}
    for parent, of in grid.GRID["transfer"]["of"].items():
        lora = "lora_o" if parent == "pt1_o" else "lora_down" if parent == "pt3" else "lora_both"
        for rank in of:
            # PT2's ranks are powers of two, and its masks and gates grow with their square
            most = 1.1 if parent == "pt2" else 1.04
            assert 0.96 < size(f"{parent}@{rank}") / (sizes[lora] * rank / 8) < most, (parent, rank)
    for name in names:
        anchors = [name.partition("-")[0]] if "-" in name else grid.GRID["systems"][name].get("anchors", [])
        for anchor in anchors:
            assert name in smaller or sizes[name] == pytest.approx(sizes[anchor], rel=0.04), (name, sizes[name])


def test_the_leaderboard_is_only_added_to(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = parts["tables"]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    row = {"task": "verses", "system": "pt3", "anchor": "lora_down", "commit": "a", "nll": "1.0"}
    tables.add_to_leaderboard([row])
    first = (tmp_path / "leaderboard.csv").read_text()
    tables.add_to_leaderboard([{**row, "nll": "0.5"}])
    assert (tmp_path / "leaderboard.csv").read_text() == first
    tables.add_to_leaderboard([{**row, "nll": "0.5", "commit": "b"}])
    assert (tmp_path / "leaderboard.csv").read_text() == first + first.splitlines()[1].replace("a,1.0", "b,0.5") + "\n"


def test_what_the_docs_say_of_quality_is_what_was_measured(parts: Any) -> None:
    with (STUDY / "results" / "slice_b.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {name: str(value) for name, value in row.items()}
        for task in parts["grid"].GRID["tasks"]
        for row in parts["tables"].compare(parts["study"].losses(), task)
    ], "run benchmarks/quality/tables.py"
    with (STUDY / "results" / "ablations.csv").open(encoding="utf-8") as file:
        changes = list(csv.DictReader(file))
    found = parts["tables"].ablation_rows(parts["study"].losses())
    assert changes == [{name: str(value) for name, value in row.items()} for row in found]
    later = parts["tables"].again_rows(parts["study"].losses())
    text = STUDY / "results" / "again.csv"
    written = list(csv.DictReader(text.read_text(encoding="utf-8").splitlines())) if text.is_file() else []
    assert written == [{name: str(value) for name, value in row.items()} for row in later]
    page = (STUDY.parents[1] / "docs" / "choosing.md").read_text(encoding="utf-8").splitlines()
    for task in parts["grid"].GRID["tasks"]:
        for line in parts["tables"].markdown(rows, task):
            assert line in page
    page = (STUDY.parents[1] / "docs" / "learning_rates.md").read_text(encoding="utf-8").splitlines()
    with (STUDY / "results" / "rates.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            points = [row[task] for task in parts["grid"].GRID["tasks"]]  # "": not searched yet
            best = [f"{8 * 2 ** (float(point) / 2):.1f}" if point else "-" for point in points]
            cells = " | ".join([*best, f"{1e3 * float(row['learning_rate']):.1f}"])
            assert row["system"] in ("pt1_o_large", "pt2_blocks") or any(line.endswith(f"| {cells} |") for line in page)


def test_a_dataset_of_the_hub_becomes_items(parts: Any) -> None:
    records = [{"question": f"q{i // 2}", "answer": str(i)} for i in range(10)] + [{"question": "q0", "answer": "0"}]
    items = parts["hub"].items_from(records, "question", 100)
    assert len(items) == 10, "what stands twice is one item"
    assert {item["group"] for item in items} == {f"q{i}" for i in range(5)}
    assert len(parts["hub"].items_from(records, "question", 3)) == 3


def test_the_committed_runs_are_those_of_the_grid(parts: Any) -> None:
    grid, study = parts["grid"], parts["study"]
    items = {task: study.items_of(task) for task in grid.GRID["tasks"]}
    for path in sorted((STUDY / "results").glob("*/*/k*-seed*.json.gz")):
        document = json.loads(gzip.decompress(path.read_bytes()))
        run = grid.Run(**{name: document[name] for name in ("task", "system", "k", "seed")})
        assert study.result_path(run) == path
        assert document["learning_rate"] == run.rate
        assert document["grid"] == grid.system_of(run.system)
        assert document["slice"] == run.slice
        expected = {item["id"] for item in items[run.task] if item["slice"] == document["slice"]}
        assert {item["id"] for item in document["items"]} == expected
        loss = sum(item["nll"] for item in document["items"]) / sum(item["tokens"] for item in document["items"])
        assert loss == pytest.approx(document["metrics"]["loss"], rel=1e-6)


def test_the_largest_eigenvalue_is_that_of_the_whole_hessian(parts: Any) -> None:
    torch.manual_seed(0)
    x, weight, other = torch.randn(6, 4), torch.randn(3, 4, requires_grad=True), torch.randn(3, requires_grad=True)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x @ weight.t()) * other).square().sum()

    (gradient,) = torch.autograd.grad(loss(weight), [weight], create_graph=True)
    hessian = torch.func.hessian(loss)(weight.detach()).reshape(12, 12)
    values = torch.linalg.eigvalsh(hessian)
    expected = values.detach()[values.abs().argmax()]
    found = parts["inside"].largest_eigenvalue([gradient], [weight], steps=200)
    assert found == pytest.approx(float(expected), rel=1e-3)


def rows_of(parts: Any, model: Any) -> dict[tuple[str, str], float]:
    model.set_attn_implementation("eager")  # as the study's; the others' second derivative does not exist
    ids = torch.arange(12).reshape(2, 6) % 64
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return {(at, quantity): value for at, quantity, value in parts["inside"].look_into(model, batch)}


def test_of_a_lora_the_update_and_its_rank_are_told(parts: Any) -> None:
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    rows = rows_of(parts, get_peft_model(build("llama"), config))
    assert 1.0 < rows["o_proj", "effective_rank"] <= 2.0
    assert rows["o_proj", "update"] > 0.0
    kinds = {at for at, _ in rows}
    assert kinds == {"o_proj", "o_proj lora_A", "o_proj lora_B"}
    config = LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
    rows = rows_of(parts, get_peft_model(build("llama"), config))
    assert rows["o_proj", "update"] == 0.0
    assert ("o_proj", "effective_rank") not in rows
    assert rows["o_proj lora_A", "gradient"] == 0.0 < rows["o_proj lora_B", "gradient"]


@torch.no_grad()
def test_dead_gates_ranks_and_saturated_units_are_told(parts: Any) -> None:
    model = adapted("head_gating", "llama")
    assert rows_of(parts, model)["o_proj", "dead"] == 0.0
    for name, parameter in adapter_parameters(model).items():
        if "gate_" in name:
            parameter.fill_(-100.0 if "bias" in name else 0.0)
    rows = rows_of(parts, model)
    assert (rows["o_proj", "dead"], rows["o_proj", "spread"]) == (1.0, 0.0)
    rows = rows_of(parts, adapted("rank_mask", "llama", mask_scope="task", value_gate=False))  # 4 of 8
    assert [rows["down_proj", name] for name in ("never", "always", "saturated")] == [0.5, 0.5, 0.0]
    model = adapted("film", "llama")
    assert 0.0 < rows_of(parts, model)["down_proj", "beta_bound_used"] < 1.0
    for name, parameter in adapter_parameters(model).items():
        parameter.mul_(1e5 if "controller_weight" in name or "beta" in name else 0.0)
    rows = rows_of(parts, model)
    assert rows["down_proj", "saturated"] > 0.99
    assert rows["down_proj", "beta_bound_used"] == pytest.approx(1.0, abs=1e-3)
    assert rows["down_proj", "gamma_bound_used"] == 0.0
