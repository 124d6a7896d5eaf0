"""Conversations in the model's chat template: the tokens of TRL's SFT, in training, scoring and generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from bem_peft.experiments.encoding import encode, encode_items
from bem_peft.experiments.items import Item, read_items_of, read_messages
from bem_peft.experiments.sections import DataSection
from bem_peft_cli.main import main
from tests.tiny_models import build
from tests.training.equalities import word_tokenizer
from tests.training.test_experiments import document, write

CHATML = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST] ' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# the last answer is opened by a thought that the question alone does not have, as Qwen3's does
THINK = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think> </think> ' }}{% endif %}"
    "{{ m['content'] + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
SIGNS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<think>", "</think>", "[UNK]"]
CONVERSATIONS = [
    [("user", "w1 w2"), ("assistant", "w3")],
    [("user", "w4"), ("assistant", "w5 w6"), ("user", "w7"), ("assistant", "w8 w9 w1")],
]


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    names = [*SIGNS, "user", "assistant", "system", *(f"w{i}" for i in range(40))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="[UNK]", pad_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def messages_of(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", [CHATML, INST, THINK], ids=["chatml", "inst", "think"])
def test_tokens_are_those_of_sft(template: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(template)
    whole = [messages_of(pairs) for pairs in CONVERSATIONS]
    rows = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in whole]
    arguments = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, completion_only_loss=True, max_length=None)
    trainer = SFTTrainer(
        build("llama"), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=LoraConfig(r=1, target_modules=["o_proj"]),
    )  # fmt: skip
    for i, messages in enumerate(whole):
        theirs = trainer.data_collator([trainer.train_dataset[i]])
        ours, length = encode(Item("a", tuple(messages[:-1]), messages[-1]["content"], "a"), tokenizer, False)
        assert ours["input_ids"] == theirs["input_ids"][0].tolist()
        assert ours["labels"] == theirs["labels"][0].tolist()
        assert length == len(ours["input_ids"])
        assert sum(label != -100 for label in ours["labels"]) > len(messages[-1]["content"].split())


def test_a_template_that_renders_the_question_otherwise_is_refused() -> None:
    tokenizer = tokenizer_with("{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{{ messages|length }}")
    with pytest.raises(ValueError, match="item 'a': the chat template renders the question otherwise"):
        encode(Item("a", tuple(messages_of([("user", "w1")])), "w2", "a"), tokenizer, False)
    with pytest.raises(ValueError, match="refuses a conversation of the roles system, user: only user and assistant"):
        encode(
            Item("a", tuple(messages_of([("system", "w1"), ("user", "w1")])), "w2", "a"), tokenizer_with(INST), False
        )
    item = Item("a", tuple(messages_of([("user", "w1")])), "w2", "a")
    options: dict[str, Any] = {"max_tokens": 99, "too_long": "error", "what": "training"}
    with pytest.raises(ValueError, match="has no chat template"):
        encode_items([item], word_tokenizer(), is_seq2seq=False, **options)
    with pytest.raises(ValueError, match="encoder-decoder has no conversations"):
        encode_items([item], word_tokenizer(), is_seq2seq=True, **options)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("[", "is no JSON"),
        (3, "must be a list of"),
        ([], "its roles are: none"),
        (["hi"], "must be a list of"),
        ([{"role": "user", "content": "a"}], "its roles are: user"),
        ([{"role": "assistant", "content": "a"}], "its roles are: assistant"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "its roles are: user, user"),
        ([{"role": "user"}, {"role": "assistant", "content": "b"}], "message 1 has content None"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"message 1 has content \[\{'type'"),
        ([{"content": "a"}, {"role": "assistant", "content": "b"}], "message 1 has role None"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(value: object, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"a.jsonl:3: 'chat' .*{problem}"):
        read_messages(value, "a.jsonl:3", "chat")


def test_conversations_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"n": i, "chat": messages_of(pairs)} for i, pairs in enumerate(CONVERSATIONS)]
    rows[0]["chat"][0]["name"] = "me"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list([{"n": row["n"], "chat": json.dumps(row["chat"])} for row in rows]).to_csv(tmp_path / "a.csv")
    found = [
        read_items_of(DataSection("", messages="chat"), str(tmp_path / name))
        for name in ("a.jsonl", "a.parquet", "a.csv")
    ]
    assert found[0] == found[1] == found[2]
    assert [item.completion for item in found[0]] == ["w3", "w8 w9 w1"]
    assert [item.sha256 for item in found[0]] == [item.sha256 for item in found[1]]
    assert found[0][0].prompt == ({"role": "user", "content": "w1 w2", "name": "me"},)
    asked = read_items_of(DataSection("", prompt="{n}", completion="w{n}", chat=True), str(tmp_path / "a.csv"))
    assert asked[1] == Item("1", ({"role": "user", "content": "1"},), "w1", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer_with(CHATML).save_pretrained(tmp_path / "model")
    rows = [{"a": f"w{i} w{i + 1}", "b": f"w{i + 2}"} for i in range(24)]
    talks = [{"talk": messages_of([("user", row["a"]), ("assistant", row["b"])])} for row in rows]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_chat_in_run_and_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = document(folder)
    given["data"] = {"train": str(folder / "talks.jsonl"), "messages": "talk", "eval_share": 0.4}
    given["evaluation"] = {"metrics": ["nll", "exact_match"], "max_new_tokens": 3}
    path = write(folder, given)
    assert main(["run", str(path), "--set", "seeds=[0]"]) == 0
    lines = [json.loads(line) for line in (folder / "runs/seed-0/items.jsonl").read_text().splitlines()]
    assert {line["tokens"] for line in lines} == {2}  # a word and <|im_end|>
    adapter = str(folder / "runs/seed-0/adapter")
    assert (
        main(["evaluate", adapter, "--experiment", str(path), "--name", "again", "--out", str(folder / "again")]) == 0
    )
    again = [json.loads(line) for line in (folder / "again/seed-0/items.jsonl").read_text().splitlines()]
    assert again == lines
    # the same questions by the other road, prompt and completion in the template
    options = ["--data", str(folder / "items.jsonl"), "--prompt", "{a}", "--completion", "{b}", "--chat"]
    asked = ["evaluate", adapter, *options, "--name", "asked", "--out", str(folder / "asked")]
    assert main(asked) == 0
    by_id = {
        line["id"]: line for line in map(json.loads, (folder / "asked/seed-0/items.jsonl").read_text().splitlines())
    }
    for line in lines:
        assert by_id[line["id"]]["nll"] == pytest.approx(line["nll"], rel=1e-5)
        assert by_id[line["id"]]["sha256"] == line["sha256"]
    # the answer is what generate gives after the opened answer
    tokenizer = tokenizer_with(CHATML)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.load_adapter(adapter)
    talks = [json.loads(line)["talk"] for line in (folder / "talks.jsonl").read_text().splitlines()]
    ids = tokenizer.apply_chat_template(
        talks[int(lines[0]["id"])][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert lines[0]["prediction"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    capsys.readouterr()
    for options, text in (
        (["--experiment", str(path), "--chat"], "--chat: stands in the experiment's file"),
        (["--experiment", str(path), "--batch", "0"], "batch = 0: must be at least 1"),
        (["--name", "x"], "--data: is missing; give it, or --experiment FILE"),
        (["--data", "x.jsonl"], "--name: is missing"),
        (["--data", "x.jsonl", "--name", "x", "--set", "a=1"], "--set: changes an experiment"),
        (["--data", "x.jsonl", "--name", "x", "--prompt", "{a}"], "prompt, completion: give both, or `messages`"),
        (["--data", "x.jsonl", "--name", "x", "--messages", "talk", "--chat"], "`messages` are a chat already"),
    ):
        assert main(["evaluate", adapter, *options, "--out", str(folder / "none")]) == 2
        assert text in capsys.readouterr().err, options


def test_fields_of_conversations_are_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = document(folder)
    for data, text in (
        ({"messages": "talk", "prompt": "{a}"}, "messages = 'talk': stands in place of prompt and completion"),
        ({"messages": "{talk}"}, "messages = '{talk}': must be the name of a column, without braces"),
        ({"messages": "talks"}, "talks.jsonl has no column 'talks' (did you mean 'talk'?); it has talk"),
        ({"messages": "talk", "chat": True}, "data.chat: `messages` are a chat already"),
        ({}, "data.prompt, data.completion: give both, or `messages`"),
    ):
        given["data"] = {"train": str(folder / "talks.jsonl"), "eval_share": 0.4, **data}
        assert main(["validate", str(write(folder, given))]) == 2
        assert text in capsys.readouterr().err
