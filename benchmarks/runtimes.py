"""An exported or merged adapter in the runtimes themselves, against transformers with the adapter as it was trained.

    python benchmarks/runtimes.py CHECKPOINT [--converter convert_hf_to_gguf.py] [--gguf BASE.gguf] [--mlx]
                                  [--prompts 50] [--out FOLDER]

CHECKPOINT is SmolLM2-135M-Instruct's folder, which examples/smollm2.py makes of the packaged GGUF. Adapters, each moved
from its start at random: PT3 at W_down; PT2 with one mask a task at W_O and PT3 at W_down, of uneven ranks; static PT4,
which is no LoRA. Runtimes:

- `--converter`, llama.cpp's own script (the source package of llama-cpp-python has it under vendor/): CHECKPOINT as a
  float32 GGUF with the adapter as a GGUF LoRA, and the merged checkpoint as a GGUF of its own;
- `--gguf`: a quantised base with the adapter as a GGUF LoRA (the packaged one differs from CHECKPOINT by bfloat16's
  rounding too);
- `--mlx`: MLX-LM with CHECKPOINT and the adapter in its layout.

For each, over all tokens of the prompts: the mean and the largest difference of a logit and the mean KL divergence of
the next token, beside the same for the base without an adapter, which is what the runtime's own arithmetic (quantised
weights and activations, a key-value cache in 16 bits, another order of sums) makes; the adapter's effect; and how many
of five greedy texts of 12 tokens are the same. Needs the packages llama-cpp-python, gguf, mlx and mlx-lm, as far as
they are named. Rows are added to benchmarks/results/runtimes.csv.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, get_peft_model
from results_table import ROOT, ResultsTable, add_output
from transformers import AutoModelForCausalLM, AutoTokenizer

from bem_peft import CompositeConfig, DynamicRankMaskConfig, KroneckerConfig, ResidualFiLMConfig, export_lora

COLUMNS = (
    "runtime", "version", "base", "adapter", "as", "prompts", "tokens", "base_mean", "base_largest", "base_kl", "mean",
    "largest", "kl", "effect_mean", "effect_largest", "effect_kl", "base_same_texts", "same_texts",
)  # fmt: skip
NEW_TOKENS, TEXTS = 12, 5
PT3 = {"u_dim": 16, "u_rank": 4, "v_rank": 7}
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "PT3": lambda: KroneckerConfig(**PT3, task_type="CAUSAL_LM"),
    "PT2 and PT3": lambda: CompositeConfig(
        [
            DynamicRankMaskConfig(
                mask_scope="task", value_gate=False, total_rank=8, active_rank=4, sites=["attention_output"]
            ),
            KroneckerConfig(**PT3),
        ],
        task_type="CAUSAL_LM",
    ),
    "PT4 static": lambda: ResidualFiLMConfig(mode="static", max_beta=0.0, task_type="CAUSAL_LM"),
}
NO_LORA = ("PT4 static",)
Ids = list[int]
Logits = Callable[[Ids], torch.Tensor]  # token ids -> (tokens, vocabulary)
Answers = tuple[list[torch.Tensor], list[Ids]]


def greedy(logits_of: Logits, ids: Ids) -> Ids:
    found = list(ids)
    for _ in range(NEW_TOKENS):
        found.append(int(logits_of(found)[-1].argmax()))
    return found[len(ids) :]


def llama_cpp(gguf: Path, lora: Path | None = None) -> Logits:
    from llama_cpp import Llama

    path = None if lora is None else str(lora / "adapter.gguf")
    model = Llama(str(gguf), lora_path=path, logits_all=True, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)

    def logits_of(ids: Ids) -> torch.Tensor:
        model.reset()
        model.eval(ids)
        return torch.tensor(model.scores[: len(ids)])

    return logits_of


def mlx_lm(folder: Path, lora: Path | None = None) -> Logits:
    import mlx.core as mx
    from mlx_lm import load

    model, _ = load(str(folder), adapter_path=None if lora is None else str(lora))
    model.set_dtype(mx.float32)
    return lambda ids: torch.from_numpy(np.array(model(mx.array([ids]))[0]))


def mlx_base(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as mlx_lm 0.32 reads it: with the rotary base where transformers 4 wrote it."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def converted(converter: Path, folder: Path, gguf: Path) -> Path:
    """A float32 GGUF of a folder of transformers, by llama.cpp's script."""
    command = [sys.executable, str(converter), str(folder), "--outfile", str(gguf), "--outtype", "f32"]
    subprocess.run(command, check=True, capture_output=True)
    return gguf


