"""Experiments: every problem of a file at once, before anything is loaded; results that say where they come from."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from sacrebleu.metrics import CHRF
from transformers import AutoModelForCausalLM

from bem_peft.evaluation.formats.read import read_results
from bem_peft.experiments.encoding import encode
from bem_peft.experiments.experiment import ExperimentError, read_experiment
from bem_peft.experiments.generation import generate_texts
from bem_peft.experiments.items import score_items
from bem_peft.yaml_text import parse_yaml
from bem_peft_cli.main import main
from tests.tiny_models import build
from tests.training.equalities import word_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint with its tokenizer, and 24 items."""
    build("llama").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    lines = [
        {"ref": f"book {i // 4}:{i % 4}", "a": f"w{i + 3} w{i + 4} w{i + 5}", "b": f"w{i + 6} w{i + 7}"}
        for i in range(24)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def document(folder: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {"path": str(folder / "model")},
        "adapter": {"method": "head_gating", "num_groups": 2, "task_type": "CAUSAL_LM"},
        "budget": {"anchor": {"method": "lora", "r": 2}, "match": ["total_rank"], "tolerance_ratio": 0.4},
        "data": {
            "train": str(folder / "items.jsonl"), "prompt": "{a}", "completion": " {b}", "id": "{ref}",
            "group": "{ref}", "group_pattern": "^(.+):", "eval_share": 0.4,
        },
        "training": {
            "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01, "save_steps": 2, "use_cpu": True,
            "disable_tqdm": True, "dataloader_pin_memory": False,
        },
        "seeds": [0, 1],
        "output_dir": str(folder / "runs"),
    }  # fmt: skip


def write(folder: Path, content: Any) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"metric_for_best_model": "chrf"}, "training.metric_for_best_model = 'chrf': must be eval_loss"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "'best': needs an `eval_strategy`"),
        ({"save_strategy": "best", "eval_strategy": "epoch"}, "training.metric_for_best_model: is missing"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end = True: .*save and eval strategy to match"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True},
            "training.greater_is_better = True: would keep the checkpoint with the highest loss",
        ),
        ({"optim": "galore_adamw"}, "training: optim = 'galore_adamw': "),
        ({"report_to": "nothing"}, "training: report_to = 'nothing': "),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "training: lr_scheduler_type = 'cosine_with_min_lr': "),
        ({"dataloader_persistent_workers": True}, "training: dataloader_persistent_workers = True: "),
        ({"use_liger_kernel": True}, "training.use_liger_kernel = True: needs the package"),
        ({"resume_from_checkpoint": "x"}, "training.resume_from_checkpoint: is read by no Trainer"),
        ({"max_steps": 0}, "training.max_steps = 0: must be at least 1"),
        ({"num_train_epochs": 0}, "training.num_train_epochs = 0: must be above 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_training_that_a_trainer_refuses_is_no_sound_experiment(
    folder: Path, fields: dict[str, Any], problem: str
) -> None:
    given = document(folder)
    given["training"] |= fields
    with pytest.raises(ExperimentError, match=problem) as raised:
        read_experiment(write(folder, given))
    assert len(raised.value.problems) == 1


def test_a_cap_needs_an_update_to_cap(folder: Path) -> None:
    given = document(folder)
    given["training"] |= {"max_singular_value": 1.0}
    read_experiment(write(folder, given))
    for method in ({"method": "film"}, {"method": "lora", "r": 2}):
        given["adapter"] = {**method, "task_type": "CAUSAL_LM"}
        given.pop("budget", None)
        with pytest.raises(ExperimentError, match=r"training\.max_singular_value: caps an additive"):
            read_experiment(write(folder, given))


