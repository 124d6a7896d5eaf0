"""`bem-peft trl`: the lines of docs/recipes/front_ends.md run TRL's own scripts on a small random model, and what would
do nothing is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import trl
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bem_peft.tuners.adapter_spec import parse_adapter
from bem_peft_cli import trl_scripts
from bem_peft_cli.main import main
from tests.test_docs_blocks import byte_tokenizer
from tests.tiny_models import llama

PAGE = Path(__file__).parents[1] / "docs/recipes/front_ends.md"
SMALL = "--max_steps 2 --use_cpu --bf16 false --report_to none --save_strategy no --per_device_train_batch_size 4"
ASK = [{"role": "user", "content": "Whence?"}]
TELL = [{"role": "assistant", "content": "Hence."}]
OTHER = [{"role": "assistant", "content": "No."}]
# the data sets of the page, each a folder here
ROWS: dict[str, dict[str, Any]] = {
    "trl-lib/Capybara": {"messages": ASK + TELL},
    "trl-lib/ultrafeedback_binarized": {"chosen": ASK + TELL, "rejected": ASK + OTHER},
    "trl-lib/ultrafeedback-prompt": {"prompt": ASK},
    "trl-lib/kto-mix-14k": {"prompt": ASK, "completion": TELL, "label": True},
}
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

# what other packages say of each other
pytestmark = pytest.mark.filterwarnings("ignore", "error:::bem_peft", "error:::bem_peft_cli")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the model, the data and the reward of the page stand under their names."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("front_ends")
    sizes = {"hidden_size": 64, "intermediate_size": 144, "max_position_embeddings": 512}
    llama(vocab_size=320, eos_token_id=256, bos_token_id=256, pad_token_id=257, **sizes).save_pretrained(root / NAME)
    byte_tokenizer().save_pretrained(root / NAME)
    for name, row in ROWS.items():
        (root / name).mkdir(parents=True)
        (root / name / "train.jsonl").write_text((json.dumps(row) + "\n") * 8)
    reward = re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert reward is not None
    (root / "rewards.py").write_text(reward[1])
    return root


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))  # TRL puts the working folder there
    monkeypatch.setattr(sys, "argv", ["bem-peft"])  # TRL looks for a file of arguments beside it
    return folder


def of_the_page() -> list[list[str]]:
    text = PAGE.read_text(encoding="utf-8")
    lines = re.findall(r"^bem-peft (trl (?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line.replace("\\\n", " ")) for line in lines]


def test_the_page_has_a_line_of_each_script() -> None:
    assert [line[1] for line in of_the_page()] == list(trl_scripts.SCRIPTS)


@pytest.mark.parametrize("line", of_the_page(), ids=lambda line: line[1])
def test_a_line_of_the_page_trains_the_adapter_that_it_names(line: list[str], inside: Path) -> None:
    before = trl.get_peft_config
    assert main([*line, *SMALL.split()]) == 0
    assert trl.get_peft_config is before
    said, out = parse_adapter(line[line.index("--adapter") + 1]), inside / line[line.index("--output_dir") + 1]
    saved = PeftConfig.from_pretrained(out)
    assert type(saved) is type(said)
    assert (saved.modules_to_save is not None) == (line[1] == "reward")  # the head, by PEFT
    said.modules_to_save = saved.modules_to_save
    for field in dataclasses.fields(said):
        if field.name not in ("task_type", "inference_mode", "target_modules", "base_model_name_or_path"):
            assert field.name.startswith("peft_") or getattr(saved, field.name) == getattr(said, field.name)
    base_model = (
        AutoModelForSequenceClassification.from_pretrained(inside / NAME, num_labels=1)
        if line[1] == "reward"
        else AutoModelForCausalLM.from_pretrained(inside / NAME)
    )
    loaded = PeftModel.from_pretrained(base_model, out)
    auto_class = "AutoModelForSequenceClassification" if line[1] == "reward" else "AutoModelForCausalLM"
    assert f"import {auto_class}\n" in (out / "README.md").read_text()
    assert loaded.active_peft_config.peft_type == said.peft_type
    tokens = torch.tensor([list(range(3, 40))])
    with torch.no_grad(), loaded.disable_adapter():
        base = loaded(tokens).logits
    with torch.no_grad():
        assert not torch.equal(loaded(tokens).logits, base)


def test_the_script_trains_as_the_trainer_with_the_config(inside: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    line = next(line for line in of_the_page() if line[1] == "sft")
    assert main([*line, *SMALL.split(), "--output_dir", str(tmp_path / "script")]) == 0
    arguments = trl.SFTConfig(
        str(tmp_path / "trainer"), learning_rate=8e-3, max_steps=2, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no", per_device_train_batch_size=4, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    data = load_dataset("trl-lib/Capybara", split="train")
    config = parse_adapter("kronecker:u_rank=4,v_rank=7,task_type=CAUSAL_LM")
    trainer = trl.SFTTrainer(NAME, args=arguments, train_dataset=data, peft_config=config)
    trainer.train()
    trainer.save_model(str(tmp_path / "trainer"))
    script, direct = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("script", "trainer"))
    assert script.keys() == direct.keys()
    assert all(torch.equal(script[key], direct[key]) for key in script)


def refusal(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a run ends in."""
    with contextlib.suppress(SystemExit):
        assert main(["trl", *arguments.split()]) == 2
    return capsys.readouterr().err.splitlines()[-1]


