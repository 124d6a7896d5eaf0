"""The operators against scipy, torch.kron and a plain sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from bem_peft.kernels.film import bounded_rows, token_rms
from bem_peft.kernels.hadamard import hadamard_transform
from bem_peft.kernels.kronecker import kronecker_project
from bem_peft.kernels.rank_mask import k_hot_mask, masked_update, straight_through_k_hot


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 64])
def test_hadamard_equals_scipy(size: int) -> None:
    x = torch.randn(size, 5, dtype=torch.float64)
    expected = hadamard(size) @ x.numpy() / np.sqrt(size)
    torch.testing.assert_close(hadamard_transform(x), torch.from_numpy(expected))
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), x)


def test_hadamard_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard_transform(torch.randn(6, 2))


def by_sorting(row: list[float], k: int) -> list[float]:
    kept = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    return [1.0 if i in kept else 0.0 for i in range(len(row))]


@pytest.mark.parametrize("k", [1, 3, 8])
def test_k_hot_keeps_the_largest_and_ties_by_index(k: int) -> None:
    logits = torch.randint(-2, 3, (50, 8)).float()  # ties everywhere
    logits[0] = 0.0
    expected = torch.tensor([by_sorting(row, k) for row in logits.tolist()])
    assert torch.equal(k_hot_mask(logits, k), expected)
    z = torch.randn(50, 8)
    y, b_t = torch.zeros(50, 8), torch.eye(8)
    for mode in (torch.no_grad(), torch.enable_grad()):  # dropped without a mask, and multiplied by one
        with mode:
            assert torch.equal(masked_update(y, z, None, logits, b_t, k, 1.0), z * expected)


def test_straight_through_has_the_hard_value_and_the_soft_gradient() -> None:
    logits = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, 6, dtype=torch.float64)
    mask = straight_through_k_hot(logits, 2, temperature=0.7)
    assert torch.equal(mask, k_hot_mask(logits.detach(), 2))
    (mask * weight).sum().backward()
    ordered = np.sort(logits.detach().numpy(), axis=1)[:, ::-1]
    threshold = (ordered[:, 1:2] + ordered[:, 2:3]) / 2
    soft = 1 / (1 + np.exp(-(logits.detach().numpy() - threshold) / 0.7))
    np.testing.assert_allclose(logits.grad.numpy(), weight.numpy() * soft * (1 - soft) / 0.7, rtol=1e-10)


@pytest.mark.parametrize("shape", [(1, 2, 3, 5, 7), (9, 3, 2, 4, 6), (4, 1, 1, 1, 8)])
def test_kronecker_projection_equals_the_explicit_product(shape: tuple[int, ...]) -> None:
    rows, u_rank, v_rank, u_dim, v_dim = shape
    u = torch.randn(u_rank, u_dim, dtype=torch.float64, requires_grad=True)
    v = torch.randn(v_rank, v_dim, dtype=torch.float64, requires_grad=True)
    x = torch.randn(u_dim * v_dim, rows, dtype=torch.float64).t().requires_grad_()  # not contiguous
    torch.testing.assert_close(kronecker_project(x, u, v), x @ torch.kron(u, v).t())
    assert torch.autograd.gradcheck(kronecker_project, (x, u, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_bounded_rows_hold_their_bound_in_every_dtype(scale: float, dtype: torch.dtype) -> None:
    rows = bounded_rows(torch.randn(30, 16) * scale, 2.0, 0.1, dtype)
    assert rows.dtype is dtype
    assert float(rows.double().abs().sum(1).max()) <= 0.1


def test_token_rms_is_the_root_mean_square() -> None:
    y = torch.randn(7, 33, dtype=torch.float64)
    np.testing.assert_allclose(token_rms(y).numpy()[:, 0], np.sqrt((y.numpy() ** 2).mean(1)))
