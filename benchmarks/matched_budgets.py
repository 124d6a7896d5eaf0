"""The sizes of PT1 to PT4 that cost what LoRA r=8 and r=16 cost at the same sites, on published shapes up to 70B.

    python benchmarks/matched_budgets.py

No weights are needed. PT1 and PT3 are searched twice: with their default groups and factors, and with these free too
(no factor above 16 times the other). Rows, with the seconds that each search took, are added to
benchmarks/results/matched_budgets.csv.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
from peft import LoraConfig
from results_table import ResultsTable, add_output
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    MixtralConfig,
    T5Config,
)

from bem_peft import (
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
    find_sites,
    match_budget,
)

COLUMNS = ("shape", "lora_r", "method", "sizes", "params_deviation", "flops_deviation", "verdict", "s")


def llama(hidden: int, mlp: int, layers: int, heads: int, kv: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=1000,
    )


SHAPES: dict[str, Any] = {
    "SmolLM2-135M": llama(576, 1536, 30, 9, 3),
    "Llama-3-8B": llama(4096, 14336, 32, 32, 8),
    "T5-base": T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=1000),
    "Mixtral (W_O only: its experts are fused)": MixtralConfig(vocab_size=1000),
    "Llama-3-70B": llama(8192, 28672, 80, 64, 8),
}


def balanced(width: int) -> list[int]:
    return [d for d in range(1, width + 1) if width % d == 0 and width / 16 <= d * d <= width * 16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser)
    table = ResultsTable(parser.parse_args().out, "matched_budgets.csv", COLUMNS)
    warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    rows = []
    for shape, config in SHAPES.items():
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config)
        sites_of_model = find_sites(model)
        names: dict[str, list[str]] = {"attention_output": [], "mlp_down": []}
        width = heads = 0
        for site in sites_of_model.sites:
            names[site.role].append(site.name)
            width = site.in_features if site.role == "mlp_down" else width
            heads = site.num_heads or heads
        both = [*names["attention_output"], *names["mlp_down"]]
        skip = {"fused_experts": "skip"} if sites_of_model.fused_experts else {}
        searches: list[tuple[str, Any, list[str], Any]] = [
            ("PT1", HeadGroupGatingConfig(), names["attention_output"], None),
            (
                "PT1, groups free",
                HeadGroupGatingConfig(),
                names["attention_output"],
                {"num_groups": [g for g in (2, 3, 4, 6, 8, 9) if heads % g == 0], "total_rank": None},
            ),
            ("PT2", DynamicRankMaskConfig(**skip), both, None),
            ("PT4", ResidualFiLMConfig(**skip), both, None),
        ]
        if names["mlp_down"]:
            free = {"u_dim": balanced(width), "u_rank": None, "v_rank": None}
            searches.append(("PT3", KroneckerConfig(), names["mlp_down"], None))
            searches.append(("PT3, factors free", KroneckerConfig(), names["mlp_down"], free))
        for rank in (8, 16):
            for method, candidate, sites, free in searches:
                start = time.perf_counter()
                found = match_budget(model, candidate, LoraConfig(r=rank, target_modules=sites), free=free)
                seconds = time.perf_counter() - start
                deviations = [found.deviation_ratio[name] for name in ("params", "flops")]
                sizes = " ".join(f"{k}={v}" for k, v in found.sizes.items())
                verdict = "met" if found.is_met else "nearest"
                print(
                    f"{shape:42s} r={rank:2d} {method:18s} {sizes:32s} params {deviations[0]:+.2%} "
                    f"flops {deviations[1]:+.2%} {verdict:8s} {seconds:.1f} s",
                    flush=True,
                )
                cells = (shape, rank, method, sizes, *(f"{d:.5f}" for d in deviations), verdict, f"{seconds:.1f}")
                rows.append(dict(zip(COLUMNS, cells, strict=True)))
    table.append(rows)


if __name__ == "__main__":
    main()