@pytest.mark.filterwarnings("ignore")
def test_what_validates_runs(folder: Path) -> None:
    """The fields that only the Trainer judges, and that it takes together."""
    given = document(folder)
    given["training"] |= {
        "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best",
        "metric_for_best_model": "eval_loss", "load_best_model_at_end": True, "label_smoothing_factor": 0.1,
        "lr_scheduler_type": "reduce_lr_on_plateau", "gradient_checkpointing": True, "optim": "adafactor",
        "logging_steps": 1,
    }  # fmt: skip
    assert main(["run", str(write(folder, given)), "--set", "seeds=[0]"]) == 0
    curve = json.loads((folder / "runs/seed-0/result.json").read_text())["curve"]
    assert [line["step"] for line in curve if "eval_loss" in line] == [0, 2, 4]


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_experiments_are_sound(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["validate", str(path)]) == 0
    assert "is sound" in capsys.readouterr().out


def test_all_problems_are_reported_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = document(folder)
    wrong["modell"] = wrong["model"]
    wrong["model"] = {"path": "x", "dtype": "float8"}
    wrong["adapter"] = {"method": "kronecker", "u_rank": 0, "v_rank": -1, "scaling": "big", "rank": 3}
    wrong["budget"] = {"anchor": {"method": "lorra"}, "policy": "ignore", "tolerance_ratio": 5}
    wrong["data"] |= {"prompt": "no column", "eval": "other.jsonl", "max_tokens": 0, "group_pattern": "("}
    wrong["training"] |= {"learning_rte": 1.0, "max_steps": "ten", "lr_scheduler_type": "nope", "seed": 3}
    wrong["training"] |= {"variant_lr_multipliers": {"PT9": 1.0}}
    wrong["seeds"] = [0, 0]
    assert main(["validate", str(write(folder, wrong))]) == 2
    text = capsys.readouterr().err
    for part in (
        "modell: unknown key; did you mean 'model'?",
        "model.dtype = 'float8': must be one of",
        "adapter.scaling = 'big': must be a number, not text",
        "adapter.rank: unknown key",
        "adapter: `u_rank` = 0",
        "adapter: `v_rank` = -1",
        "budget.anchor.method = 'lorra'",
        "budget.policy = 'ignore'",
        "budget.tolerance_ratio = 5",
        "data.prompt = 'no column'",
        "data.eval, data.eval_share: give one of them",
        "data.eval = 'other.jsonl': there is no such file",
        "data.max_tokens = 0",
        "data.group_pattern = '('",
        "training.learning_rte: unknown key; did you mean 'learning_rate'?",
        "training.max_steps = 'ten': must be a whole number, not text",
        "training: lr_scheduler_type = 'nope'",
        "training.seed: is set by `seeds`",
        "'PT9' is none of",
        "seeds = [0, 0]",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.pop("data"), "data: is missing"),
        (lambda d: d["data"].pop("train"), "data.train: is missing"),
        (lambda d: d["adapter"].update(method=None), "adapter.method = None: is no method; methods: head_gating"),
        (
            lambda d: d["adapter"].update(method="rank_mask", num_groups=1),
            "adapter.num_groups: unknown key",
        ),
        (
            lambda d: d.update(adapter={"method": "composite", "methods": [{"method": "film", "mode": "x"}]}),
            "`mode` = 'x'",
        ),
        (lambda d: d.update(seeds=[]), "seeds = []"),
        (lambda d: d.update(seeds=[0.5]), "seeds = [0.5]: must be a list of whole numbers, not a list of numbers"),
        (lambda d: d.update(seeds=2), "seeds = 2: must be a list of whole numbers, not a whole number"),
        (lambda d: d["model"].update(path="./gone"), "model.path = './gone': there is no such folder, seen from /"),
        (lambda d: d["model"].update(path="/gone"), "model.path = '/gone': there is no such folder, seen from /"),
        (lambda d: d["model"].update(path="a/b/c"), "model.path = 'a/b/c': there is no such folder, seen from /"),
        (lambda d: d["model"].update(path="/" + "a" * 300), "there is no such folder, seen from /"),
        (lambda d: d["model"].update(path="~/a"), "model.path = '~/a': there is no such folder, seen from /"),
        (lambda d: d["budget"].update(anchor="lorra:r=8"), "budget.anchor: "),
        (lambda d: d["budget"].update(anchor=8), "budget.anchor = 8: must be a mapping or text, not a whole number"),
        (lambda d: d["data"].update(prompt={"a": None}), "not a mapping; text with braces needs quotes"),
        (lambda d: d["data"].update(group=3), "data.group = 3: must be text or null"),
        (lambda d: d["budget"].update(match=["width"]), "budget.match: 'width' is no field of HeadGroupGatingConfig"),
        (lambda d: d["budget"].update(match={"total_rank": ["a"]}), "budget.match.total_rank = ['a']"),
        (lambda d: d["budget"].update(quantities=["speed"]), "budget.quantities = ['speed']"),
        (lambda d: d["data"].pop("group"), "data.group_pattern: needs `group`"),
        (lambda d: d["data"].update(eval_share=1.5), "data.eval_share = 1.5"),
        (lambda d: d.update(evaluation={"metrics": ["blue"]}), "evaluation.metrics: 'blue' must be of nll"),
        (lambda d: d.update(evaluation={"metrics": ["f1", "f1"]}), "one stands twice"),
        (lambda d: d.update(evaluation={"max_new_tokens": 0}), "evaluation.max_new_tokens = 0"),
        (lambda d: d.update(evaluation={"stop": ""}), "evaluation.stop = ''"),
    ],
)
def test_a_single_problem_is_named(folder: Path, change: Any, text: str) -> None:
    wrong = document(folder)
    change(wrong)
    with pytest.raises(ExperimentError) as raised:
        read_experiment(write(folder, wrong))
    assert text in str(raised.value)
    assert len(raised.value.problems) == 1, "and nothing that only follows from it"


