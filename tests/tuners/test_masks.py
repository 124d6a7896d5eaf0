"""PT2's mask: one for one token, whatever it is batched with; balance; and k = R is the LoRA that it is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bem_peft import DynamicRankMaskConfig, use_kernels
from bem_peft.kernels.rank_mask import choice_projection, straight_through_k_hot
from bem_peft.tuners.base.adapter import SiteShape
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.calls.penalty import mask_balance
from bem_peft.tuners.calls.penalty_call import sequences_of
from bem_peft.tuners.pt2_rank_mask import DynamicRankMaskAdapter

RANK, KEPT, OUT = 16, 8, 24
FORMS = ["torch", "cpp", "triton"]


@pytest.fixture(autouse=True)
def torch_form_after() -> Iterator[None]:
    yield
    use_kernels("torch")


def adapter_of(width: int, spread: float | None = None) -> DynamicRankMaskAdapter:
    """`spread`: the logits of a token differ by about so much of their size."""
    config = DynamicRankMaskConfig(total_rank=RANK, active_rank=KEPT)
    adapter = DynamicRankMaskAdapter(config, SiteShape("s", width, OUT), CallState())
    adapter.reset_parameters(True, SiteShape("s", width, OUT))
    with torch.no_grad():
        adapter.C.normal_(std=0.02)  # 1 + tanh stays away from 0
        adapter.B.zero_()
        adapter.B[:RANK] = torch.eye(RANK)  # so that y' shows what was kept
        if adapter.hadamard:
            adapter.B.copy_(adapter.B @ hadamard())
        if spread is not None:
            adapter.mask_weight.copy_(torch.randn(RANK) * (1.0 + spread * torch.randn(RANK, RANK)))
    return adapter.eval()


def hadamard() -> torch.Tensor:
    from scipy.linalg import hadamard as matrix

    return torch.from_numpy(matrix(RANK)).float() / RANK**0.5


def kept(adapter: DynamicRankMaskAdapter, x: torch.Tensor, size: int) -> torch.Tensor:
    """Which ranks the forward pass keeps, (N, R), the tokens in batches of `size`: those that reach y'."""
    y = torch.zeros(len(x), OUT, dtype=x.dtype)
    with torch.no_grad():
        parts = [adapter(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
    return torch.cat(parts)[:, :RANK] != 0


def tokens_of(width: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, width).to(dtype)


@pytest.mark.parametrize(
    ("width", "dtype", "count"),
    [
        (576, torch.bfloat16, 20_000),
        (1536, torch.bfloat16, 20_000),
        (1536, torch.float16, 4000),
        (576, torch.float32, 4000),
    ],
    ids=str,
)
def test_a_token_has_one_mask_alone_and_in_any_batch(width: int, dtype: torch.dtype, count: int) -> None:
    adapter, x = adapter_of(width), tokens_of(width, count, dtype)
    together = kept(adapter, x, len(x))
    assert (together.sum(1) <= KEPT).all()
    for size in (1, 7, 8, 9, 33, 512):
        changed = (kept(adapter, x, size) != together).any(1)
        assert int(changed.sum()) == 0, (size, int(changed.sum()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_form_has_one_mask_for_one_token(form: str, dtype: torch.dtype) -> None:
    count = 130 if form == "triton" else 1500
    adapter, x = adapter_of(576), tokens_of(576, count, dtype)
    use_kernels(form)
    together = kept(adapter, x, len(x))
    for size in (1, 7, 8, 33):
        assert torch.equal(kept(adapter, x, size), together), size


def test_where_logits_differ_in_the_seventh_digit_float32_sums_choose_by_the_batch_and_ours_do_not() -> None:
    adapter, x = adapter_of(1536, spread=1e-6), tokens_of(1536, 2000, torch.bfloat16)
    together, alone = kept(adapter, x, len(x)), kept(adapter, x, 1)
    assert torch.equal(together, alone)
    a, w = adapter.derive(torch.bfloat16)[0].float(), adapter.mask_weight.detach().t()

    def by_float32(rows: torch.Tensor) -> torch.Tensor:
        return (rows.float() @ a @ w).topk(KEPT, dim=1).indices.sort(1).values

    with torch.no_grad():
        differ = by_float32(x) != torch.cat([by_float32(row) for row in x.split(1)])
    assert int(differ.any(1).sum()) > 10, "the case is hard"


def test_equal_logits_are_a_tie_in_any_batch() -> None:
    adapter, x = adapter_of(576), tokens_of(576, 2000, torch.bfloat16)
    with torch.no_grad():
        adapter.mask_weight[1::2] = adapter.mask_weight[::2]
    together = kept(adapter, x, len(x))
    assert torch.equal(kept(adapter, x, 1), together)
    assert torch.equal(kept(adapter, torch.zeros(3, 576), 1), torch.zeros(3, RANK, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_training_keeps_what_inference_keeps(dtype: torch.dtype) -> None:
    adapter, x = adapter_of(576), tokens_of(576, 600, dtype)
    expected = kept(adapter, x, 1)
    found = adapter.train()(x, torch.zeros(len(x), OUT, dtype=dtype))
    assert torch.equal(found[:, :RANK] != 0, expected)


@pytest.mark.parametrize("transform", ["plain", "forward mode", "second derivative"])
def test_the_projections_derivatives(transform: str) -> None:
    x, a = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    inputs = (x.requires_grad_(), a.requires_grad_())
    if transform == "second derivative":
        assert torch.autograd.gradgradcheck(choice_projection, inputs)
    else:
        assert torch.autograd.gradcheck(choice_projection, inputs, check_forward_ad=transform == "forward mode")
    _, tangent = torch.func.jvp(choice_projection, (x, a), (torch.ones_like(x), torch.zeros_like(a)))
    torch.testing.assert_close(tangent, torch.ones(5, 7, dtype=torch.float64) @ a)
    batched = torch.func.vmap(lambda row: choice_projection(row.unsqueeze(0), a))(x)
    torch.testing.assert_close(batched.squeeze(1), x @ a)


# balance


def one_sequence(tokens: int) -> object:
    return sequences_of(torch.Size((1, tokens)), torch.device("cpu"), None, None, None)


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("k", [1, 2, 8, 16])
def test_balance_is_zero_without_a_slope_where_every_rank_is_used_alike(k: int, sharpness: float) -> None:
    one = torch.randn(1, RANK).sort(descending=True).values
    logits = (torch.cat([torch.roll(one, i, 1) for i in range(RANK)]) * sharpness).requires_grad_()
    value = mask_balance(straight_through_k_hot(logits, k, 1.0), k, one_sequence(RANK))  # type: ignore[arg-type]
    value.backward()
    assert float(value.detach()) < 1e-12
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-8


def test_balance_rewards_a_more_even_use_and_not_sharper_logits() -> None:
    logits = torch.randn(400, RANK)
    logits[:, 0] += 3.0  # almost always kept
    start = logits.clone().requires_grad_()
    values = []
    for factor in (0.1, 1.0, 10.0):
        mask = straight_through_k_hot(factor * start, KEPT, 1.0)
        usage = (logits.argsort(1, descending=True)[:, :KEPT, None] == torch.arange(RANK)).any(1).double().mean(0)
        values.append(mask_balance(mask, KEPT, one_sequence(400)))  # type: ignore[arg-type]
        assert float(values[-1].detach()) == pytest.approx(float(((usage - KEPT / RANK) ** 2).mean()), rel=1e-5)
    slope = torch.autograd.grad(values[1], start)[0]
    assert slope.mean(0)[0] > 0, "down with what is used too much"
    assert float((slope * logits).sum()) >= 0, "sharper logits do not lower it"
    moved = start.detach().clone()
    for _ in range(300):
        moved.requires_grad_()
        value = mask_balance(straight_through_k_hot(moved, KEPT, 1.0), KEPT, one_sequence(400))  # type: ignore[arg-type]
        moved = (moved - 2000.0 * torch.autograd.grad(value, moved)[0]).detach()
    assert float(value.detach()) < 0.1 * float(values[1].detach())


# k = R


class Site(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.o_proj = nn.Linear(48, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", ["token", "task"])
def test_all_ranks_kept_train_as_the_lora_that_they_are(scope: str, form: str) -> None:
    lora = get_peft_model(Site(), LoraConfig(r=8, lora_alpha=16, target_modules=["o_proj"]))
    use_kernels(form)
    config = DynamicRankMaskConfig(
        total_rank=8, active_rank=8, value_gate=False, mask_scope=scope, target_modules=["o_proj"]
    )
    ours = get_peft_model(Site(), config)
    adapter = next(m for m in ours.modules() if isinstance(m, DynamicRankMaskAdapter))
    layer = lora.base_model.model.o_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_()
        adapter.A.copy_(a)
        adapter.B.copy_(b)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (lora, ours)]
    for _ in range(3):
        x = torch.randn(32, 48)
        for model, optimizer in zip((lora, ours), optimizers, strict=True):
            model.train()
            optimizer.zero_grad()
            model(x).square().mean().backward()
        torch.testing.assert_close(adapter.A.grad, a.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(adapter.B.grad, b.grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(adapter.mask_weight.grad, torch.zeros_like(adapter.mask_weight))  # type: ignore[arg-type]
        for optimizer in optimizers:
            optimizer.step()
    np.testing.assert_allclose(adapter.A.detach(), a.detach(), atol=1e-6)
