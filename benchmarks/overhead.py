"""What each adapter adds to the base model's time, unmerged and eager, beside PEFT's LoRA of the same size and sites.

    python benchmarks/overhead.py [--checkpoint FOLDER] [--rounds 30] [--dtype float32 bfloat16] [--out FOLDER]

All variants share the base's weights. Each round times every variant once, in an order that changes from round to
round; a cell is the median over rounds of time / base's time of the same round, minus one, with its quartiles; beside
it the same ratio to LoRA's time. Run it alone on the machine. Nothing is reported if a fresh adapter does not give the
base's logits.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import bem_peft
from bem_peft import DynamicRankMaskConfig, HeadGroupGatingConfig, KroneckerConfig, ResidualFiLMConfig

W_O, W_DOWN = ["o_proj"], ["down_proj"]
# variant -> (config, the LoRA it stands beside)
VARIANTS: dict[str, tuple[Callable[[], object], str | None]] = {
    "LoRA W_O r=8": (lambda: LoraConfig(r=8, target_modules=W_O), None),
    "PT1 head gating": (lambda: HeadGroupGatingConfig(num_groups=3, rank_per_group=4), "LoRA W_O r=8"),
    "LoRA W_O+W_down r=8": (lambda: LoraConfig(r=8, target_modules=W_O + W_DOWN), None),
    "PT2 rank mask": (lambda: DynamicRankMaskConfig(total_rank=8, active_rank=4), "LoRA W_O+W_down r=8"),
    "LoRA W_down r=8": (lambda: LoraConfig(r=8, target_modules=W_DOWN), None),
    "PT3 Kronecker": (lambda: KroneckerConfig(u_rank=4, v_rank=7), "LoRA W_down r=8"),
    "PT4 FiLM": (lambda: ResidualFiLMConfig(gamma_dim=6, beta_dim=6), "LoRA W_O+W_down r=8"),
}
HEADER = (
    *("dtype", "phase", "base_ms", "variant", "parameters", "overhead", "quartile_1", "quartile_3"),
    *("beside", "time_ratio", "time_ratio_quartile_1", "time_ratio_quartile_3"),
)


def share_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules around the same parameters and buffers."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def build(checkpoint: str, dtype: torch.dtype, only: list[str] | None) -> dict[str, torch.nn.Module]:
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval().requires_grad_(False)
    ids = torch.arange(1, 65).unsqueeze(0)
    models = {"base": base}
    with torch.inference_mode():
        reference = base(ids).logits
    chosen = [name for name in VARIANTS if not only or any(part in name for part in only)]
    chosen += [beside for name in chosen if (beside := VARIANTS[name][1]) is not None]
    for name, (config, _) in VARIANTS.items():
        if name not in chosen:
            continue
        torch.manual_seed(0)
        model = get_peft_model(share_weights(base), config()).eval().requires_grad_(False)
        with torch.no_grad():
            if not torch.equal(model(ids).logits, reference):
                raise SystemExit(f"{name}: a fresh adapter does not give the base's logits; nothing is timed")
            for parameter_name, parameter in model.named_parameters():  # weights as after training: nothing is zero
                if "bem_" in parameter_name or "lora_" in parameter_name:
                    parameter.add_(torch.randn_like(parameter) * 0.01)
        models[name] = model
    return models


@torch.no_grad()
def prefill(model: torch.nn.Module, tokens: int) -> float:
    ids = torch.arange(tokens).unsqueeze(0) % 1000 + 1
    start = time.perf_counter()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - start


@torch.no_grad()
def decode(model: torch.nn.Module, steps: int) -> float:
    cache = model(input_ids=torch.arange(1, 17).unsqueeze(0), use_cache=True).past_key_values
    token = torch.tensor([[7]])
    start = time.perf_counter()
    for _ in range(steps):
        cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
    return (time.perf_counter() - start) / steps


def interleave(models: dict[str, torch.nn.Module], timed: Callable[[torch.nn.Module], float], rounds: int) -> dict:
    """seconds[variant][round]; one untimed round first."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    order, rng = list(models), random.Random(0)
    for i in range(rounds + 1):
        rng.shuffle(order)
        for name in order:
            value = timed(models[name])
            if i:
                seconds[name].append(value)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> tuple[float, float, float]:
    """Median and quartiles of the time of `name` / the time of `to` in the same round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds[name], seconds[to], strict=True)], n=4)
    return middle, low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo_run/SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--decode-steps", type=int, default=8)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", help="parts of variant names; each keeps the LoRA beside it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.utils.logging.disable_progress_bar()
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(f"{machine}; {versions}, bem_peft {bem_peft.__version__}; {datetime.date.today()}; {args.rounds} rounds\n")
    rows = []
    for dtype in args.dtype:
        models = build(args.checkpoint, getattr(torch, dtype), args.only)
        for phase, timed in (
            (f"prefill {args.tokens}", lambda m: prefill(m, args.tokens)),
            ("decode", lambda m: decode(m, args.decode_steps)),
        ):
            seconds = interleave(models, timed, args.rounds)
            base_ms = statistics.median(seconds["base"]) * 1e3
            print(f"{dtype}, {phase}: base {base_ms:.1f} ms")
            for name in models:
                if name == "base":
                    continue
                middle, low, high = (value - 1 for value in ratio(seconds, name, "base"))
                beside, against, shown = VARIANTS[name][1], ("", "", ""), ""
                if beside is not None:
                    against = tuple(f"{value:.4f}" for value in ratio(seconds, name, beside))
                    shown = "{} [{}, {}] of LoRA's time".format(*(f"{float(value):.3f}" for value in against))
                    lora, _, _ = ratio(seconds, beside, "base")
                    shown += f", {middle / (lora - 1):.2f} of its overhead" if lora > 1 else ""
                count = sum(p.numel() for n, p in models[name].named_parameters() if "bem_" in n or "lora_" in n)
                print(f"  {name:20s} {middle:+7.1%} [{low:+.1%}, {high:+.1%}]  {count:9,d} parameters  {shown}")
                cells = [f"{value:.4f}" for value in (middle, low, high)]
                rows.append([dtype, phase, f"{base_ms:.2f}", name, count, *cells, beside or "", *against])
            print()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "overhead.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["# " + machine, versions, str(datetime.date.today()), f"{args.rounds} rounds"])
        writer.writerow(HEADER)
        writer.writerows(rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