def test_a_wrong_type_hides_no_other_problem_of_its_section(folder: Path) -> None:
    wrong = document(folder)
    wrong["model"] = {"dtype": "float8", "revision": 3}
    wrong["data"] |= {"id": {"id": None}, "prompt": "{archaic}", "eval_share": 2.0}
    wrong["budget"] = {"policy": "ignore", "match": 3}
    wrong["evaluation"] = {"metrics": "nll", "max_new_tokens": 0}
    with pytest.raises(ExperimentError) as raised:
        read_experiment(write(folder, wrong))
    for text in (
        "model.path: is missing", "model.revision = 3", "model.dtype = 'float8'",
        "data.id = {'id': None}: must be text",
        "has no column 'archaic'", "data.eval_share = 2.0", "budget.anchor: is missing", "budget.match = 3",
        "budget.policy = 'ignore'", "evaluation.metrics = 'nll'", "evaluation.max_new_tokens = 0",
    ):  # fmt: skip
        assert text in str(raised.value), text
    assert len(raised.value.problems) == 11


def test_an_anchor_in_one_line_is_the_one_that_a_mapping_makes(folder: Path) -> None:
    given = document(folder)
    of_mapping = read_experiment(write(folder, given)).anchor
    given["budget"]["anchor"] = "lora:r=2"
    found = read_experiment(write(folder, given))
    assert of_mapping is not None
    assert found.anchor is not None
    assert found.anchor.to_dict() == of_mapping.to_dict()
    assert found.budget is not None
    assert found.budget.match == ["total_rank"]


def test_yaml_that_would_mislead_is_refused(folder: Path) -> None:
    with pytest.raises(ExperimentError, match="the key 'name' stands twice"):
        read_experiment(write(folder, "name: a\nname: b\n"))
    with pytest.raises(ExperimentError, match="no YAML"):
        read_experiment(write(folder, "name: [a\n"))
    with pytest.raises(ExperimentError, match="must be a mapping"):
        read_experiment(write(folder, "- a\n"))
    with pytest.raises(ExperimentError, match="no YAML"):
        read_experiment(write(folder, "name: !!python/object/apply:os.getcwd []\n"))
    assert parse_yaml("a: 1e-3\nb: -2.5E+4\nc: 12\nd: text") == {"a": 1e-3, "b": -2.5e4, "c": 12, "d": "text"}


