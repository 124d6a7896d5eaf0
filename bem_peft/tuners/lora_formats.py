r"""The files that runtimes read a LoRA from: PEFT's own, llama.cpp's GGUF, MLX-LM's.

PEFT's holds any ranks. GGUF and MLX-LM scale all sites by one number over one rank, so their files want one rank
everywhere (zeros fill it up). All hold s B K with a scale of 1.

Source: convert_lora_to_gguf.py of llama.cpp (names and shapes of the tensors, `adapter.lora.alpha`); `load_adapters`
and `linear_to_lora_layers` of mlx_lm.tuner.utils, 0.32.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

FORMATS = ("peft", "gguf", "mlx")
BLOCK = re.compile(r"(.*?\.\d+)\.(.*)")  # a module's block, and its name there
PEFT_PREFIX = "base_model.model."
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes; its default is 16
# model types whose W_O and W_down llama.cpp keeps as they are, and its name for them
GGUF_ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "granite": "granite", "starcoder2": "starcoder2",
}  # fmt: skip


@dataclass(frozen=True)
class LoraTensors:
    """What is written: for each module A (r, in) and B (out, r); of fused experts A (E r, in) and B (out, r E)."""

    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ranks: Mapping[str, int]
    parameters: Mapping[str, str]  # module of fused experts -> the name of its W_down
    fan_in_fan_out: bool
    task_type: Any
    base_name: str | None
    model_config: Any  # the base model's

    @property
    def rank(self) -> int:
        return max(self.ranks.values())

    def check(self, file_format: str) -> None:
        """Raise ValueError where `file_format` cannot hold this."""
        if file_format == "peft":
            return
        if self.parameters:
            raise ValueError(
                f"`format` = {file_format!r}: {next(iter(self.parameters))} holds fused experts, whose LoRA is not "
                "written in this format: use format='peft', or merge."
            )
        if len(set(self.ranks.values())) > 1:
            raise ValueError(f"`format` = {file_format!r} has one rank for all sites: leave uniform_rank=True.")
        if getattr(self.model_config, "is_encoder_decoder", False):
            raise ValueError(f"`format` = {file_format!r}: the runtime has no encoder-decoders: use format='peft'.")
        if file_format == "gguf":
            self.gguf_names()
        unplaced = [name for name in self.factors if BLOCK.fullmatch(name) is None]
        if file_format == "mlx" and unplaced:
            raise ValueError(f"`format` = 'mlx': {unplaced[0]} stands in no numbered block.")

    def gguf_names(self) -> tuple[str, dict[str, str]]:
        """llama.cpp's architecture, and its name of each module.

        Raises:
            ImportError: the package gguf is not there.
            ValueError: the model type is not in `GGUF_ARCHITECTURES`, or a module has no name there.
        """
        model_type = str(getattr(self.model_config, "model_type", None))
        if model_type not in GGUF_ARCHITECTURES:
            raise ValueError(
                f"`format` = 'gguf': of {model_type!r} it is not known here how llama.cpp lays W_O and W_down out: use "
                "format='peft' and llama.cpp's convert_lora_to_gguf.py."
            )
        try:
            import gguf
        except ImportError as error:
            raise ImportError("format='gguf' is written by the package gguf: pip install gguf") from error
        architecture = GGUF_ARCHITECTURES[model_type]
        kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        known = gguf.get_tensor_name_map(kind, self.blocks)
        names = {name: known.get_name(name) for name in self.factors}
        missing = [name for name, found in names.items() if found is None]
        if missing:
            raise ValueError(f"`format` = 'gguf': llama.cpp's {architecture} has no tensor for {missing[0]}.")
        return architecture, {name: str(found) for name, found in names.items()}

    @property
    def blocks(self) -> int:
        return int(self.model_config.get_text_config().num_hidden_layers)


def write(lora: LoraTensors, folder: Path, file_format: str) -> None:
    """Write the file, and the config beside it. Call `lora.check` first."""
    folder.mkdir(parents=True, exist_ok=True)
    {"peft": _write_peft, "gguf": _write_gguf, "mlx": _write_mlx}[file_format](lora, folder)


def _write_peft(lora: LoraTensors, folder: Path) -> None:
    rank = lora.rank
    whole = {name: f"{name}.{lora.parameters[name]}" if name in lora.parameters else name for name in lora.ranks}
    uneven = {whole[name].replace(".", r"\."): r for name, r in lora.ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=uneven,
        alpha_pattern=dict(uneven),
        target_modules=sorted(set(lora.ranks) - set(lora.parameters)),
        target_parameters=sorted(whole[name] for name in lora.parameters) or None,
        task_type=lora.task_type,
        base_model_name_or_path=lora.base_name,
        inference_mode=True,
        fan_in_fan_out=lora.fan_in_fan_out,
    )
    tensors = {}
    for name, (a, b) in lora.factors.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = a.contiguous().cpu()
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = b.contiguous().cpu()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(os.fspath(folder))
    card = folder / "README.md"
    if not card.exists():
        card.write_text(_card(lora), encoding="utf-8")


def _card(lora: LoraTensors) -> str:
    """A model card; the Hub wants the base's id in it."""
    base = lora.base_name or "the base model"
    names = f"base_model: {json.dumps(lora.base_name)}\n" if lora.base_name else ""
    return (
        f"---\n{names}library_name: peft\ntags:\n- lora\n---\n\n"
        f"A LoRA of `{base}`, which bem_peft wrote from an adapter of its own. PEFT loads it as any LoRA:\n\n"
        "```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, "
        '"PATH_OR_ID_OF_THIS_ADAPTER")\n```\n'
    )


