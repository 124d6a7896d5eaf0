"""The adapters that the speed benchmarks time, around one base model, and the work that they are timed at.

All variants share the base's weights. Ours and LoRA's kin are sized to the parameters of PEFT's LoRA r=8 at the same
sites; IA3, VeRA and LoKr have no size that meets it, so their counts stand beside their times.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bem_peft import (
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
    count_flops,
    match_budget,
    use_kernels,
)
from bem_peft.kept import kept_weights
from bem_peft.upstream import cache_argument, cache_of

W_O, W_DOWN = ["o_proj"], ["down_proj"]
SHAPES = {  # of the weights' shapes alone; the weights are random
    "llama-3.2-1b": {"hidden_size": 2048, "intermediate_size": 8192},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336},
}


@dataclass(frozen=True)
class Variant:
    """config(sites) -> PeftConfig. anchor: the LoRA beside it. kernels: the form of our methods at inference."""

    name: str
    config: Callable[[], PeftConfig]
    sites: tuple[str, ...]
    is_ours: bool = False
    kernels: str = "torch"
    is_plain_lora: bool = False
    is_sized: bool = False  # its config is to be taken as it is

    @property
    def anchor(self) -> str:
        return f"LoRA {where(self.sites)}"


def where(sites: tuple[str, ...]) -> str:
    return "+".join({"o_proj": "W_O", "down_proj": "W_down"}[site] for site in sites)


def lora(sites: list[str]) -> Variant:
    return Variant(
        f"LoRA {where(tuple(sites))}", lambda: LoraConfig(r=8, target_modules=list(sites)), tuple(sites),
        is_plain_lora=True,
    )  # fmt: skip


BOTH = W_O + W_DOWN
OURS = [
    Variant("PT1 head gating", lambda: HeadGroupGatingConfig(total_rank=12, num_groups=4), tuple(W_O), True),
    Variant("PT2 rank mask", lambda: DynamicRankMaskConfig(total_rank=8, active_rank=4), tuple(BOTH), True),
    Variant("PT3 Kronecker", lambda: KroneckerConfig(u_rank=4, v_rank=7), tuple(W_DOWN), True),
    Variant("PT4 FiLM", lambda: ResidualFiLMConfig(gamma_dim=6, beta_dim=6), tuple(BOTH), True),
]
VARIANTS = {
    v.name: v
    for v in [
        lora(W_O), lora(W_DOWN), lora(BOTH),
        Variant("DoRA W_O+W_down", lambda: LoraConfig(r=8, use_dora=True, target_modules=BOTH), tuple(BOTH)),
        Variant("AdaLoRA W_O+W_down", lambda: AdaLoraConfig(init_r=8, target_r=8, total_step=1000, target_modules=BOTH),
                tuple(BOTH)),
        Variant("LoKr W_O+W_down", lambda: LoKrConfig(r=64, target_modules=BOTH), tuple(BOTH)),
        Variant("LoHa W_O+W_down", lambda: LoHaConfig(r=4, target_modules=BOTH), tuple(BOTH)),
        Variant("VeRA W_O+W_down", lambda: VeraConfig(r=256, target_modules=BOTH), tuple(BOTH)),
        Variant("IA3 W_O+W_down", lambda: IA3Config(target_modules=BOTH, feedforward_modules=W_DOWN), tuple(BOTH)),
        *OURS,
        *(replace(v, name=f"{v.name} (cpp)", kernels="cpp") for v in OURS),
    ]
}  # fmt: skip


def base_model(model: str, dtype: torch.dtype, blocks: int | None) -> Any:
    """A checkpoint's folder (its first `blocks` blocks), or random blocks of one of `SHAPES`."""
    if model in SHAPES:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1024,
            num_hidden_layers=blocks or 2,
            num_attention_heads=32,
            num_key_value_heads=8,
            **SHAPES[model],
        )
        found = LlamaForCausalLM(config).to(dtype)
    else:
        found = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        if blocks is not None:
            found.model.layers = found.model.layers[:blocks]
            found.config.num_hidden_layers = blocks
    return found.eval().requires_grad_(False)


def share_weights(model: Any) -> Any:
    """A copy of the modules around the same parameters and buffers."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def sized(base: Any, variant: Variant) -> PeftConfig:
    """The config of ours whose parameters are nearest to LoRA's at the same sites; the others as they stand."""
    config = variant.config()
    if not variant.is_ours or variant.is_sized:
        return config
    anchor = LoraConfig(r=8, target_modules=list(variant.sites))
    return match_budget(base, config, anchor, match=("params",), tolerance_ratio=0.03).config