def test_set_changes_the_document(folder: Path) -> None:
    path = write(folder, document(folder))
    experiment = read_experiment(path, ["training.learning_rate=1e-4", "seeds=[7]", "adapter.num_groups=4"])
    assert (experiment.training["learning_rate"], experiment.seeds, experiment.adapter.num_groups) == (1e-4, [7], 4)
    with pytest.raises(ExperimentError) as raised:
        read_experiment(path, ["seeds", "name.x=1", "training.max_stps=1"])
    for text in ("--set seeds: write key=value", "--set name.x=1: name is no mapping", "did you mean 'max_steps'?"):
        assert text in str(raised.value)


@pytest.mark.filterwarnings("ignore")
def test_a_run_trains_evaluates_and_says_where_it_comes_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, document(folder))
    assert main(["run", str(path)]) == 0
    first = capsys.readouterr().out
    assert "total_rank=" in first
    for seed in (0, 1):
        result = json.loads((folder / "runs" / f"seed-{seed}" / "result.json").read_text())
        source = result["provenance"]
        assert source["seed"] == seed
        assert source["settings"]["training"]["learning_rate"] == 0.01
        assert source["versions"]["torch"] == torch.__version__.partition("+")[0] or source["versions"]["torch"]
        assert source["hardware"]["logical_cpus"] >= 1
        assert source["kernels"] == os.environ["BEM_PEFT_KERNELS"]
        assert len(source["settings_sha256"]) == 64
        assert {line["quantity"]: line["verdict"] for line in result["budget"]} == {"params": "PASS", "flops": "PASS"}
        items = [
            json.loads(line) for line in (folder / "runs" / f"seed-{seed}" / "items.jsonl").read_text().splitlines()
        ]
        assert result["metrics"]["items"] == len(items) > 0
        loss = sum(item["nll"] for item in items) / sum(item["tokens"] for item in items)
        assert result["metrics"]["loss"] == pytest.approx(loss)
        # the loss is that of the saved adapter on the same items, by the model's own loss function
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder / "model"), folder / f"runs/seed-{seed}/adapter"
        )
        tokenizer = word_tokenizer()
        lines = {line["ref"]: line for line in map(json.loads, (folder / "items.jsonl").read_text().splitlines())}
        for item in items[:3]:
            prompt, answer = lines[item["id"]]["a"], lines[item["id"]]["b"]
            ids = tokenizer(f"{prompt} {answer}")["input_ids"] + [tokenizer.eos_token_id]
            labels = [-100] * 3 + ids[3:]
            with torch.no_grad():
                own = model.eval()(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
            assert item["nll"] / item["tokens"] == pytest.approx(float(own), rel=1e-4)
    results = [(folder / f"runs/seed-{seed}/result.json").read_bytes() for seed in (0, 1)]
    assert main(["run", str(path)]) == 0
    assert "done before" in capsys.readouterr().out
    assert results == [(folder / f"runs/seed-{seed}/result.json").read_bytes() for seed in (0, 1)]
    assert main(["run", str(path), "--set", "training.learning_rate=0.5"]) == 2
    assert "made with other settings (training.learning_rate: 0.01 -> 0.5)" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_one_dial_sets_sizes_and_rate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {**document(folder), "budget": "lora:r=8", "adapter": {"method": "film", "task_type": "CAUSAL_LM"}}
    given["seeds"] = [0]
    del given["training"]["learning_rate"]
    given["training"]["logging_steps"] = 1
    (folder / "dial.yaml").write_text(yaml.safe_dump(given))
    assert main(["run", str(folder / "dial.yaml")]) == 0
    said = capsys.readouterr().out
    assert "learning rate 6.7e-03: the best of searches" in said
    result = json.loads((folder / "runs" / "seed-0" / "result.json").read_text())
    assert {line["quantity"]: line["verdict"] for line in result["budget"]} == {"params": "PASS", "flops": "PASS"}
    assert max(line["learning_rate"] for line in result["curve"]) <= 6.7e-3
    given["training"]["learning_rate"], given["output_dir"] = 1e-3, str(folder / "other")
    (folder / "dial.yaml").write_text(yaml.safe_dump(given))
    assert main(["run", str(folder / "dial.yaml")]) == 0
    assert "learning rate" not in capsys.readouterr().out
    given["budget"] = "lorra:r=8"
    (folder / "dial.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(ExperimentError, match=r"budget: .*lorra"):
        read_experiment(folder / "dial.yaml")


@pytest.mark.filterwarnings("ignore")
def test_a_learning_rate_that_is_left_out_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = document(folder)
    assert main(["validate", str(write(folder, given))]) == 0
    assert "learning rate" not in capsys.readouterr().out
    del given["training"]["learning_rate"]
    given["training"] |= {"logging_steps": 1, "lr_scheduler_type": "constant"}
    path = str(write(folder, given))
    told = "the one measured for the method is taken"
    assert main(["validate", path]) == 0
    assert told in capsys.readouterr().out
    assert main(["run", path, "--set", "seeds=[0]"]) == 0
    said = capsys.readouterr().out
    assert told in said
    assert "learning rate 9.4e-03: the best of searches" in said
    curve = json.loads((folder / "runs/seed-0/result.json").read_text())["curve"]
    assert {line["learning_rate"] for line in curve} == {9.4e-3}, "what is told is used"
    assert main(["validate", path, "--set", "budget=lora:r=2"]) == 0
    assert told in capsys.readouterr().out
    given["adapter"] = {"method": "lokr", "r": 2, "target_modules": ["o_proj"], "task_type": "CAUSAL_LM"}
    (folder / "lokr.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(ExperimentError, match=r"training.learning_rate: is missing; no learning rate was measured for"):
        read_experiment(folder / "lokr.yaml")


def test_groups_are_not_split_and_every_seed_has_the_same_items(folder: Path) -> None:
    from bem_peft.experiments.items import read_items

    experiment = read_experiment(write(folder, document(folder)))
    training, evaluation = read_items(experiment.data)
    assert {item.group for item in training}.isdisjoint(item.group for item in evaluation)
    assert len(training) + len(evaluation) == 24
    again = read_items(experiment.data)
    assert [item.id for item in again[1]] == [item.id for item in evaluation]


def test_evaluation_items_that_are_trained_on_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = document(folder)
    path = str(write(folder, given))
    assert main(["validate", path]) == 0, "no warning, which would be an error"
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    own = {"ref": "new 0:0", "a": "w3", "b": "w4"}
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, [own, *({**line, "b": "w9"} for line in lines[:2])])))
    for name in ("eval_share", "group", "group_pattern"):
        given["data"].pop(name)
    given["data"]["eval"] = str(folder / "eval.jsonl")
    path = str(write(folder, given))
    assert main(["validate", path]) == 0, "the same prompts with other answers are other items"
    copies = [own, *({**line, "ref": f"copy {i}:0"} for i, line in enumerate(lines[:5]))]
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, copies)))
    told = r"5 of 6 evaluation items are trained on, .*, as 'copy \d:0', 'copy \d:0', 'copy \d:0', \.\.\.: their"
    with pytest.warns(UserWarning, match=told):
        assert main(["validate", path]) == 0
    with pytest.warns(UserWarning, match=told):
        assert main(["run", path, "--set", "seeds=[0]"]) == 0
    found = json.loads((folder / "runs/seed-0/result.json").read_text())["trained_on"]
    assert found["items"] == 5
    assert sorted(found["first"]) == [f"copy {i}:0" for i in range(5)]
    (system,) = read_results([folder / "runs"])
    assert "5 of the evaluation items were trained on, so that these are no test" in system.warnings
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, [own, {"ref": "x:1", "a": "w3"}])))
    assert main(["validate", path]) == 2
    assert "'b' is missing" in capsys.readouterr().err


