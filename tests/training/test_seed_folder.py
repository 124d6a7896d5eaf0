"""What a seed was begun with, scores as they come, and tokens of a prompt: under tokenizers and stops that people
have."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bem_peft.evaluation.formats.read import read_results
from bem_peft.experiments import evaluate, run, scoring
from bem_peft.experiments.encoding import encode, encode_items, prompt_tokens
from bem_peft.experiments.items import Item
from bem_peft.experiments.seed_folder import BLOCK, WITHOUT_EFFECT, PartialScores, begin, changes
from bem_peft.training.trainer import PTTrainingConfig
from bem_peft_cli.main import main
from tests.tiny_models import build
from tests.training.equalities import word_tokenizer
from tests.training.test_experiments import document, write

VOCABULARY = {name: i for i, name in enumerate(["<s>", "</s>", "[UNK]", "[SEP]", *(f"w{i}" for i in range(20))])}


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = [("<s>", 0), ("</s>", 1), ("[SEP]", 3)]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=names)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="</s>",
    )


@pytest.mark.parametrize(
    ("template", "before"),
    [("$A", []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", []), ("<s> $A [SEP]", [0]), ("$A </s> </s>", [])],
)
def test_nothing_stands_between_prompt_and_completion(template: str, before: list[int]) -> None:
    tokenizer = tokenizer_with(template)
    row, length = encode(Item("a", "w1 w2", "w3", "a"), tokenizer, False)
    prompt = [*before, VOCABULARY["w1"], VOCABULARY["w2"]]
    assert row["input_ids"] == [*prompt, VOCABULARY["w3"], 1]
    assert row["labels"] == [-100] * len(prompt) + [VOCABULARY["w3"], 1]
    assert length == len(row["input_ids"])
    assert prompt_tokens("w1 w2", tokenizer) == prompt
    assert prompt_tokens("", tokenizer) == before  # what generation starts from


def test_what_does_not_fit_is_an_error_or_left_out_whole() -> None:
    tokenizer = tokenizer_with("<s> $A")
    items = [Item(str(n), " ".join(["w1"] * n), "w2 w3", "g") for n in (1, 9, 2, 8)]
    options: dict[str, Any] = {"max_tokens": 6, "is_seq2seq": False, "what": "evaluation"}
    with pytest.raises(ValueError, match=r"2 of 4 evaluation items are longer .* = 6, as '9' \(13 tokens\), '8' \(12"):
        encode_items(items, tokenizer, too_long="error", **options)
    found = encode_items(items, tokenizer, too_long="drop", **options)
    assert [item.id for item in found.items] == ["1", "2"]
    assert [item.id for item in found.left_out] == ["9", "8"]
    assert [len(row["input_ids"]) for row in found.encoded] == [5, 6]
    with pytest.raises(ValueError, match="item 'e': its completion ' ' has no tokens"):
        encode(Item("e", "w1", " ", "g"), tokenizer, False)
    with pytest.raises(ValueError, match="4 of 4 evaluation items are longer"):
        encode_items(items, tokenizer, too_long="drop", **{**options, "max_tokens": 2})
    long = Item("s", "w1", "w2 " * 9, "g")
    assert encode(long, word_tokenizer(), True)[1] >= 9  # an encoder-decoder's answer counts too


def test_a_tokenizer_without_eos_says_so() -> None:
    tokenizer = tokenizer_with("$A")
    tokenizer.eos_token = None
    with pytest.warns(UserWarning, match="no EOS"):
        found = encode_items(
            [Item("a", "w1", "w2", "a")], tokenizer, max_tokens=9, is_seq2seq=False, too_long="error", what="training"
        )
    assert found.encoded[0]["input_ids"] == [VOCABULARY["w1"], VOCABULARY["w2"]]


def test_a_seed_that_was_begun_otherwise_is_refused_with_what_changed(tmp_path: Path) -> None:
    begin(tmp_path / "seed-0", {"training": {"learning_rate": 0.01, "max_steps": 9}, "data": {"prompt": "{a}"}})
    begin(tmp_path / "seed-0", {"data": {"prompt": "{a}"}, "training": {"max_steps": 9, "learning_rate": 0.01}})
    begin(tmp_path / "seed-0", {"training": {"learning_rate": 0.03}})  # nothing was made yet: it failed before a step
    begin(tmp_path / "seed-0", {"training": {"learning_rate": 0.01, "max_steps": 9}, "data": {"prompt": "{a}"}})
    (tmp_path / "seed-0" / "items.partial.jsonl").touch()
    with pytest.raises(ValueError, match=r"training.learning_rate: 0.01 -> 0.02; data.prompt: '\{a\}' -> 'A: \{a\}'"):
        begin(tmp_path / "seed-0", {"training": {"learning_rate": 0.02, "max_steps": 9}, "data": {"prompt": "A: {a}"}})
    (tmp_path / "old" / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(ValueError, match="of a release that kept no settings"):
        begin(tmp_path / "old", {})
    assert changes({"a": [1]}, {"a": [1], "b": None}) == []
    assert changes({"a": {"b": 1}}, {"a": None}) == ["a: {'b': 1} -> None"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint with its tokenizer, and 200 items in 50 groups."""
    build("llama").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    lines = [
        {"ref": f"book {i // 4}:{i % 4}", "a": f"w{i % 20 + 3} w{i % 7 + 4}", "b": f"w{i % 11 + 6} w{i % 5 + 7}"}
        for i in range(200)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def stop_before_scoring(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run seed 0 of the experiment to its last training step, and no further."""

    def stop(*arguments: object, **options: object) -> None:
        raise OSError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "score_items", stop)
        assert main(["run", str(path), "--set", "seeds=[0]"]) == 2


def test_a_run_that_was_stopped_goes_on_only_with_its_own_settings(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, document(folder))
    whole = folder / "whole"
    assert main(["run", str(path), "--set", f"output_dir={whole}", "--set", "seeds=[0]"]) == 0

    stop_before_scoring(path, monkeypatch)
    assert list((folder / "runs/seed-0/checkpoints").glob("checkpoint-*"))
    capsys.readouterr()
    for change, text in (
        ("training.learning_rate=0.5", "training.learning_rate: 0.01 -> 0.5"),
        ("data.prompt=Old {a}", "data.prompt: '{a}' -> 'Old {a}'"),
        ("adapter.scaling=2.0", "adapter.scaling: None -> 2.0"),
    ):
        assert main(["run", str(path), "--set", "seeds=[0]", "--set", change]) == 2
        assert text in capsys.readouterr().err
    items = folder / "items.jsonl"
    before = items.read_text()
    items.write_text(before.replace("w3", "w9"))
    assert main(["run", str(path)]) == 2
    assert "training_items" in capsys.readouterr().err
    items.write_text(before)
    assert main(["run", str(path), "--set", "seeds=[0, 1]"]) == 0  # more seeds are no other settings
    assert (folder / "runs/seed-0/items.jsonl").read_bytes() == (whole / "seed-0/items.jsonl").read_bytes()


@pytest.mark.parametrize("save_steps", [2, 4])
def test_a_run_that_was_stopped_after_its_last_step_takes_no_more(
    folder: Path, save_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' Trainer takes a step more where it goes on from the last; a constant rate makes it seen."""
    given = document(folder)
    given["training"] |= {"lr_scheduler_type": "constant", "save_steps": save_steps}
    path, whole = write(folder, given), folder / "whole"
    assert main(["run", str(path), "--set", f"output_dir={whole}", "--set", "seeds=[0]"]) == 0

    stop_before_scoring(path, monkeypatch)
    assert main(["run", str(path), "--set", "seeds=[0]"]) == 0
    file = "seed-0/adapter/adapter_model.safetensors"
    assert (folder / "runs" / file).read_bytes() == (whole / file).read_bytes()
    assert not (folder / "runs/seed-0/checkpoints/checkpoint-5").exists()


KILLED = """
import os, signal, sys
from bem_peft.experiments import scoring, seed_folder
add = seed_folder.PartialScores.add
def killed(self, lines):
    add(self, lines)
    with self.path.open("ab") as file:  # what a write that is cut off leaves
        file.write(b'{"id": "x", "nl')
    os.kill(os.getpid(), signal.SIGKILL)
seed_folder.PartialScores.add = killed
from bem_peft_cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_that_was_killed_goes_on_where_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, document(folder))
    assert main(["run", str(path), "--set", "seeds=[0]"]) == 0
    options = ["--data", str(folder / "items.jsonl"), "--prompt", "{a}", "--completion", " {b}", "--id", "{ref}"]
    options += ["--name", "again", "--metrics", "nll", "exact_match", "--max-new-tokens", "3"]
    command = ["evaluate", str(folder / "runs/seed-0/adapter"), *options, "--out"]
    assert main([*command, str(folder / "whole")]) == 0
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *command, str(folder / "killed")], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    partial = PartialScores(folder / "killed/seed-0")
    assert partial.path.read_bytes().count(b"\n") == BLOCK
    assert not (folder / "killed/seed-0/result.json").exists()
    assert main([*command, str(folder / "killed"), "--max-tokens", "99"]) == 2
    assert "data.max_tokens: 512 -> 99" in capsys.readouterr().err
    scored = []
    plain = scoring.score_items
    monkeypatch.setattr(
        scoring, "score_items", lambda model, rows, *rest: scored.extend(rows) or plain(model, rows, *rest)
    )
    assert main([*command, str(folder / "killed")]) == 0
    assert len(scored) == 200 - BLOCK
    assert (folder / "killed/seed-0/items.jsonl").read_bytes() == (folder / "whole/seed-0/items.jsonl").read_bytes()
    assert not partial.path.exists()


@pytest.mark.filterwarnings("ignore")
def test_items_that_are_too_long_are_left_out_of_every_system(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().split("\n")]
    lines[5]["a"] = " ".join(["w4"] * 30)
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = document(folder)
    given["data"] |= {"max_tokens": 16, "eval": str(folder / "items.jsonl")}
    for name in ("eval_share", "group", "group_pattern"):
        given["data"].pop(name)
    assert main(["run", str(write(folder, given))]) == 2
    given["data"]["too_long"] = "drop"
    assert main(["run", str(write(folder, {**given, "name": "one", "output_dir": str(folder / "one")}))]) == 0
    lines[5]["a"], lines[9]["a"] = "w4", " ".join(["w4"] * 30)  # the other system is too long on another item
    result = json.loads((folder / "one/seed-0/result.json").read_text())
    assert result["too_long"] == {"training": 1, "evaluation": 1}
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["run", str(write(folder, {**given, "name": "two", "output_dir": str(folder / "two")}))]) == 0
    systems = read_results([folder / "one", folder / "two"])
    assert [system.left_out for system in systems] == [{"book 1:1"}, {"book 2:1"}]
    out = str(folder / "out")
    assert main(["compare", str(folder / "one"), str(folder / "two"), "--anchor", "one", "--out", out]) == 0
    report = json.loads((folder / "out/report.json").read_text())
    assert report["left_out"] == ["book 1:1", "book 2:1"]
    assert report["comparisons"]["two"][0]["comparison"]["items"] == 198


@pytest.mark.filterwarnings("ignore")
def test_every_road_chooses_the_same_items_and_precision(folder: Path) -> None:
    given = document(folder)
    given["model"]["dtype"] = "bfloat16"
    given["data"] |= {"eval": str(folder / "items.jsonl"), "eval_items": 24}
    for name in ("eval_share", "group", "group_pattern"):
        given["data"].pop(name)
    assert main(["run", str(write(folder, given)), "--set", "seeds=[0]"]) == 0
    options = ["--prompt", "{a}", "--completion", " {b}", "--id", "{ref}", "--name", "again", "--items", "24"]
    command = ["evaluate", str(folder / "runs/seed-0/adapter"), "--data", str(folder / "items.jsonl"), *options]
    assert main([*command, "--out", str(folder / "again")]) == 0
    found = [json.loads((folder / name / "seed-0/result.json").read_text()) for name in ("runs", "again")]
    assert {result["precision"] for result in found} == {"bfloat16"}
    assert len({result["items_sha256"] for result in found}) == 1
    lines = [(folder / name / "seed-0/items.jsonl").read_text().split("\n")[:-1] for name in ("runs", "again")]
    assert [json.loads(line)["id"] for line in lines[0]] == [json.loads(line)["id"] for line in lines[1]]


@pytest.mark.filterwarnings("ignore")
def test_a_runs_folder_is_scored_seed_by_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(write(folder, document(folder))), "--set", "seeds=[3, 11]"]) == 0
    data = ["--data", str(folder / "items.jsonl"), "--prompt", "{a}", "--completion", " {b}", "--items", "8"]
    command = ["evaluate", str(folder / "runs"), *data, "--name", "again", "--out"]
    assert main([*command, str(folder / "all")]) == 0
    out = capsys.readouterr().out
    for seed in (3, 11):  # as each by itself
        own = ["evaluate", str(folder / f"runs/seed-{seed}/adapter"), *data, "--name", "again", "--seed", str(seed)]
        assert main([*own, "--out", str(folder / "own")]) == 0
        found = [json.loads((folder / name / f"seed-{seed}/result.json").read_text()) for name in ("all", "own")]
        assert found[0]["metrics"] == found[1]["metrics"]
        assert found[0]["seed"] == found[1]["seed"] == seed
        assert f"again, seed {seed}: loss {found[0]['metrics']['loss']:.4f}" in out
    losses = {json.loads((folder / f"all/seed-{seed}/result.json").read_text())["metrics"]["loss"] for seed in (3, 11)}
    assert len(losses) == 2
    assert main([*command, str(folder / "all")]) == 2
    assert "all/seed-3/result.json is there already" in capsys.readouterr().err
    assert main([*command, str(folder / "one"), "--seed", "11"]) == 0
    assert sorted(path.name for path in (folder / "one").iterdir()) == ["seed-11"]
    assert main(["evaluate", str(folder / "runs/seed-11"), *data, "--name", "n", "--out", str(folder / "two")]) == 0
    assert sorted(path.name for path in (folder / "two").iterdir()) == ["seed-11"]
    assert main([*command, str(folder / "three"), "--seed", "4"]) == 2
    assert "--seed 4: " in capsys.readouterr().err
    (folder / "runs/seed-x").mkdir()
    assert main([*command, str(folder / "three")]) == 2
    assert "seed-x: is no folder of `bem-peft run`" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["adapter", "checkpoints/checkpoint-4"])
def test_the_precision_of_a_run_that_has_not_ended_is_that_of_its_settings(
    folder: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint is bfloat16, so that "auto" would be that."""
    build("llama").to(torch.bfloat16).save_pretrained(folder / "model")
    given = document(folder)
    given["model"]["dtype"] = "float32"
    assert main(["run", str(write(folder, given)), "--set", "seeds=[0]"]) == 0
    (folder / "runs/seed-0/result.json").unlink()
    capsys.readouterr()
    options = ["--prompt", "{a}", "--completion", " {b}", "--name", "again", "--items", "8"]
    command = ["evaluate", str(folder / "runs/seed-0" / what), "--data", str(folder / "items.jsonl"), *options]
    assert main([*command, "--out", str(folder / "again")]) == 0
    assert re.search(r"in float32, as .*runs/seed-0/settings.json has it", capsys.readouterr().out)
    assert json.loads((folder / "again/seed-0/result.json").read_text())["precision"] == "float32"
    assert main([*command, "--out", str(folder / "other"), "--dtype", "auto"]) == 0
    assert "in bfloat16, as asked" in capsys.readouterr().out
    (folder / "runs/seed-0/settings.json").write_text("[]")
    assert main([*command, "--out", str(folder / "third")]) == 2
    assert "settings.json is none of `bem-peft run`" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_the_base_alone_is_a_system_with_its_own_loss(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "retain.txt").write_text("w3 w4 w5 w6 w7")
    given = document(folder)
    given["evaluation"] = {"metrics": ["nll", "exact_match"], "max_new_tokens": 2, "retain": str(folder / "retain.txt")}
    given["training"]["lr_scheduler_type"] = "constant"
    path = str(write(folder, given))
    assert main(["run", path, "--set", "seeds=[0, 1, 2]"]) == 0
    command = ["evaluate", "--base-only", "--experiment", path, "--out", str(folder / "base")]
    command += ["--seed", "0", "--seed", "1", "--seed", "2"]
    assert main(command) == 0
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model").eval(), word_tokenizer()
    texts = {line["ref"]: line for line in map(json.loads, (folder / "items.jsonl").read_text().split("\n"))}
    lines = [json.loads(line) for line in (folder / "base/seed-2/items.jsonl").read_text().split("\n")[:-1]]
    for item in lines[:3]:
        prompt = tokenizer(texts[item["id"]]["a"])["input_ids"]
        ids = [*prompt, *tokenizer(texts[item["id"]]["b"])["input_ids"], tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        with torch.no_grad():
            own = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        assert item["nll"] / item["tokens"] == pytest.approx(float(own), rel=1e-4)
    results = [json.loads((folder / f"base/seed-{seed}/result.json").read_text()) for seed in range(3)]
    assert [result["seed"] for result in results] == [0, 1, 2]
    assert {result["metrics"]["forgetting"] for result in results} == {0.0}
    base, run = read_results([folder / "base", folder / "runs"])
    assert (base.name, base.method, base.values["parameters"]) == ("base", "base model alone", 0.0)
    assert base.scores["nll"].seeds == run.scores["nll"].seeds
    out = ["--anchor", "base", "--out", str(folder / "out")]
    assert main(["compare", str(folder / "base"), str(folder / "runs"), *out]) == 0
    assert main(["profile", str(folder / "base"), str(folder / "runs"), *out]) == 2
    assert "is of the base model alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give an adapter, or --base-only"),
        (["a", "--base-only"], "give an adapter, or --base-only"),
        (["--seed", "0", "--seed", "1", "a"], "--seed 0, 1: an adapter has one"),
        (["--base-only", "--seed", "1", "--seed", "1"], "--seed 1, 1: an adapter has one; with --base-only or a run's"),
        (["--base-only"], "--base-only: give the model by --base"),
    ],
)
def test_what_is_scored_is_one_thing(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "d.jsonl", "--prompt", "{a}", "--completion", "{b}", "--name", "n", "--out", "o"]
    assert main(["evaluate", *arguments, *options]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").write_text("x")
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("a model was loaded"))
    given = write(folder, {**document(folder), "output_dir": str(folder / "file" / "runs")})
    assert main(["run", str(given)]) == 2
    assert "file" in capsys.readouterr().err
    assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore")