def _write_gguf(lora: LoraTensors, folder: Path) -> None:
    """adapter.gguf, in float32."""
    import gguf

    architecture, names = lora.gguf_names()
    writer = gguf.GGUFWriter(folder / "adapter.gguf", architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.rank))
    for name, (a, b) in lora.factors.items():
        writer.add_tensor(f"{names[name]}.weight.lora_a", a.float().contiguous().cpu().numpy())
        writer.add_tensor(f"{names[name]}.weight.lora_b", b.float().contiguous().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_mlx(lora: LoraTensors, folder: Path) -> None:
    """adapters.safetensors and adapter_config.json; lora_a is (in, r), lora_b (r, out)."""
    keys = sorted({BLOCK.sub(r"\2", name) for name in lora.factors})
    tensors = {}
    for name, (a, b) in lora.factors.items():
        tensors[f"{name}.lora_a"] = a.t().float().contiguous().cpu()
        tensors[f"{name}.lora_b"] = b.t().float().contiguous().cpu()
    parameters = {"rank": lora.rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": lora.blocks, "lora_parameters": parameters}
    if lora.base_name is not None:
        config["model"] = lora.base_name
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def lowest_rank(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A (..., r, in) and B (..., out, r) of the same product with the fewest ranks, at least one.

    Singular values below 1e-6 of the largest, float32's rounding of the factors, count as none.
    """
    (q_b, r_b), (q_a, r_a) = (torch.linalg.qr(factor.double()) for factor in (b, a.mT))
    u, sigma, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    rank = max(1, int((sigma > 1e-6 * sigma.amax(-1, keepdim=True)).sum(-1).max()))
    lower_a = v[..., :rank, :] @ q_a.mT
    lower_b = (q_b @ u[..., :rank]) * sigma[..., None, :rank]
    return lower_a.to(a.dtype), lower_b.to(b.dtype)


def runtime_flags(rank: int, file_format: str) -> dict[str, str]:
    """Runtime -> what it has to be told to take a LoRA of this rank."""
    if file_format == "gguf":
        return {"llama.cpp": "--lora adapter.gguf"}
    if file_format == "mlx":
        return {"mlx_lm": "--adapter-path FOLDER"}
    fitting = [allowed for allowed in VLLM_RANKS if allowed >= rank]
    vllm = f"--enable-lora --max-lora-rank {fitting[0]}" if fitting else f"none takes rank {rank}: merge instead"
    return {
        "vLLM": f"{vllm} --lora-modules NAME=FOLDER" if fitting else vllm,
        "SGLang": f"--enable-lora --max-lora-rank {rank} --lora-paths NAME=FOLDER",
        "llama.cpp": "convert_lora_to_gguf.py FOLDER, then --lora FILE (or format='gguf')",
    }