def test_a_group_beside_an_evaluation_file_names_its_clusters(folder: Path) -> None:
    """The file to train on needs no such column."""
    from bem_peft.experiments.items import read_evaluation_items, read_items

    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    (folder / "eval.jsonl").write_text("\n".join(json.dumps({**line, "doc": line["ref"]}) for line in lines[:8]))
    given = document(folder)
    given["data"] |= {"eval": str(folder / "eval.jsonl"), "group": "{doc}"}
    del given["data"]["eval_share"]
    data = read_experiment(write(folder, given)).data
    training, evaluation = read_items(data)
    assert sorted({item.group for item in evaluation}) == ["book 0", "book 1"]
    assert len({item.group for item in training}) == len(training) == 24
    assert read_evaluation_items(data) == evaluation
    given["data"]["group"] = "{gone}"
    with pytest.raises(ExperimentError, match=r"eval\.jsonl has no column 'gone'") as raised:
        read_experiment(write(folder, given))
    assert len(raised.value.problems) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompt": "{archaic}"}, "has no column 'archaic'"),
        ({"id": "{a} {a}", "eval_share": 0.5}, None),
        ({"id": "same {ref}", "group": "{b}", "group_pattern": "^(z)"}, "does not match"),
        ({"eval_share": 1e-9}, "no evaluation item is left"),
    ],
)
def test_data_that_do_not_fit_are_refused(folder: Path, change: dict[str, Any], text: str | None) -> None:
    from bem_peft.experiments.items import read_items

    wrong = copy.deepcopy(document(folder))
    wrong["data"] |= change
    if text is None:
        read_items(read_experiment(write(folder, wrong)).data)
        return
    with pytest.raises(ValueError, match=text):
        read_items(read_experiment(write(folder, wrong)).data)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.jsonl", '{"b": 1}\n{"ref": 2, "c": 1}\n', "a.jsonl has no column 'a'; it has b, ref, c"),
        ("a.csv", "ref,b\n1,2\n", "a.csv has no column 'a'; it has ref, b"),
        ("a.jsonl", "[1]\n", "a.jsonl': cannot be read .*a.jsonl:1: .* is no JSON object"),
        ("a.jsonl", "{\n", "a.jsonl': cannot be read .*a.jsonl:1: no JSON .Expecting property name"),
        ("a.jsonl.gz", "no gzip", "a.jsonl.gz': cannot be read .*no whole gzip file .Not a gzipped file"),
        ("a.parquet", "no parquet", "a.parquet': cannot be read"),
    ],
)
def test_columns_are_checked_before_anything_is_loaded(folder: Path, name: str, text: str, problem: str) -> None:
    (folder / name).write_text(text)
    wrong = copy.deepcopy(document(folder))
    wrong["data"] |= {"train": str(folder / name)}
    with pytest.raises(ExperimentError, match=problem):
        read_experiment(write(folder, wrong))


