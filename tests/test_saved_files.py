"""Files that earlier releases have saved: they load bit for bit, compute what they computed, and are saved the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.saved_files.make import KINDS, base

FOLDER = Path(__file__).parent / "saved_files"
OF_THE_RUN = {"peft_version", "inference_mode", "base_model_name_or_path"}  # of peft and of the call
VERSIONS = sorted(path.name for path in FOLDER.iterdir() if (path / "base.safetensors").is_file())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_of_an_earlier_release(version: str, kind: str, tmp_path: Path) -> None:
    weights = load_file(FOLDER / version / "base.safetensors")
    ids = weights.pop("input_ids")
    model = base()
    model.load_state_dict(weights)
    saved = FOLDER / version / kind
    loaded = PeftModel.from_pretrained(model, saved).eval()
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits
    expected = load_file(saved / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(base_logits(loaded, ids), expected, rtol=1e-3), "the adapter does nothing"

    loaded.save_pretrained(tmp_path)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (saved, tmp_path))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
        assert after[key].dtype is tensor.dtype
    old, new = (json.loads((folder / "adapter_config.json").read_text()) for folder in (saved, tmp_path))
    assert_says_the_same(new, old)


def base_logits(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    with model.disable_adapter(), torch.no_grad():
        return model(input_ids=ids).logits


def assert_says_the_same(new: object, old: object, where: str = "") -> None:
    """Each field of the old config has its value in the new one, which may have more; names of modules in any order."""
    if isinstance(old, dict):
        assert isinstance(new, dict), where
        for name in old.keys() - OF_THE_RUN:
            assert_says_the_same(new[name], old[name], f"{where}.{name}")
    elif isinstance(old, list) and all(isinstance(item, dict) for item in old):
        assert isinstance(new, list), where
        for i, (now, before) in enumerate(zip(new, old, strict=True)):
            assert_says_the_same(now, before, f"{where}[{i}]")
    elif isinstance(old, list) and all(isinstance(item, str) for item in old):
        assert isinstance(new, list), where
        assert sorted(new) == sorted(old), where
    else:
        assert new == old, where