TRAIN = f"--model_name_or_path {NAME} --dataset_name trl-lib/Capybara --output_dir refused --bf16 false --use_cpu"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("sft --adapter kronecker:u_rak=4", "'u_rak': write field=value with a field of KroneckerConfig; did you mean"),
        ("sft --adapter kroneker", "no method and no folder of that name; did you mean 'kronecker'"),
        ("sft --adapter kronecker --use_peft", "--use_peft tells of a LoRA and would do nothing"),
        ("sft --adapter kronecker --use-peft", "--use_peft tells of a LoRA and would do nothing"),
        ("dpo --adapter kronecker --lora_r 16", "--lora_r tells of a LoRA and would do nothing"),  # TRL's default
        ("grpo --adapter kronecker --lora_target_modules q_proj", "--lora_target_modules tells of a LoRA"),
        ("sft --adapter kronecker --use_do", "--use_dora tells of a LoRA"),  # argparse takes beginnings
        ("sft --adapter kronecker --config lora.yaml", "--lora_alpha tells of a LoRA"),
        ("sft --adapter kronecker --config launch.yaml", "--num_processes 2: TRL's sft has no such argument"),
        ("sft --adapter kronecker --max_stps 2", "--max_stps 2: TRL's sft has no such argument"),
    ],
)
def test_what_would_do_nothing_is_refused(
    arguments: str, said: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (inside / "lora.yaml").write_text("lora_alpha: 32\n")
    (inside / "launch.yaml").write_text("num_processes: 2\n")
    text = refusal(f"{arguments} {TRAIN}", capsys)
    assert text.startswith("bem-peft: ")
    assert said in text
    assert not (inside / "refused").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("ppo --adapter kronecker", "invalid choice: 'ppo' (choose from"),
        ("sft", "the following arguments are required: --adapter"),
    ],
)
def test_a_line_that_is_none_ends_as_other_usage_errors(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trl", *arguments.split()])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_other_commands_take_nothing_that_they_do_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["validate", "x.yaml", "--max_steps", "2"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "bem-peft: error: unrecognized arguments: --max_steps 2"


def test_the_arguments_that_are_refused_are_those_that_trl_makes_its_lora_of() -> None:
    read: set[str] = set()

    class Recorded(trl.ModelConfig):
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("_"):
                read.add(name)
            return super().__getattribute__(name)

    given = Recorded(use_peft=True, lora_target_parameters=["experts.down_proj"])
    read.clear()
    trl.get_peft_config(given)
    assert read == {field.name for field in dataclasses.fields(trl.ModelConfig) if trl_scripts.of_lora(field.name)}


@pytest.mark.parametrize(
    ("rate", "is_said"), [("", True), ("--learning_rate 2e-5", True), ("--learning_rate 1e-3", False)]
)
def test_trls_default_rate_is_spoken_of_and_kept(
    rate: str, is_said: bool, inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trl.scripts import sft

    rates = []
    monkeypatch.setattr(trl_scripts, "config_in_place", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(sft, "main", lambda _, training, *others: rates.append(training.learning_rate))
    assert main(["trl", "sft", "--adapter", "film", *rate.split(), *TRAIN.split()]) == 0
    assert rates == [1e-3 if not is_said else 2e-5]
    assert ("learning_rate is 2e-05, TRL's default, far below the 8e-3" in capsys.readouterr().err) is is_said


def test_the_config_of_a_folder_is_taken_to_be_trained(inside: Path, tmp_path: Path) -> None:
    parse_adapter("kronecker:u_rank=2,v_rank=3").save_pretrained(tmp_path / "saved")
    changed = json.loads((tmp_path / "saved/adapter_config.json").read_text()) | {"inference_mode": True}
    (tmp_path / "saved/adapter_config.json").write_text(json.dumps(changed))
    line = ["trl", "sft", "--adapter", str(tmp_path / "saved"), *TRAIN.split(), *SMALL.split()]
    assert main([*line, "--learning_rate", "8e-3", "--output_dir", str(tmp_path / "out")]) == 0
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {2, 3} <= {size for weight in weights.values() for size in weight.shape}


def script_of(*lines: str) -> ModuleType:
    module = ModuleType("trl.scripts.other")
    exec("\n".join(lines), module.__dict__)
    return module


def test_a_script_that_asks_for_no_config_is_not_run() -> None:
    script = script_of("def main(): pass")
    with (
        pytest.raises(ValueError, match="does not call get_peft_config: no config can be given"),
        trl_scripts.config_in_place(script, parse_adapter("film")),
    ):
        raise AssertionError("was opened")


def test_a_script_that_imports_at_its_top_gets_the_config_and_trl_keeps_its_own() -> None:
    before = trl.get_peft_config
    config = parse_adapter("film")
    script = script_of("from trl import get_peft_config", "def main(args): return get_peft_config(args)")
    with trl_scripts.config_in_place(script, config):
        assert script.main(None) is config
        assert trl.get_peft_config is before
    assert script.get_peft_config is before


def test_a_script_that_fails_leaves_trl_as_it_was() -> None:
    before = trl.get_peft_config
    script = script_of(
        "def main(args):", "    from trl import get_peft_config", "    raise KeyError(get_peft_config(args))"
    )
    config = parse_adapter("film")
    with pytest.raises(KeyError) as failed, trl_scripts.config_in_place(script, config):
        script.main(None)
    assert failed.value.args == (config,)
    assert trl.get_peft_config is before
