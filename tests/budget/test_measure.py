"""Counts against closed forms, to the last FLOP, byte and parameter."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoKrConfig, LoraConfig, get_peft_model
from torch import nn

from bem_peft import (
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
    compare_latency,
    count_flops,
    count_memory,
    count_parameters,
)
from bem_peft.budget.copies import adapted_copy
from bem_peft.budget.flops import formulas
from bem_peft.budget.latency import equivalence, interval, why_inconclusive
from bem_peft.budget.memory import LiveBytes
from bem_peft.budget.parameters import logical_size
from tests.tiny_models import build, call, llama, tokens

N = 2 * 16
BATCH = {"input_ids": tokens(batch=2, length=16)}
HIDDEN, MLP, LAYERS, HEADS = 32, 48, 2, 4
BOTH = ["o_proj", "down_proj"]


def products(*shapes: tuple[int, int, int]) -> tuple[int, int]:
    """(forward, backward) FLOPs of products (m, k, n); each operand takes a gradient, a product of the same size."""
    forward = sum(2 * m * k * n for m, k, n in shapes)
    return forward, 2 * forward


def site_products(method: str, width: int, out: int) -> list[tuple[int, int, int]]:
    """The products of one site of `width` -> `out`, as the method's formula has them."""
    if method == "lora":  # B (A x), r = 4
        return [(N, width, 4), (N, 4, out)]
    if method == "head_gating":  # 4 groups of rank 2; the controller reads two statistics of each head
        return [(N, 2 * HEADS, 4), *[(N, width // 4, 2)] * 4, (N, 8, out)]
    if method == "rank_mask":  # R = 8; the controllers C and W are R x R
        return [(N, width, 8), (N, 8, 8), (N, 8, 8), (N, 8, out)]
    if method == "kronecker":  # 48 = 8 x 6, U (2, 8), V (3, 6)
        return [(2, 8, 6 * N), (2 * N, 6, 3), (N, 6, out)]
    return [(N, width, 5), (N, 3, out), (N, 5, out)]  # film: 5 units, gamma reads 3 of them, beta 5


CASES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "lora": (LoraConfig(r=4, target_modules=BOTH), ("o", "down")),
    "head_gating": (HeadGroupGatingConfig(num_groups=4, rank_per_group=2), ("o",)),
    "rank_mask": (DynamicRankMaskConfig(total_rank=8, active_rank=4), ("o", "down")),
    "kronecker": (KroneckerConfig(u_rank=2, v_rank=3), ("down",)),
    "film": (ResidualFiLMConfig(gamma_dim=3, beta_dim=5), ("o", "down")),
}


@pytest.mark.parametrize("method", CASES)
def test_flops_equal_the_closed_form(method: str) -> None:
    config, sites = CASES[method]
    model = adapted_copy(build("llama"), config)
    found = count_flops(model, BATCH)
    shapes = [s for site in sites for s in site_products(method, HIDDEN if site == "o" else MLP, HIDDEN)]
    forward, backward = products(*shapes)
    assert found.tokens == N
    assert found.adapter_forward == LAYERS * forward
    assert found.adapter_backward == LAYERS * backward


class Logits(nn.Module):
    """A model that a tracer can take: ids -> logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore")  # fvcore traces the model: torch warns of each shape that becomes a constant
@pytest.mark.parametrize("method", CASES)
def test_forward_flops_equal_fvcores(method: str) -> None:
    from fvcore.nn import FlopCountAnalysis

    base = build("llama")
    base.set_attn_implementation("eager")
    model = adapted_copy(base, CASES[method][0]).eval()
    analysis = FlopCountAnalysis(Logits(model), (BATCH["input_ids"],))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    found = count_flops(model, BATCH)
    assert found.base_forward + found.adapter_forward == 2 * analysis.total()  # fvcore counts a product as one


def test_flops_of_the_base_equal_the_closed_form() -> None:
    model = adapted_copy(build("llama"), CASES["lora"][0])
    config = model.config
    kv = config.num_key_value_heads * HIDDEN // HEADS
    linear = 2 * N * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * kv + 3 * HIDDEN * MLP)
    attention = 2 * 2 * 2 * HEADS * 16 * 16 * (HIDDEN // HEADS)  # q k^T and p v, for a batch of 2
    head = 2 * N * HIDDEN * config.vocab_size
    rotary = 2 * 16 * HIDDEN // HEADS // 2  # positions x frequencies, a matrix product until transformers 5
    products = LAYERS * (linear + attention) + head
    assert count_flops(model, BATCH).base_forward in (products, products + rotary)


def test_grouped_keys_count_as_often_as_they_are_read() -> None:
    """4 query heads on 2 of keys: torch before 2.13 has no formula for it."""
    q, k = (2, 4, 5, 8), (2, 2, 7, 8)
    product = 2 * 2 * 4 * 5 * 7 * 8
    assert formulas()[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu](q, k, k) == 2 * product
    backward = formulas()[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward]
    assert backward(q, q, k, k) == 5 * product  # the scores again, and two gradients of each product


def test_ia3_has_parameters_and_no_products_and_says_what_was_not_counted() -> None:
    model = adapted_copy(build("llama"), IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]))
    found = count_flops(model, BATCH)
    assert (found.adapter_forward, found.adapter_backward) == (0, 0)
    assert found.uncounted["mul"] >= LAYERS * N * MLP  # x * l, among others
    assert count_parameters(model).trainable == LAYERS * MLP


def test_lokr_pays_for_the_product_that_it_builds() -> None:
    config = LoKrConfig(r=2, target_modules=["down_proj"], decompose_factor=4)
    found = count_flops(adapted_copy(build("llama"), config), BATCH)
    assert found.adapter_forward == LAYERS * 2 * N * MLP * HIDDEN + LAYERS * 2 * (32 // 4) * 2 * (48 // 4)


def test_counts_need_no_weights() -> None:
    config = CASES["film"][0]
    with torch.device("meta"):
        empty = adapted_copy(copy.deepcopy(build("llama")).to("meta"), config)
    full = adapted_copy(build("llama"), config)
    assert count_flops(empty, BATCH) == count_flops(full, BATCH)
    assert count_memory(empty, BATCH).adapter_bytes == count_memory(full, BATCH).adapter_bytes


@pytest.mark.parametrize("architecture", ["gpt2", "t5", "bart"])
def test_lora_flops_equal_the_closed_form_elsewhere(architecture: str) -> None:
    model = adapted_copy(
        build(architecture), LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=architecture == "gpt2")
    )
    inputs = {**call(architecture, tokens(batch=2, length=16))}
    found = count_flops(model, inputs)
    expected = 0
    for module in model.modules():
        if hasattr(module, "lora_A"):
            expected += 2 * N * sum(p.numel() for p in module.lora_A.parameters())
            expected += 2 * N * sum(p.numel() for p in module.lora_B.parameters())
    assert found.adapter_forward == expected
    assert found.adapter_backward == 2 * expected


def test_counting_leaves_the_model_as_it_was() -> None:
    model = adapted_copy(build("llama"), CASES["rank_mask"][0]).train()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    count_flops(model, BATCH)
    count_memory(model, BATCH)
    assert all(m.training for m in model.modules())
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (value, flag) in before.items():
        assert torch.equal(after[name], value)
        assert after[name].requires_grad == flag
        assert after[name].grad is None


def test_gradient_checkpointing_does_not_change_what_the_adapter_costs() -> None:
    model = adapted_copy(build("llama"), CASES["lora"][0]).train()
    plain = count_flops(model, BATCH)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    found = count_flops(model, BATCH)
    assert (found.adapter_forward, found.adapter_backward) == (plain.adapter_forward, plain.adapter_backward)
    assert found.base_backward >= plain.base_backward  # since transformers 5 down to the embeddings
    assert model.get_base_model().is_gradient_checkpointing


# parameters


def test_parameters_trained_active_saved_and_stored() -> None:
    model = adapted_copy(build("llama"), CASES["rank_mask"][0])
    found = count_parameters(model)
    per_site = [8 * (width + HIDDEN) + 2 * 64 for width in (HIDDEN, MLP)]
    assert found.trainable == found.saved == LAYERS * sum(per_site)
    assert found.active == LAYERS * sum(4 * (width + HIDDEN) + 2 * 64 for width in (HIDDEN, MLP))
    assert found.stored_bytes == 4 * found.saved
    assert found.base == sum(p.numel() for p in build("llama").parameters())


def test_a_packed_or_sharded_weight_counts_as_what_it_stands_for() -> None:
    class Params4bit(nn.Parameter):  # what bitsandbytes calls it: two values a byte
        quant_state: Any

    packed = Params4bit(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = type("QuantState", (), {"shape": torch.Size([6, 8])})()
    assert logical_size(packed) == 48
    gathered = nn.Parameter(torch.empty(0))
    gathered.ds_numel = 1000  # ZeRO-3
    assert logical_size(gathered) == 1000
    flat = type("FlatParameter", (nn.Parameter,), {})(torch.zeros(3))
    with pytest.raises(ValueError, match="FSDP2"):
        logical_size(flat)


def test_a_model_without_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapter"):
        count_parameters(build("llama"))
    frozen = adapted_copy(build("llama"), CASES["lora"][0]).requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable"):
        count_flops(frozen, BATCH)


# memory


def test_live_bytes_follow_what_is_alive() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        view = b.view(10, 100)
        assert live.live == 8000
        del a
        assert live.live == 4000
        del b
        assert live.live == 4000  # the view holds the storage
        del view
        assert (live.live, live.peak) == (0, 8000)


class TwoProducts(nn.Module):
    """x (N, in) -> loss; one linear layer that an adapter can stand at."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site(x)


def test_the_peak_of_lora_equals_the_sum_done_by_hand() -> None:
    model = get_peft_model(TwoProducts(), LoraConfig(r=4, target_modules=["site"]))
    found = count_memory(model, {"x": torch.zeros(128, 64)})
    weights = 4 * (64 * 32 + 64 * 4 + 4 * 32)
    assert found.weights_bytes == weights
    batch, y, z = 4 * 128 * 64, 4 * 128 * 32, 4 * 128 * 4
    # B z, its scaled copy and the sum with y are alive together at the end of the forward pass
    assert found.peak_bytes >= weights + batch + 3 * y + z
    assert found.peak_bytes <= weights + batch + 5 * y + 3 * z + 4 * (64 * 4 + 4 * 32)
    assert count_memory(model, {"x": torch.zeros(128, 64)}) == found


def test_memory_on_fake_tensors_is_that_of_a_real_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_copy(build("llama"), CASES["kronecker"][0])
    fake = count_memory(model, BATCH)
    monkeypatch.setattr("bem_peft.budget.memory.can_fake", lambda model: False)
    real = count_memory(model, BATCH)
    assert fake.adapter_bytes == real.adapter_bytes
    assert fake.weights_bytes == real.weights_bytes
    assert abs(fake.peak_bytes - real.peak_bytes) <= 1024


# latency


def test_the_interval_of_a_ratio_equals_scipys() -> None:
    from scipy import stats

    values = np.random.default_rng(3).normal(0.02, 0.05, 40)
    mean, low, high = interval(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.90)
    np.testing.assert_allclose([np.log(mean), np.log(low), np.log(high)], [values.mean(), *expected], rtol=1e-12)


@pytest.mark.parametrize(
    ("low", "high", "noise", "verdict"),
    [
        (0.98, 1.02, 0.01, "PASS"),
        (1.06, 1.09, 0.01, "FAIL"),
        (0.80, 0.90, 0.01, "FAIL"),
        (1.02, 1.08, 0.01, "INCONCLUSIVE"),
        (0.98, 1.02, 0.10, "INCONCLUSIVE"),
        (1.20, 1.30, 0.10, "INCONCLUSIVE"),
    ],
)
def test_verdicts(low: float, high: float, noise: float, verdict: str) -> None:
    assert equivalence(low, high, 1 - noise, 1 + noise, 0.05) == verdict
    why = why_inconclusive(low, high, 1 - noise, 1 + noise, 0.05)
    assert ("the anchor against itself" in why) == (noise > 0.05)


def test_latency_runs_interleaved_and_sees_a_drift_of_the_machine_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    def run(name: str, seconds: float) -> Any:
        def function() -> None:
            order.append(name)
            clock[0] += seconds * (1 + 0.001 * len(order))  # each run slower than the one before

        return function

    monkeypatch.setattr("bem_peft.budget.latency.time.perf_counter", lambda: clock[0])
    found = compare_latency(run("a", 1.0), run("b", 1.0), blocks=10)
    assert found.verdict == "PASS"
    assert order[4:12] == ["a", "b", "b", "a", "a", "a", "a", "a"]
    slower = compare_latency(run("a", 1.0), run("b", 1.2), blocks=10)
    assert slower.verdict == "FAIL"
    assert slower.ratio == pytest.approx(1.2, rel=1e-3)


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="`blocks` = 2"):
        compare_latency(lambda: None, lambda: None, blocks=2)


def test_llama_shapes_are_those_of_the_formulas() -> None:
    config = llama().config
    found = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads)
    assert found == (HIDDEN, MLP, LAYERS, HEADS)
