"""Adapters on experts against the dense model that the experts were copied from, which has no experts.

    python benchmarks/upcycled.py CHECKPOINT [--blocks 30] [--experts 4] [--products eager]

Every MLP of a Llama checkpoint stands in each of the experts of a Mixtral-shaped model; a token takes two, whose
weights add up to 1, so that both models are the same function. With the same adapter at W_down, logits and gradients
must be the dense model's: with "shared" the gradients themselves, with "each" and "factors" their sum over experts.
In float64 on real text; routers score in float32, whose rounding is what the weights' sum differs from 1 by. Rows are
added to benchmarks/results/upcycled.csv.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from results_table import ResultsTable, add_output
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from bem_peft import DynamicRankMaskConfig, KroneckerConfig, ResidualFiLMConfig

TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void."
SITES = {"sites": ["mlp_down"]}
METHODS: dict[str, Any] = {
    "PT2": lambda sharing: DynamicRankMaskConfig(**SITES, expert_sharing=sharing),
    "PT3": lambda sharing: KroneckerConfig(init_method="orthogonal", expert_sharing=sharing),
    "PT4": lambda sharing: ResidualFiLMConfig(**SITES, expert_sharing=sharing),
}
COLUMNS = ("checkpoint", "blocks", "experts", "products", "method", "sharing", "logits", "gradients", "effect")


def upcycled(dense: Any, experts: int, products: str) -> Any:
    """A Mixtral with the dense model's MLP in every expert, and random routers."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "tie_word_embeddings",
        "head_dim", "hidden_act",
    )  # fmt: skip
    sizes = {name: getattr(dense.config, name) for name in names}
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, num_local_experts=experts, num_experts_per_tok=2, sliding_window=None)
    ).double()
    model.set_experts_implementation(products)
    weights = {name: value for name, value in dense.state_dict().items() if name in model.state_dict()}
    for i, layer in enumerate(dense.model.layers):
        mlp, place = layer.mlp, f"model.layers.{i}.mlp"
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        weights[f"{place}.experts.gate_up_proj"] = gate_up.expand(experts, -1, -1)
        weights[f"{place}.experts.down_proj"] = mlp.down_proj.weight.expand(experts, -1, -1)
        weights[f"{place}.gate.weight"] = torch.randn(experts, sizes["hidden_size"], dtype=torch.float64)
    model.load_state_dict(weights)
    return model


def adapted(model: nn.Module, config: PeftConfig, source: nn.Module | None = None) -> Any:
    """With random adapter weights, those of `source` where it is given, for every expert."""
    found = get_peft_model(model, config).double().train()
    given = {} if source is None else {n.replace("down_proj", "experts"): p for n, p in source.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if not parameter.requires_grad:
                continue
            if source is None:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.02)
            else:
                parameter.copy_(given[name].expand_as(parameter))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--products", nargs="+", choices=["eager", "batched_mm"], default=["eager"])
    add_output(parser)
    args = parser.parse_args()
    table = ResultsTable(args.out, "upcycled.csv", COLUMNS)
    ids = AutoTokenizer.from_pretrained(args.checkpoint)(TEXT, return_tensors="pt").input_ids
    dense: Any = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float64)
    dense.model.layers = dense.model.layers[: args.blocks]
    dense.config.num_hidden_layers = args.blocks
    rows = []
    for products in args.products:
        torch.manual_seed(0)
        base = upcycled(dense, args.experts, products)
        for method, config in METHODS.items():
            for sharing in ("shared", "each", "factors"):
                reference = adapted(copy.deepcopy(dense), config("shared"))
                model = adapted(copy.deepcopy(base, {id(p): p for p in base.parameters()}), config(sharing), reference)
                outputs = [m(input_ids=ids, labels=ids) for m in (reference, model)]
                for output in outputs:
                    output.loss.backward()
                found = {n.replace("experts", "down_proj"): p.grad for n, p in model.named_parameters()}
                gradients = []
                for name, parameter in reference.named_parameters():
                    if parameter.grad is not None:
                        gradient = found[name] if found[name].shape == parameter.shape else found[name].sum(0)
                        gradients.append(float((gradient - parameter.grad).norm() / parameter.grad.norm()))
                with torch.no_grad(), reference.disable_adapter():
                    plain = reference(input_ids=ids).logits
                expected, got = (output.logits.detach() for output in outputs)
                values = (
                    Path(args.checkpoint).name, args.blocks, args.experts, products, method, sharing,
                    f"{float((expected - got).abs().max()):.2e}", f"{max(gradients):.2e}",
                    f"{float((expected - plain).abs().max()):.2e}",
                )  # fmt: skip
                print(*values, flush=True)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
    table.append(rows)


if __name__ == "__main__":
    main()
