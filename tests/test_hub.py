"""A run and its report go to the Hub: what is there afterwards, and what is refused before anything is sent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model

from bem_peft import KroneckerConfig, push_run
from tests.hub_server import Hub, hub_server
from tests.tiny_models import build

ROOT = Path(__file__).parents[1]


def finished_run(folder: Path, seeds: tuple[int, ...] = (0, 1), base: str = "someone/base") -> Path:
    """What `bem-peft run` leaves, as far as it is read here; what a Trainer leaves beside it."""
    for seed in seeds:
        out = folder / f"seed-{seed}"
        model = get_peft_model(build("llama"), KroneckerConfig(u_rank=2, v_rank=2, task_type="CAUSAL_LM"))
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(out / "adapter", save_embedding_layers=False)
        (out / "adapter/training_args.bin").write_bytes(b"pickled")
        (out / "result.json").write_text(json.dumps({"seed": seed}))
        (out / "items.jsonl").write_text('{"text": "of the data"}\n')
        (out / "checkpoints/checkpoint-3").mkdir(parents=True)
        (out / "checkpoints/checkpoint-3/optimizer.pt").write_bytes(b"pickled")
    (folder / "seed-9").mkdir()  # not finished
    return folder


def pushed(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Hub]:
    settings = {
        "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_" + "x" * 20, "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    with hub_server() as (endpoint, hub):
        command = [sys.executable, "-m", "bem_peft_cli.main", "push", *arguments]
        done = subprocess.run(
            command,
            env={**os.environ, **settings, "HF_ENDPOINT": endpoint},
            capture_output=True,
            text=True,
            check=False,
        )
    return done, hub


def test_a_run_and_its_report_go_to_the_hub(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", base=str(tmp_path))
    report = tmp_path / "report"
    report.mkdir()
    for name in ("report.html", "report.json", "report.md", "notes.txt"):
        (report / name).write_text(f"{name} of {tmp_path}")
    done, hub = pushed(
        tmp_path, str(run), "tester/pt3", "--seed", "1", "--report", str(report), "--base", "someone/base", "--license",
        "apache-2.0", "--private",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "/tester/pt3/commit/" in done.stdout
    files = hub.repositories["tester/pt3"]
    assert set(files) == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "results/seed-0/result.json",
        "results/seed-1/result.json", "report/report.html", "report/report.json", "report/report.md",
    }  # fmt: skip
    assert hub.private == {"tester/pt3": True}
    assert files["adapter_model.safetensors"] == (run / "seed-1/adapter/adapter_model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "someone/base")
    assert card.text.lstrip().startswith("## Loading this adapter")
    texts = {name: data.decode() for name, data in files.items() if not name.endswith(".safetensors")}
    assert [name for name, text in texts.items() if str(tmp_path) in text] == []
    assert texts["report/report.md"] == "report.md of someone/base"
    assert 'PeftModel.from_pretrained(model, "tester/pt3")' in card.text
    assert (
        "`results/`: what was measured, and with which settings, for 2 seeds\n- `report/`: the comparison" in card.text
    )
    assert str(tmp_path) in (run / "seed-1/adapter/adapter_config.json").read_text(), "the run itself stays as it was"
    loaded = tmp_path / "loaded"
    loaded.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (loaded / name).write_bytes(files[name])
    PeftModel.from_pretrained(build("llama"), loaded)


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"has the finished seeds \[0, 1\]; name one"):
        push_run(run, "tester/x")
    with pytest.raises(ValueError, match=r"`seed` = 9"):
        push_run(run, "tester/x", seed=9)
    with pytest.raises(ValueError, match="the finished seeds none"):
        push_run(tmp_path, "tester/x")
    with pytest.raises(ValueError, match=r"no report\.json there"):
        push_run(run, "tester/x", seed=0, report=tmp_path)
    (run / "seed-0/adapter/adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks adapter_model\.safetensors"):
        push_run(run, "tester/x", seed=0)
    where = tmp_path / "prepared"
    done, hub = pushed(tmp_path, str(finished_run(tmp_path / "dry", (0,))), "tester/x", "--dry-run", str(where))
    assert (done.returncode, done.stdout) == (0, f"not pushed: {where}\n")
    assert sorted(path.name for path in where.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "results",
    ]  # fmt: skip
    assert hub.requests == []
    done, hub = pushed(tmp_path, str(finished_run(tmp_path / "local", (0,), str(tmp_path))), "tester/x")
    assert done.returncode == 2
    assert "a folder of this machine: give `base`" in done.stderr
    assert hub.requests == []