@pytest.mark.filterwarnings("ignore")
def test_scores_of_an_encoder_decoder_are_its_own_loss() -> None:
    from transformers import DataCollatorForSeq2Seq

    from bem_peft.experiments.items import Item

    model, tokenizer = build("t5"), word_tokenizer()
    items = [Item(str(i), f"w{i + 3} w{i + 4}", " ".join(f"w{j + 5}" for j in range(i + 1)), "g") for i in range(3)]
    encoded = [encode(item, tokenizer, True)[0] for item in items]
    scores = score_items(model, encoded, DataCollatorForSeq2Seq(tokenizer, model), 2, lambda steps: steps)
    for row, (value, count) in zip(encoded, scores, strict=True):
        with torch.no_grad():
            own = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        assert value / count == pytest.approx(float(own), rel=1e-4)
        assert math.isfinite(value)


@pytest.mark.filterwarnings("ignore")
def test_a_saved_adapter_is_scored_as_its_run_scored_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`evaluate` on the same items gives the run's scores, and `compare` reads both."""
    assert main(["run", str(write(folder, document(folder)))]) == 0
    for seed in (0, 1):
        options = ["--prompt", "{a}", "--completion", " {b}", "--id", "{ref}", "--name", "again", "--seed", str(seed)]
        adapter = str(folder / f"runs/seed-{seed}/adapter")
        command = ["evaluate", adapter, "--data", str(folder / "items.jsonl"), *options, "--out", str(folder / "again")]
        assert main(command) == 0
        found = {
            item["id"]: item
            for item in map(json.loads, (folder / f"again/seed-{seed}/items.jsonl").read_text().splitlines())
        }
        for line in (folder / f"runs/seed-{seed}/items.jsonl").read_text().splitlines():
            item = json.loads(line)
            assert found[item["id"]]["nll"] == pytest.approx(item["nll"], rel=1e-4)
            assert found[item["id"]]["sha256"] == item["sha256"]
        run = json.loads((folder / f"runs/seed-{seed}/result.json").read_text())
        again = json.loads((folder / f"again/seed-{seed}/result.json").read_text())
        assert again["parameters"]["trainable"] == run["parameters"]["trainable"]
        assert run["budget"]
        assert again["budget"] == run["budget"]
        assert again["budget_from"] == str(folder / f"runs/seed-{seed}/result.json")
        assert "budget_from" not in run, "it measured its own"
    (system,) = read_results([folder / "again"])
    assert system.budget_is_met is True
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
    command[-1] = str(folder / "third")
    path = folder / "runs/seed-1/result.json"  # of another adapter than stands there now
    path.write_text(json.dumps({**run, "parameters": {**run["parameters"], "trainable": 7}}))
    assert main(command) == 0
    assert "is of an adapter of 7 parameters" in capsys.readouterr().out
    assert json.loads((folder / "third/seed-1/result.json").read_text())["budget"] is None


