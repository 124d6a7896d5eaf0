"""What adapters at fused experts add to a block of a mixture of experts, beside PEFT's LoRA of the same parameter.

    python benchmarks/experts.py [--shapes qwen3-30b-a3b mixtral-8x7b qwen3-16 ...] [--phases decode1 ...] [--rounds 15]

A model of one block in the shape of the checkpoint, random weights, its default products; every variant reads the same
base weights. Each round runs every variant once, in an order that changes; a cell is the median over rounds of
time / base's time of the same round, minus one, with the 95 % interval of the median. Decoding is a step of `generate`:
what is derived from an adapter's parameters is kept. Extra memory is the peak of live storages less the base's, what is
kept among them. "qwen3-16" to "qwen3-64" have that many experts, of which a token reaches eight as in the
whole: what grows with the number of experts shows there. Run it alone on the machine; rows are added to
benchmarks/results/experts.csv.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from overhead import interleave, others_busy, overhead
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from results_table import ResultsTable, add_output
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bem_peft import DynamicRankMaskConfig, KroneckerConfig, ResidualFiLMConfig
from bem_peft.budget.memory import LiveBytes
from bem_peft.kept import kept_weights

COMMON = {"num_hidden_layers": 1, "vocab_size": 256, "max_position_embeddings": 512, "dtype": torch.bfloat16}
QWEN3 = {
    **COMMON, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
MIXTRAL = {
    **COMMON,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SHAPES: dict[str, Callable[[], nn.Module]] = {
    "qwen3-30b-a3b": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN3)),
    "mixtral-8x7b": lambda: MixtralForCausalLM(MixtralConfig(**MIXTRAL)),
    **{
        f"qwen3-{experts}": lambda experts=experts: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**{**QWEN3, "num_experts": experts})
        )
        for experts in (16, 32, 64)
    },
}
SHARING = ("shared", "factors", "each")
VARIANTS: dict[str, Callable[[], PeftConfig]] = {
    "PEFT LoRA": lambda: LoraConfig(r=8, target_modules=[], target_parameters=["experts.down_proj"]),
    **{f"PT2 {s}": lambda s=s: DynamicRankMaskConfig(sites=["mlp_down"], expert_sharing=s) for s in SHARING},
    **{f"PT3 {s}": lambda s=s: KroneckerConfig(expert_sharing=s, init_method="random") for s in SHARING},
    **{f"PT4 {s}": lambda s=s: ResidualFiLMConfig(sites=["mlp_down"], expert_sharing=s) for s in SHARING},
}
PHASES = {"decode1": (1, 1), "decode8": (8, 1), "prefill128": (1, 128), "train128": (1, 128)}
COLUMNS = (
    "shape", "experts", "per_token", "products", "phase", "base_ms", "variant", "parameters", "overhead", "low", "high",
    "extra_mib", "rounds",
)  # fmt: skip


def with_adapter(base: nn.Module, config: PeftConfig | None, is_training: bool) -> nn.Module:
    """A copy that reads the base's own weights; without a config the base, with one number trained for a gradient."""
    twin = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    if config is not None:
        torch.manual_seed(0)
        twin = get_peft_model(twin, config)
        with torch.no_grad():
            for parameter in (p for p in twin.parameters() if p.requires_grad):
                parameter.add_(torch.randn_like(parameter), alpha=1e-2)
    return twin.train(is_training)


def step(model: nn.Module, ids: torch.Tensor, is_training: bool) -> None:
    if not is_training:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        return
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # the base carries a gradient down, too
    model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def timed(model: nn.Module, ids: torch.Tensor, is_training: bool) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        step(model, ids, is_training)
        return time.perf_counter() - start

    return run


@contextmanager
def as_generate(models: Iterable[nn.Module], phase: str) -> Iterator[None]:
    """Keeps what a decoding step of `generate` finds kept."""
    with ExitStack() as scopes:
        for model in models if phase.startswith("decode") else ():
            if isinstance(model, PeftModel):
                scopes.enter_context(kept_weights(model))
        yield


def peak_bytes(model: nn.Module, ids: torch.Tensor, phase: str) -> int:
    """Of live storages in one pass, the weights included."""
    with LiveBytes() as live, as_generate([model], phase):
        for parameter in model.parameters():
            live.see(parameter)
        step(model, ids, phase.startswith("train"))
    return live.peak


def measure(shape: str, phases: list[str], rounds: int, only: list[str], report: Callable[[str], None]) -> list[Any]:
    torch.manual_seed(0)
    base, rows = SHAPES[shape]().requires_grad_(False), []
    config: Any = base.config
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    names = [name for name in VARIANTS if not only or any(name.startswith(part) for part in only)]
    for phase in phases:
        batch, tokens = PHASES[phase]
        ids, is_training = torch.randint(256, (batch, tokens)), phase.startswith("train")
        models = {"base": with_adapter(base, None, is_training)}
        models |= {name: with_adapter(base, VARIANTS[name](), is_training) for name in names}
        runs = {name: timed(model, ids, is_training) for name, model in models.items()}
        others = others_busy()
        with as_generate(models.values(), phase):
            seconds = interleave(runs, rounds, report)
        busy = others()
        peaks = {name: peak_bytes(model, ids, phase) for name, model in models.items()}
        base_ms = statistics.median(seconds["base"]) * 1e3
        report(f"\n{shape} ({experts} experts, {config._experts_implementation}), {phase}: base {base_ms:.2f} ms")
        report(f"  other processes used {busy:.1%} of the processors meanwhile")
        for name in names:
            middle, low, high = overhead(seconds[name], seconds["base"])
            extra = (peaks[name] - peaks["base"]) / 2**20
            trained = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
            report(f"  {name:12s} {middle:+8.1%} [{low:+.1%}, {high:+.1%}]  {extra:9.2f} MiB  {trained:12,d}")
            values = (
                shape, experts, config.num_experts_per_tok, config._experts_implementation, phase, f"{base_ms:.2f}",
                name, trained, *(f"{value:.4f}" for value in (middle, low, high)), f"{extra:.3f}", rounds,
            )  # fmt: skip
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="variants that begin so")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    add_output(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = ResultsTable(args.out, "experts.csv", COLUMNS)
    for shape in args.shapes:
        table.append(measure(shape, args.phases, args.rounds, args.only, print))


if __name__ == "__main__":
    main()
