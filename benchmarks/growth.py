"""How the adapters' overhead grows with rank, sequence length, batch, hidden size and number of blocks.

    python benchmarks/growth.py [--rounds 20] [--axes rank tokens batch hidden blocks] [--dtype float32]

Random blocks of a Llama with SmolLM2-135M's proportions (heads of 64, MLP 8/3 of the hidden size), one axis changed at
a time: rank 8, 256 tokens of prefill (batch: decoding), hidden size 576, 4 blocks otherwise. A cell is the median over
interleaved rounds of time / base's time, minus one, as in overhead.py. An adapter grows no faster than the base along
an axis where its overhead at the end is not above the one at the start. Rank is the adapter's own size: there the
overhead must grow no faster than the rank.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from adapters import BOTH, VARIANTS, Phase, adapted_models
from overhead import interleave, others_busy, overhead
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from bem_peft import match_budget

AXES: dict[str, list[int]] = {
    "rank": [4, 8, 16, 32, 64], "tokens": [64, 128, 256, 512, 1024], "batch": [1, 2, 4, 8, 16],
    "hidden": [256, 576, 1024, 2048], "blocks": [1, 2, 4, 8, 16],
}  # fmt: skip
NAMES = ["LoRA W_O+W_down", "PT1 head gating (cpp)", "PT2 rank mask (cpp)", "PT3 Kronecker (cpp)", "PT4 FiLM (cpp)"]


def base_of(hidden: int, blocks: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def point(
    axis: str, value: int, dtype: torch.dtype, rounds: int
) -> list[tuple[str, float, float, float, float, float]]:
    """(variant, base's seconds, overhead, low, high, share of others) of each variant."""
    rank, hidden, blocks = (
        value if axis == name else size for name, size in (("rank", 8), ("hidden", 576), ("blocks", 4))
    )
    phase = Phase("decode", value, 64) if axis == "batch" else Phase("prefill", 1, value if axis == "tokens" else 256)
    base = base_of(hidden, blocks, dtype)
    for name in [*NAMES, *(VARIANTS[n].anchor for n in NAMES)]:
        VARIANTS[name] = with_rank(VARIANTS[name], base, rank)
    models = adapted_models(base, NAMES)
    runs = {name: phase.runner(model, model) for name, model in models.items()}
    others = others_busy()
    seconds = interleave(runs, rounds)
    busy, base_seconds = others(), statistics.median(seconds["base"])
    return [(name, base_seconds, *overhead(seconds[name], seconds["base"]), busy) for name in NAMES]


def with_rank(variant: Any, base: Any, rank: int) -> Any:
    """The variant at the parameters of LoRA of that rank."""
    anchor = LoraConfig(r=rank, target_modules=list(variant.sites))
    if not variant.is_ours:
        return replace(variant, config=lambda: LoraConfig(r=rank, target_modules=BOTH))
    original = OURS[variant.name]
    found = match_budget(base, original(), anchor, match=("params",), tolerance_ratio=0.05).config
    return replace(variant, config=lambda: found, is_sized=True)


OURS = {name: VARIANTS[name].config for name in VARIANTS if VARIANTS[name].is_ours}


def plot(rows: list[list[str]], path: Path, caption: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bem_peft"
    from matplotlib import pyplot

    axes = list(dict.fromkeys(row[0] for row in rows))
    figure, panels = pyplot.subplots(1, len(axes), figsize=(3.4 * len(axes), 3.4), squeeze=False)
    for panel, axis in zip(panels[0], axes, strict=True):
        for name in dict.fromkeys(row[2] for row in rows):
            mine = [row for row in rows if row[0] == axis and row[2] == name]
            x, y = [int(row[1]) for row in mine], [100 * float(row[4]) for row in mine]
            low, high = ([100 * float(row[i]) for row in mine] for i in (5, 6))
            (line,) = panel.plot(x, y, marker="o", markersize=3, label=name)
            panel.fill_between(x, low, high, alpha=0.12, color=line.get_color())
        panel.set_xscale("log", base=2)
        panel.set_xticks(AXES[axis], [str(v) for v in AXES[axis]])
        panel.axhline(0, color="#5a6068", linewidth=0.8)
        panel.set_xlabel(axis if axis != "batch" else "batch (decoding)")
        panel.set_ylabel("% over the base")
    panels[0][0].legend(fontsize=7)
    figure.suptitle(caption, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    caption = f"CPU, {torch.get_num_threads()} threads; {args.dtype}; {datetime.date.today()}; {args.rounds} rounds"
    rows: list[list[str]] = []
    for axis in args.axes:
        for value in AXES[axis]:
            for name, seconds, middle, low, high, busy in point(axis, value, getattr(torch, args.dtype), args.rounds):
                interval = f"{middle:+7.1%} [{low:+.1%}, {high:+.1%}]"
                print(
                    f"{axis} {value:5d}  {name:24s} base {seconds * 1e3:8.2f} ms {interval} others {busy:.0%}",
                    flush=True,
                )
                cells = [f"{v:.4f}" for v in (middle, low, high)]
                rows.append([axis, str(value), name, f"{seconds * 1e3:.3f}", *cells, f"{busy:.3f}"])
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "growth.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f"# {caption}"])
        writer.writerow(("axis", "value", "variant", "base_ms", "overhead", "low", "high", "others"))
        writer.writerows(rows)
    plot(rows, args.out / "growth.svg", caption)
    for axis in args.axes:
        for name in NAMES:
            mine = [row for row in rows if row[0] == axis and row[2] == name]
            allowed = int(mine[-1][1]) / int(mine[0][1]) if axis == "rank" else 1.0
            first, last = (
                float(mine[0][6]),
                float(mine[-1][5]),
            )
            verdict = "grows faster" if last > max(first, 0.0) * allowed else "grows no faster"
            print(f"{axis:7s} {name:24s} {float(mine[0][4]):+.1%} -> {float(mine[-1][4]):+.1%}: {verdict}")


if __name__ == "__main__":
    main()