def test_what_was_forgotten_is_the_loss_with_the_adapter_less_that_without_it(folder: Path) -> None:
    texts = ["w3 w4 w5 w6 w7", "w8", "w9 w10 w11 " * 9]
    (folder / "retain.txt").write_text("\n\n".join(texts))
    given = document(folder)
    given["evaluation"] = {"retain": str(folder / "retain.txt")}
    given["data"]["max_tokens"] = 10
    assert main(["run", str(write(folder, given)), "--set", "seeds=[0, 1, 2]"]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = word_tokenizer()

    def loss(of: Any, text: str) -> tuple[float, int]:
        ids, total, count = tokenizer(text)["input_ids"], 0.0, 0
        for start in range(0, len(ids), 10):
            window = torch.tensor([ids[start : start + 10]])
            if window.shape[1] > 1:
                with torch.no_grad():
                    total += float(of(input_ids=window, labels=window).loss) * (window.shape[1] - 1)
                count += window.shape[1] - 1
        return total, count

    lines = [json.loads(line) for line in (folder / "runs/seed-0/retain.jsonl").read_text().split("\n")[:-1]]
    assert [line["id"] for line in lines] == ["0", "2"]  # one word has no token to predict
    expected = [loss(model, texts[0]), loss(model, texts[2])]
    assert [line["tokens"] for line in lines] == [count for _, count in expected]
    assert [line["base_nll"] for line in lines] == pytest.approx([total for total, _ in expected], rel=1e-5)
    adapted = PeftModel.from_pretrained(model, folder / "runs/seed-0/adapter").eval()
    own = [loss(adapted, texts[0]), loss(adapted, texts[2])]
    assert [line["nll"] for line in lines] == pytest.approx([total for total, _ in own], rel=1e-5)
    metrics = json.loads((folder / "runs/seed-0/result.json").read_text())["metrics"]
    by_hand = sum((o - b) / n for (o, n), (b, _) in zip(own, expected, strict=True)) / 2
    assert metrics["forgetting"] == pytest.approx(by_hand, abs=1e-6)
    (system,) = read_results([folder / "runs"])
    assert system.scores["forgetting"].values.shape == (3, 2)
    assert system.values["forgetting"] == pytest.approx(np.mean(system.scores["forgetting"].values))
    options = ["--data", str(folder / "items.jsonl"), "--prompt", "{a}", "--completion", " {b}", "--name", "again"]
    command = ["evaluate", str(folder / "runs/seed-0/adapter"), *options, "--retain", str(folder / "retain.txt")]
    assert main([*command, "--max-tokens", "10", "--out", str(folder / "again")]) == 0
    again = json.loads((folder / "again/seed-0/result.json").read_text())["metrics"]
    assert again["forgetting"] == pytest.approx(metrics["forgetting"], abs=1e-6)
    assert main(["validate", str(write(folder, given)), "--set", "evaluation.retain=nowhere.txt"]) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_evaluated_meanwhile_keeps_its_curve(folder: Path) -> None:
    given = document(folder)
    given["training"] |= {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "save_steps": 2}
    given["training"] |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    assert main(["run", str(write(folder, given)), "--set", "seeds=[0]"]) == 0
    result = json.loads((folder / "runs/seed-0/result.json").read_text())
    evaluated = {line["step"]: line["eval_loss"] for line in result["curve"] if "eval_loss" in line}
    assert set(evaluated) == {2, 4}
    assert [line["step"] for line in result["curve"] if "loss" in line] == [1, 2, 3, 4]
    assert result["selected_on_evaluation"] is True
    (system,) = read_results([folder / "runs"])
    assert any("chosen on the evaluation items" in text for text in system.warnings)


@pytest.mark.filterwarnings("ignore")
def test_all_data_are_checked_before_a_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("a model was loaded"))
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().split("\n")]
    evaluated = [dict(line) for line in lines[:20]]
    evaluated[3]["b"] = " ".join(["w4"] * 600)
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, evaluated)))
    given = document(folder)
    for name in ("eval_share", "group", "group_pattern"):
        given["data"].pop(name)
    given["data"]["eval"] = str(folder / "eval.jsonl")
    assert main(["run", str(write(folder, given))]) == 2
    assert "1 of 20 evaluation items are longer than data.max_tokens" in capsys.readouterr().err
    given["data"]["eval"] = str(folder / "items.jsonl")
    (folder / "empty.txt").write_text(" \n\n ")
    (folder / "short.txt").write_text("w3\n\nw4")
    (folder / "latin.txt").write_bytes(b"caf\xe9 noir")
    for name, text in (("empty", "holds no text"), ("short", "no text has two tokens"), ("latin", "latin.txt:1")):
        given["evaluation"] = {"retain": str(folder / f"{name}.txt")}
        assert main(["run", str(write(folder, given))]) == 2
        assert text in capsys.readouterr().err
    given["evaluation"] = {"retain": str(folder / "items.jsonl")}
    assert main(["validate", str(write(folder, given))]) == 2
    assert "items.jsonl has no column 'text'" in capsys.readouterr().err
    given["evaluation"] = {}
    lines[7]["a"] = ""  # no BOS: nothing would predict the first token of the answer
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["run", str(write(folder, given))]) == 2
    assert "item 'book 1:3': its prompt '' has no tokens" in capsys.readouterr().err
    row, _ = encode(Item("a", "", "w3", "a"), tokenizer_with("<s> $A"), False)
    assert row["labels"] == [-100, VOCABULARY["w3"], 1]  # with BOS there is a first token


