"""How the adapters' overhead grows with rank, sequence length, batch, hidden size and number of blocks.

    python benchmarks/growth.py [--rounds 20] [--axes rank tokens batch hidden blocks] [--dtype float32]

Random blocks of a Llama with SmolLM2-135M's proportions (heads of 64, MLP 8/3 of the hidden size), one axis changed at
a time: rank 8, 256 tokens of prefill (batch: decoding), hidden size 576, 4 blocks otherwise. A cell is the median over
interleaved rounds of time / base's time, minus one, as in overhead.py. An adapter grows no faster than the base along
an axis where its overhead at the end is not above the one at the start. Rank is the adapter's own size: there the
overhead must grow no faster than the rank. Rows are added to benchmarks/results/growth.csv, and growth.svg is drawn of
the newest ones.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from adapters import BOTH, VARIANTS, Phase, adapted_models
from overhead import interleave, others_busy, overhead, svg_pyplot
from peft import LoraConfig
from results_table import ResultsTable, add_output, newest, sources
from transformers import LlamaConfig, LlamaForCausalLM

from bem_peft import match_budget

AXES: dict[str, list[int]] = {
    "rank": [4, 8, 16, 32, 64], "tokens": [64, 128, 256, 512, 1024], "batch": [1, 2, 4, 8, 16],
    "hidden": [256, 576, 1024, 2048], "blocks": [1, 2, 4, 8, 16],
}  # fmt: skip
KEY = ("axis", "value", "variant", "dtype")
COLUMNS = (*KEY, "rounds", "base_ms", "overhead", "low", "high", "others")
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


def plot(rows: list[dict[str, str]], path: Path, dtype: str) -> None:
    """One panel an axis: the overhead of each variant, with its interval."""
    pyplot = svg_pyplot()
    axes = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    figure, panels = pyplot.subplots(1, len(axes), figsize=(3.4 * len(axes), 3.4), squeeze=False)
    for panel, axis in zip(panels[0], axes, strict=True):
        for name in dict.fromkeys(row["variant"] for row in rows):
            mine = sorted((r for r in rows if (r["axis"], r["variant"]) == (axis, name)), key=lambda r: int(r["value"]))
            x = [int(row["value"]) for row in mine]
            y, low, high = ([100 * float(row[column]) for row in mine] for column in ("overhead", "low", "high"))
            (line,) = panel.plot(x, y, marker="o", markersize=3, label=name)
            panel.fill_between(x, low, high, alpha=0.12, color=line.get_color())
        panel.set_xscale("log", base=2)
        panel.set_xticks(AXES[axis], [str(v) for v in AXES[axis]])
        panel.axhline(0, color="#5a6068", linewidth=0.8)
        panel.set_xlabel(axis if axis != "batch" else "batch (decoding)")
        panel.set_ylabel("% over the base")
    panels[0][0].legend(fontsize=7)
    figure.suptitle(f"{dtype}; {sources(rows)}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--dtype", default="float32")
    add_output(parser)
    args = parser.parse_args()
    table = ResultsTable(args.out, "growth.csv", COLUMNS)
    rows: list[dict[str, str]] = []
    for axis in args.axes:
        for value in AXES[axis]:
            for name, seconds, middle, low, high, busy in point(axis, value, getattr(torch, args.dtype), args.rounds):
                interval = f"{middle:+7.1%} [{low:+.1%}, {high:+.1%}]"
                print(
                    f"{axis} {value:5d}  {name:24s} base {seconds * 1e3:8.2f} ms {interval} others {busy:.0%}",
                    flush=True,
                )
                cells = [f"{v:.4f}" for v in (middle, low, high)]
                values = (
                    axis,
                    str(value),
                    name,
                    args.dtype,
                    str(args.rounds),
                    f"{seconds * 1e3:.3f}",
                    *cells,
                    f"{busy:.3f}",
                )
                rows.append(dict(zip(COLUMNS, values, strict=True)))
    table.append(rows)
    if table.path is not None:
        found = [row for row in newest(table.path, KEY) if row["dtype"] == args.dtype]
        plot(found, table.path.with_suffix(".svg"), args.dtype)
    for axis in args.axes:
        for name in NAMES:
            mine = [row for row in rows if (row["axis"], row["variant"]) == (axis, name)]
            first, last = mine[0], mine[-1]
            allowed = int(last["value"]) / int(first["value"]) if axis == "rank" else 1.0
            is_faster = float(last["low"]) > max(float(first["high"]), 0.0) * allowed
            verdict = "grows faster" if is_faster else "grows no faster"
            print(f"{axis:7s} {name:24s} {float(first['overhead']):+.1%} -> {float(last['overhead']):+.1%}: {verdict}")


if __name__ == "__main__":
    main()
