"""An exported adapter in the runtimes themselves, against transformers with the adapter as it was trained.

    python benchmarks/runtimes.py CHECKPOINT --gguf BASE.gguf [--runtimes llama.cpp mlx] [--prompts 50] [--out FOLDER]

CHECKPOINT is SmolLM2-135M-Instruct's folder (examples/smollm2.py makes it of BASE.gguf, so that both hold the same
numbers). Adapters: PT3 at W_down; PT2 with one mask a task at W_O and PT3 at W_down, of uneven ranks; each moved from
its start at random. For each the largest and the mean difference of the logits over all tokens of the prompts, beside
the same for the base without an adapter, which is what the runtime's own arithmetic (quantised activations, another
order of sums) makes; the adapter's effect; and how many of ten greedy texts of 24 tokens are the same. Needs the
packages llama-cpp-python, mlx and mlx-lm, as far as they are named. Rows are added to benchmarks/results/runtimes.csv.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from results_table import ROOT, ResultsTable, add_output
from transformers import AutoModelForCausalLM, AutoTokenizer

from bem_peft import CompositeConfig, DynamicRankMaskConfig, KroneckerConfig, export_lora

COLUMNS = (
    "runtime", "version", "adapter", "prompts", "tokens", "base_mean", "base_largest", "mean", "largest", "effect_mean",
    "effect_largest", "same_texts", "same_texts_base",
)  # fmt: skip
NEW_TOKENS, TEXTS = 24, 10
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
}
Runtime = Callable[[Path | None], tuple[Callable[[list[int]], torch.Tensor], Callable[[list[int]], list[int]]]]


def greedy(logits_of: Callable[[list[int]], torch.Tensor], ids: list[int]) -> list[int]:
    found = list(ids)
    for _ in range(NEW_TOKENS):
        found.append(int(logits_of(found)[-1].argmax()))
    return found[len(ids) :]


def llama_cpp(gguf: Path) -> Runtime:
    from llama_cpp import Llama

    def load(adapter: Path | None) -> Any:
        path = None if adapter is None else str(adapter / "adapter.gguf")
        model = Llama(
            str(gguf), lora_path=path, logits_all=True, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False
        )

        def logits_of(ids: list[int]) -> torch.Tensor:
            model.reset()
            model.eval(ids)
            return torch.tensor(model.scores[: len(ids)])

        return logits_of, lambda ids: greedy(logits_of, ids)

    return load


def mlx(checkpoint: Path, work: Path) -> Runtime:
    import mlx.core as mx
    from mlx_lm import load as load_mlx

    folder = work / "mlx-base"  # mlx_lm 0.32 reads the rotary base where transformers 4 wrote it
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))

    def load(adapter: Path | None) -> Any:
        model, _ = load_mlx(str(folder), adapter_path=None if adapter is None else str(adapter))
        model.set_dtype(mx.float32)

        def logits_of(ids: list[int]) -> torch.Tensor:
            return torch.tensor(memoryview(model(mx.array([ids])))).squeeze(0)

        return logits_of, lambda ids: greedy(logits_of, ids)

    return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--runtimes", nargs="+", choices=["llama.cpp", "mlx"], default=["llama.cpp", "mlx"])
    parser.add_argument("--prompts", type=int, default=50)
    add_output(parser)
    args = parser.parse_args()
    if "llama.cpp" in args.runtimes and args.gguf is None:
        parser.error("llama.cpp wants --gguf BASE.gguf")
    table = ResultsTable(args.out, "runtimes.csv", COLUMNS)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    prompts = [tokenizer(f"Archaic: {text}\nModern:").input_ids for text in texts(args.prompts)]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for adapter, config in ADAPTERS.items():
            model: Any = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
            torch.manual_seed(0)
            model = get_peft_model(model, config()).eval()
            with torch.no_grad():
                for parameter in (p for p in model.parameters() if p.requires_grad):
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)

            def ours(ids: list[int], model: Any = model) -> torch.Tensor:
                with torch.no_grad():
                    return model(input_ids=torch.tensor([ids])).logits[0]

            with model.disable_adapter():
                base = [ours(ids) for ids in prompts]
                base_texts = [greedy(ours, ids) for ids in prompts[:TEXTS]]
            adapted, adapted_texts = [ours(ids) for ids in prompts], [greedy(ours, ids) for ids in prompts[:TEXTS]]
            effect = differences(adapted, base)
            for runtime in args.runtimes:
                file_format = {"llama.cpp": "gguf", "mlx": "mlx"}[runtime]
                folder = work / f"{adapter}-{file_format}"
                export_lora(model, folder, format=file_format)
                load = llama_cpp(args.gguf) if runtime == "llama.cpp" else mlx(args.checkpoint, work / adapter)
                found = {}
                for what, path, expected, texts_ in (
                    ("base", None, base, base_texts), ("adapter", folder, adapted, adapted_texts),
                ):  # fmt: skip
                    logits_of, text_of = load(path)
                    same = sum(text_of(ids) == text for ids, text in zip(prompts[:TEXTS], texts_, strict=True))
                    found[what] = (*differences([logits_of(ids) for ids in prompts], expected), same)
                package = {"llama.cpp": "llama-cpp-python", "mlx": "mlx-lm"}[runtime]
                base_file = f", {args.gguf.stem}" if runtime == "llama.cpp" else ""
                values = (
                    f"{runtime}{base_file}", f"{package} {version(package)}", adapter, len(prompts),
                    sum(map(len, prompts)),
                    *(f"{v:.2e}" for v in (*found["base"][:2], *found["adapter"][:2], *effect)), found["adapter"][2],
                    found["base"][2],
                )  # fmt: skip
                print(dict(zip(COLUMNS, values, strict=True)), flush=True)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
    table.append(rows)


def texts(count: int) -> list[str]:
    import gzip

    with gzip.open(ROOT / "examples/data/archaic_modern.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["archaic"] for line, _ in zip(file, range(count), strict=False)]


def differences(a: list[torch.Tensor], b: list[torch.Tensor]) -> tuple[float, float]:
    """The mean and the largest difference of a logit."""
    each = [(x - y).abs() for x, y in zip(a, b, strict=True)]
    return float(torch.cat([e.flatten() for e in each]).mean()), float(max(e.max() for e in each))


if __name__ == "__main__":
    main()
