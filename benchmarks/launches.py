"""How many operators a site launches a call, beside LoRA's: what an adapter costs on a GPU in eager mode.

Launches are the cost there. They are counted, not timed, on tensors without values (the meta device, which the torch
forms treat as they treat a GPU), so that the table holds on any machine.

    python benchmarks/launches.py

Counted are the operators that reach the device and compute: views, metadata and allocations do not. The base's own
product is left out. "inference": without gradients, weights kept as `generate` keeps them; "evaluation": without
gradients, nothing kept; "training": forward and backward, the optimizer left out. Rows are added to
benchmarks/results/launches.csv.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from results_table import ResultsTable, add_output
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from bem_peft import (
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
    use_kernels,
)
from bem_peft.kept import kept_weights

CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: LoraConfig(r=8, target_modules=["o_proj"]),
    "PT1": lambda: HeadGroupGatingConfig(target_modules=["o_proj"]),
    "PT2": lambda: DynamicRankMaskConfig(target_modules=["o_proj"]),
    "PT3": lambda: KroneckerConfig(target_modules=["down_proj"], sites=["mlp_down"]),
    "PT4": lambda: ResidualFiLMConfig(target_modules=["o_proj"]),
}
NO_LAUNCH = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "alias",
    "_unsafe_view", "promote_types", "scalar_tensor",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Operators that compute, by name."""

    only_counts = True  # operators of one's own stay as they are

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func._overloadpacket).partition(".")[2]
        if not func.is_view and name not in NO_LAUNCH:
            self.found[name] += 1
        return out


def site_of(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if hasattr(m, "base_layer"))


def count(site: nn.Module, x: torch.Tensor, what: str) -> Counter[str]:
    """Operators of one call of the site, its base layer's left out."""

    def run(call: Callable[[torch.Tensor], torch.Tensor]) -> Counter[str]:
        given = x.clone().requires_grad_(what == "training")
        for p in site.parameters():
            p.grad = None
        with Launches() as seen:
            out = call(given)
            if what == "training":
                out.backward(torch.ones_like(out))
        return seen.found

    site.train(what == "training")
    if what == "training":
        run(site)
        return run(site) - run(site.base_layer)
    with torch.no_grad():
        if what == "evaluation":
            return run(site) - run(site.base_layer)
        with kept_weights(site):
            run(site)
            return run(site) - run(site.base_layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="the operators themselves")
    add_output(parser)
    options = parser.parse_args()
    table = ResultsTable(
        options.out, "launches.csv", ("method", "dtype", "what", "launches", "beside_lora", "operators")
    )
    use_kernels("torch")
    sizes = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        lora: dict[str, int] = {}
        for name, config in CONFIGS.items():
            with torch.device("meta"):
                model = get_peft_model(LlamaForCausalLM(sizes).to(dtype), config())
            site = site_of(model)
            x = torch.empty(2, 16, site.base_layer.in_features, dtype=dtype, device="meta")
            for what in ("inference", "evaluation", "training"):
                found = count(site, x, what)
                lora.setdefault(what, found.total())
                row = {
                    "method": name, "dtype": str(dtype).removeprefix("torch."), "what": what,
                    "launches": found.total(), "beside_lora": f"{found.total() - lora[what]:+d}",
                    "operators": " ".join(f"{n}:{c}" for n, c in sorted(found.items())),
                }  # fmt: skip
                rows.append(row)
                print(*(row[n] for n in list(row)[: 6 if options.show else 5]), sep="\t")
    table.append(rows)


if __name__ == "__main__":
    main()