def runs(args: argparse.Namespace, adapter: str, model: Any, bases: dict[str, Path], work: Path) -> Iterator[tuple]:
    """(runtime, package, base, "LoRA" or "merged", what loads the base, what loads the adapted model)."""
    if adapter not in NO_LORA:
        for name, gguf in bases.items():
            as_gguf, as_mlx = work / f"{adapter} gguf", work / f"{adapter} mlx"
            if name == "mlx":
                export_lora(model, as_mlx, format="mlx")
                yield "MLX-LM", "mlx-lm", "checkpoint", "LoRA", mlx_lm, gguf, (gguf, as_mlx)
            else:
                export_lora(model, as_gguf, format="gguf")
                yield "llama.cpp", "llama-cpp-python", name, "LoRA", llama_cpp, gguf, (gguf, as_gguf)
    if args.converter is not None:
        folder = work / f"{adapter} merged"
        model.merge_and_unload().save_pretrained(folder)
        AutoTokenizer.from_pretrained(args.checkpoint).save_pretrained(folder)
        merged = converted(args.converter, folder, work / f"{adapter}.gguf")
        yield "llama.cpp", "llama-cpp-python", "F32", "merged", llama_cpp, bases["F32"], (merged,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--gguf", type=Path, help="a base in GGUF")
    parser.add_argument("--mlx", action="store_true")
    parser.add_argument("--prompts", type=int, default=50)
    add_output(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = ResultsTable(args.out, "runtimes.csv", COLUMNS)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    prompts = [tokenizer(f"Archaic: {text}\nModern:").input_ids for text in texts(args.prompts)]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        bases = {} if args.converter is None else {"F32": converted(args.converter, args.checkpoint, work / "f32.gguf")}
        if args.gguf is not None:
            bases[args.gguf.stem.rpartition(".")[2]] = args.gguf
        if args.mlx:
            bases["mlx"] = mlx_base(args.checkpoint, work / "mlx")
        found: dict[str, Answers] = {}  # of the base without an adapter
        for adapter, config in ADAPTERS.items():
            model = moved(args.checkpoint, config())
            with model.disable_adapter():
                found["transformers"] = found.get("transformers") or answers(logits_by(model), prompts)
            expected_base, expected = found["transformers"], answers(logits_by(model), prompts)
            for runtime, package, base, form, load, plain, changed in runs(args, adapter, model, bases, work):
                found[base] = found.get(base) or answers(load(plain), prompts)
                adapted = answers(load(*changed), prompts)
                values = (
                    runtime, f"{package} {version(package)}", base, adapter, form, len(prompts), sum(map(len, prompts)),
                    *differences(found[base][0], expected_base[0]), *differences(adapted[0], expected[0]),
                    *differences(expected[0], expected_base[0]), same(found[base][1], expected_base[1]),
                    same(adapted[1], expected[1]),
                )  # fmt: skip
                row = dict(zip(COLUMNS, values, strict=True))
                print(row, flush=True)
                table.append([row])


def moved(checkpoint: Path, config: PeftConfig) -> Any:
    """The checkpoint with an adapter that is no longer what it starts as."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), config).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def logits_by(model: Any) -> Logits:
    def logits_of(ids: Ids) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0]

    return logits_of


def answers(logits_of: Logits, prompts: list[Ids]) -> Answers:
    """The logits of all prompts, and the texts after the first ones."""
    return [logits_of(ids) for ids in prompts], [greedy(logits_of, ids) for ids in prompts[:TEXTS]]


def texts(count: int) -> list[str]:
    """The first verses of less than 60 characters."""
    with gzip.open(ROOT / "examples/data/archaic_modern.jsonl.gz", "rt", encoding="utf-8") as file:
        verses = [json.loads(line)["archaic"] for line in file]
    return [verse for verse in verses if len(verse) < 60][:count]


def differences(a: list[torch.Tensor], b: list[torch.Tensor]) -> tuple[str, str, str]:
    """Of a from b: the mean and the largest difference of a logit, and a token's mean KL divergence, from b to a."""
    x, y = torch.cat(a).double(), torch.cat(b).double()
    each = (x - y).abs()
    log_x, log_y = x.log_softmax(-1), y.log_softmax(-1)
    return f"{each.mean():.2e}", f"{each.max():.2e}", f"{(log_y.exp() * (log_y - log_x)).sum(-1).mean():.2e}"


def same(a: list[Ids], b: list[Ids]) -> str:
    return f"{sum(x == y for x, y in zip(a, b, strict=True))} of {len(a)}"


if __name__ == "__main__":
    main()