@pytest.mark.filterwarnings("ignore")
def test_a_finished_seed_stands_for_its_own_data_and_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, document(folder))
    assert main(["run", str(path), "--set", "seeds=[0]"]) == 0
    capsys.readouterr()
    items = folder / "items.jsonl"
    before = items.read_text()
    items.write_text(before.replace("w3", "w9"))
    assert main(["run", str(path)]) == 2
    err = capsys.readouterr().err
    assert "training_items" in err
    assert not (folder / "runs/seed-1").exists()
    items.write_text(before)
    shown = ["training.disable_tqdm=false", "training.logging_steps=1", "training.run_name=other"]
    changes = [word for text in shown for word in ("--set", text)]
    assert main(["run", str(path), "--set", "seeds=[0]", *changes]) == 0
    assert "done before" in capsys.readouterr().out
    assert main(["run", str(path), "--set", "seeds=[0]", "--set", "training.weight_decay=0.1"]) == 2
    assert "training.weight_decay: None -> 0.1" in capsys.readouterr().err
    (folder / "runs/seed-0/settings.json").unlink()  # as a release that kept none
    assert main(["run", str(path), "--set", "seeds=[0]"]) == 0
    assert main(["run", str(path), "--set", "seeds=[0]", "--set", "data.prompt=Old {a}"]) == 2


def test_fields_without_effect_are_fields() -> None:
    """Every one that some supported transformers has; a name that none has would be a slip."""
    fields = {field.name for field in dataclasses.fields(PTTrainingConfig)}
    gone = {"logging_dir", "include_num_input_tokens_seen", "hub_revision", "project", "trackio_space_id"}
    assert set(WITHOUT_EFFECT) - fields <= gone
