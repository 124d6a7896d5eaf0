"""Every Python block of the README and of docs/ runs, page by page, in order, in one namespace a page.

A hub's name is a folder here: the working folder holds small random models under the very names that the pages load.
Trainings take two steps. Pages of docs/methods are run by test_docs.py, with more asked of them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from bem_peft import use_kernels
from bem_peft_cli.main import main
from tests.hub_server import hub_server

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
# page -> why its blocks are not run here
NOT_RUN: dict[str, str] = {
    "CONTRIBUTING.md": "a method of its own file: tests/contract/test_new_method.py runs it against the contract",
}
# run by tests of their own below
OTHERWISE = {"docs/recipes/hub.md", "docs/start.md"}
# the widths of SmolLM2-135M, so that what is matched on a page has a match here
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 512, "eos_token_id": 256, "bos_token_id": 256,
}  # fmt: skip
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def pages() -> list[str]:
    """Of all Markdown files that have Python blocks, but those of docs/methods."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {str(page.relative_to(ROOT)) for page in found if BLOCK.search(page.read_text(encoding="utf-8"))}
    return sorted(name for name in named if not name.startswith("docs/methods/"))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    read = ["input_ids", "attention_mask"]  # transformers 4 adds token_type_ids
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", model_input_names=read
    )
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the models that the pages load stand under their names."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub")
    t5 = {"vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "intermediate_size": 128}
    experts |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    built = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "demo_run/SmolLM2-135M-Instruct": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "mistralai/Mixtral-8x7B-v0.1": MixtralForCausalLM(MixtralConfig(**{**SIZES, **experts})),
        "google-t5/t5-small": T5ForConditionalGeneration(
            T5Config(**t5, decoder_start_token_id=257, eos_token_id=256, pad_token_id=257)
        ),
    }
    tokenizer = byte_tokenizer()
    for name, model in built.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    return folder


def run_blocks(page: str, folder: Path) -> dict[str, Any]:
    """The names that the page's blocks leave."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    text = (ROOT / page).read_text(encoding="utf-8")
    with contextlib.chdir(folder):
        for found in BLOCK.finditer(text):
            code = re.sub(r"max_steps=\d+", "max_steps=2", found[1])
            first_line = text[: found.start(1)].count("\n")
            exec(compile("\n" * first_line + code, str(ROOT / page), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", [page for page in pages() if page not in {*NOT_RUN, *OTHERWISE}])
@pytest.mark.filterwarnings("ignore", "error:::bem_peft", "error:::__main__")
def test_the_blocks_of_a_page_run(page: str, hub: Path) -> None:
    try:
        assert run_blocks(page, hub)
    finally:
        use_kernels("torch")


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_of_the_hubs_page_run_against_a_server(hub: Path, tmp_path: Path) -> None:
    """In a process of its own: where the Hub is, is read once."""
    import subprocess

    code = "\n".join(BLOCK.findall((ROOT / "docs/recipes/hub.md").read_text(encoding="utf-8")))
    code = code.replace("user/name", "tester/name")
    with hub_server() as (endpoint, server):
        environment = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_" + "x" * 20,
            "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, cwd=hub, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "import bem_peft" in server.repositories["tester/name"]["README.md"].decode()


@pytest.mark.filterwarnings("ignore", "error:::bem_peft")
def test_start_here_runs_to_its_end(hub: Path) -> None:
    """Its blocks, and its evaluation on the command line of the adapter that they have saved."""
    page = "docs/start.md"
    run_blocks(page, hub)
    line = re.search(r"^bem-peft evaluate (?:.*\\\n)*.*$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None
    arguments = shlex.split(line[0].replace("\\\n", " "))[1:]
    items = arguments.index("--items") + 1
    with contextlib.chdir(hub):
        assert main([*arguments[:items], "4", *arguments[items + 1 :]]) == 0
        assert len(Path("results/pt3/seed-0/items.jsonl").read_text().splitlines()) == 4


def test_every_page_that_is_not_run_says_why_and_exists() -> None:
    assert {*NOT_RUN, *OTHERWISE} <= set(pages())
    assert all(reason.strip() for reason in NOT_RUN.values())


def test_a_block_that_breaks_is_named_with_its_line(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.md").write_text("# Broken\n\n```python\nx = 1\nx.no_such_field\n```\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(AttributeError, match="no_such_field") as caught:
        run_blocks("broken.md", hub)
    assert caught.traceback[-1].lineno + 1 == 5