@pytest.mark.filterwarnings("ignore")
def test_generated_answers_are_scored_and_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text metrics in `run` and `evaluate`: the answers are those of plain generate, the report has every metric."""
    wanted = document(folder)
    names = ["nll", "chrf", "exact_match", "f1"]
    wanted["evaluation"] = {"metrics": names, "max_new_tokens": 5, "stop": " w9"}
    assert main(["run", str(write(folder, wanted))]) == 0
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "runs/seed-0/adapter"
    ).eval()
    tokenizer = word_tokenizer()
    items = [json.loads(line) for line in (folder / "runs/seed-0/items.jsonl").read_text().splitlines()]
    prompts = {line["ref"]: line["a"] for line in map(json.loads, (folder / "items.jsonl").read_text().splitlines())}
    for item in items:
        ids = tokenizer(prompts[item["id"]], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert item["prediction"] == text.split(" w9")[0]
        assert set(item["scores"]) == {"chrf", "exact_match", "f1"}
    result = json.loads((folder / "runs/seed-0/result.json").read_text())
    pairs = [(item["prediction"].strip(), item["reference"].strip()) for item in items]
    score = CHRF().corpus_score([p for p, _ in pairs], [[r for _, r in pairs]]).score
    assert result["metrics"]["chrf"] == pytest.approx(score)
    for seed in (0, 1):
        options = ["--prompt", "{a}", "--completion", " {b}", "--id", "{ref}", "--name", "again", "--seed", str(seed)]
        options += ["--metrics", *names, "--max-new-tokens", "5", "--stop", " w9"]
        options += ["--group", "{ref}", "--group-pattern", "^(.+):"]
        kept = {item["id"] for item in items}
        lines = [line for line in (folder / "items.jsonl").read_text().splitlines() if json.loads(line)["ref"] in kept]
        (folder / "held.jsonl").write_text("\n".join(lines))
        command = ["evaluate", str(folder / f"runs/seed-{seed}/adapter"), "--data", str(folder / "held.jsonl")]
        assert main([*command, *options, "--out", str(folder / "again")]) == 0
    capsys.readouterr()
    compared = [str(folder / "runs"), str(folder / "again")]
    assert main(["compare", *compared, "--anchor", "tiny", "--out", str(folder / "out"), "--quality", "chrf"]) == 0
    report = json.loads((folder / "out/report.json").read_text())
    judged = {found["metric"] for found in report["comparisons"]["again"]}
    assert judged | {left["metric"] for left in report["unjudged"]["again"]} == set(names)
    assert all(abs(found["comparison"]["estimate"]) < 1e-3 for found in report["comparisons"]["again"])
    assert report["objectives"][0]["name"] == "chrf"
    profiled = ["--rounds", "5", "--prompt-tokens", "8", "--new-tokens", "4", "--device", "cpu"]
    out = str(folder / "profile.json")
    for path in folder.glob("*/seed-0/result.json"):  # times are of the precision that was scored, not the checkpoint's
        path.write_text(path.read_text().replace('"precision": "float32"', '"precision": "bfloat16"'))
    kinds = ["--kinds", "prefill", "decode", "train_step"]
    assert main(["profile", *compared, "--anchor", "tiny", *profiled, *kinds, "--out", out]) == 0
    assert "requests/min" in capsys.readouterr().out
    assert main(["compare", *compared, "--anchor", "tiny", "--out", str(folder / "out"), "--profile", out]) == 0
    report = json.loads((folder / "out/report.json").read_text())
    assert {profile["system"] for profile in report["profiles"]["profiles"]} == {"base", "tiny", "again"}
    assert json.loads(Path(out).read_text())["provenance"]["settings"]["dtype"] == "torch.bfloat16"
    path = folder / "again/seed-0/result.json"
    path.write_text(path.read_text().replace('"precision": "bfloat16"', '"precision": "float32"'))
    assert main(["profile", *compared, "--anchor", "tiny", *profiled, "--out", out]) == 2
    assert "were scored in bfloat16, float32: give `dtype`" in capsys.readouterr().err
    assert {"prefill_ms", "decode_ms", "train_step_ms"} <= {o["name"] for o in report["objectives"]}
    assert main(["profile", compared[0], "--anchor", "tiny", *profiled, "--out", out]) == 2
    assert "give the folder of another system" in capsys.readouterr().err
    assert main(["profile", *compared, "--anchor", "x", *profiled, "--out", out]) == 2
    assert main(["profile", *compared, "--anchor", "tiny", *profiled, "--kinds", "all", "--out", out]) == 2
    assert "must be of prefill, decode, train_step" in capsys.readouterr().err
    assert main([*command, *options, "--out", str(folder / "third"), "--metrics", "blue"]) == 2
    assert "'blue' must be of nll" in capsys.readouterr().err


def test_answers_of_an_encoder_decoder_are_its_own() -> None:
    torch.manual_seed(0)
    model, tokenizer = build("t5").eval(), word_tokenizer()
    prompts = ["w3 w4 w5 w6", "w7", "w8 w9"]
    side = tokenizer.padding_side
    found = generate_texts(model, tokenizer, prompts, max_new_tokens=4, stop=None, batch=2, progress=iter)
    assert tokenizer.padding_side == side
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        assert text == tokenizer.decode(out[0], skip_special_tokens=True)
    with pytest.raises(ValueError, match="has no tokens"):
        generate_texts(model, tokenizer, [""], max_new_tokens=4, stop=None, batch=2, progress=iter)


def test_data_that_were_cut_by_the_hash_of_the_split_are_told(tmp_path: Path) -> None:
    """Rows with the lowest sha256 of their id: a share of a tenth would hold out nearly all of them."""
    from hashlib import sha256

    from bem_peft.experiments.items import read_items
    from bem_peft.experiments.sections import DataSection

    ids = [f"item {i}" for i in range(400)]
    for name, chosen in (("fair", ids[:100]), ("cut", sorted(ids, key=lambda i: sha256(i.encode()).digest())[:100])):
        lines = [json.dumps({"id": i, "q": f"{i}?", "a": "b"}) for i in chosen]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = DataSection(str(tmp_path / "fair.jsonl"), prompt="{q}", completion="{a}", id="{id}", eval_share=0.1)
    _, evaluation = read_items(data)
    assert 2 <= len(evaluation) <= 20
    cut = dataclasses.replace(data, train=str(tmp_path / "cut.jsonl"))
    with pytest.warns(UserWarning, match=r"eval_share = 0.1: \d+ of 100 groups are held out, expected were 10"):
        read_items(cut)