def adapted_models(base: Any, names: list[str], *, is_training: bool = False) -> dict[str, Any]:
    """name -> model, with weights as after training (nothing is zero).

    Raises:
        SystemExit: a fresh adapter does not give the base's logits, or the C++ form not the torch form's.
    """
    ids = torch.arange(1, 65).unsqueeze(0)
    with torch.no_grad():
        reference = base(ids).logits
    models = {"base": base}
    configs: dict[tuple[str, ...], PeftConfig] = {}
    for name in names:
        variant = VARIANTS[name]
        key = (name.removesuffix(" (cpp)"),)
        if key not in configs:
            configs[key] = sized(base, variant)
        torch.manual_seed(0)
        model = get_peft_model(share_weights(base), copy.deepcopy(configs[key]))
        model.eval()
        use_kernels(variant.kernels)
        with torch.no_grad():
            found = model(ids).logits
            is_exact = variant.is_ours or variant.is_plain_lora  # others round on the way (DoRA's norms, in bfloat16)
            if not (torch.equal(found, reference) if is_exact else _is_near(found, reference, allowed=0.5)):
                raise SystemExit(f"{name}: a fresh adapter does not give the base's logits; nothing is timed")
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(torch.randn_like(parameter) * 0.01)
            if variant.kernels == "cpp":
                found = model(ids).logits.float()
                use_kernels("torch")
                allowed = 1e-3 if base.dtype is torch.float32 else 0.5
                if not _is_near(model(ids).logits.float(), found, allowed):
                    raise SystemExit(f"{name}: the C++ form differs from the torch form; nothing is timed")
        if not is_training:
            model.requires_grad_(False)
        models[name] = model
    use_kernels("torch")
    return models


def _is_near(a: torch.Tensor, b: torch.Tensor, allowed: float) -> bool:
    """In root mean square of the logits. In bfloat16 the rounding of one layer grows through the next ones, so that
    this only finds what is wrong altogether; parity operator by operator is what tests/kernels asserts."""
    return float((a.float() - b.float()).square().mean().sqrt() / b.float().square().mean().sqrt()) <= allowed


def trainable(model: Any) -> int:
    """Parameters of the adapter."""
    return sum(p.numel() for n, p in model.named_parameters() if is_of_adapter(n))


def is_of_adapter(name: str) -> bool:
    return any(part in name for part in ("bem_", "lora_", "lokr_", "hada_", "ia3_", "vera_lambda"))


# the work


@dataclass(frozen=True)
class Phase:
    """kind: "prefill", "decode" or "train". tokens: of the prompt (prefill, decode) or of each sequence (train)."""

    kind: str
    batch: int
    tokens: int
    steps: int = 16  # decoding steps a run: a very short answer of `generate`, which derives the weights once

    def __str__(self) -> str:
        sizes = f"{self.tokens}" if self.kind == "prefill" else f"batch {self.batch}"
        return f"{self.kind} {sizes}" if self.kind != "train" else f"training step {self.batch} x {self.tokens}"

    @property
    def ids(self) -> torch.Tensor:
        return (torch.arange(self.batch * self.tokens) % 1000 + 1).view(self.batch, self.tokens)

    def runner(self, model: Any, called: Any) -> Callable[[], float]:
        """A run that returns its seconds (a step's, for decoding). `called` is the model or its compiled form.

        The optimizer is the HF Trainer's default, fused AdamW.
        """
        ids = self.ids
        if self.kind == "prefill":

            @torch.no_grad()
            def prefill() -> float:
                start = time.perf_counter()
                called(input_ids=ids, use_cache=False, logits_to_keep=1)
                return time.perf_counter() - start

            return prefill
        if self.kind == "decode":
            token = torch.full((self.batch, 1), 7)
            with torch.no_grad():
                cache, argument = cache_of(model(input_ids=ids, use_cache=True)), cache_argument(model)

            @torch.no_grad()
            def decode() -> float:
                start = time.perf_counter()
                with kept_weights(model):  # as `generate` does, whose steps these are
                    for _ in range(self.steps):
                        called(input_ids=token, use_cache=True, **{argument: cache})
                seconds = (time.perf_counter() - start) / self.steps
                cache.crop(-self.steps)
                return seconds

            return decode
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None

        def train() -> float:
            model.train()
            start = time.perf_counter()
            loss = called(input_ids=ids, labels=ids, use_cache=False).loss
            if optimizer is not None:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            return time.perf_counter() - start

        return train

    def limit(self, model: Any) -> float:
        """What arithmetic says the adapter adds, as a share of the base: FLOPs (prefill, training), bytes (decode).

        Training: forward and backward, over those of the frozen base with one trained number a site.
        """
        if self.kind == "decode":
            read = {p.data_ptr(): p.numel() for n, p in model.named_parameters() if not is_of_adapter(n)}
            tied = model.config.tie_word_embeddings  # else the input's embedding is not read but for a row
            embedding = model.get_input_embeddings().weight.numel()
            return trainable(model) / (sum(read.values()) - (0 if tied else embedding))
        shares = [(n, p.requires_grad) for n, p in model.named_parameters()]
        for name, parameter in model.named_parameters():  # counting wants an adapter that trains
            parameter.requires_grad_(is_of_adapter(name))
        found = count_flops(model, {"input_ids": self.ids[:1], "use_cache": False})
        for (_, was), parameter in zip(shares, model.parameters(), strict=True):
            parameter.requires_grad_(was)
        if self.kind == "prefill":
            return found.adapter_forward / found.base_forward
        base = found.base_forward + found.base_backward
        return (found.adapter_forward + found.adapter_backward) / base
