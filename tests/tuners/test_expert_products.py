"""Products of rows with the matrices of each row's own expert, against a loop over rows in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bem_peft.tuners.base import expert_products
from bem_peft.tuners.base.expert_products import ExpertMatrix, ExpertRows, each_rows

WAYS = ("picked", "grouped", "in turn")
IDS = torch.tensor([0, 0, 1, 3, 3, 3, 5])  # experts 2 and 4 have no rows
EXPERTS, WIDTH, OUT = 6, 12, 7


def choose(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_products, "PICKED_ROWS", 64 if way == "picked" else 0)
    monkeypatch.setattr(expert_products, "takes_grouped", lambda x: way == "grouped")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("times", [1, 3])
def test_each_row_meets_its_own_matrix(way: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and both gradients; x has so many rows for each of the ids. bfloat16, which grouped products take."""
    choose(way, monkeypatch)
    torch.manual_seed(0)
    x = torch.randn(times * len(IDS), WIDTH).bfloat16().requires_grad_()
    stack = torch.randn(EXPERTS, WIDTH, OUT).bfloat16().requires_grad_()
    weight = torch.randn(len(x), OUT).bfloat16()
    found = torch.mm(x, ExpertMatrix(stack, ExpertRows(IDS, EXPERTS)))  # type: ignore[arg-type]
    found.backward(weight)
    wide_x, wide_stack = (t.detach().double().requires_grad_() for t in (x, stack))
    rows = IDS.repeat_interleave(times).tolist()
    expected = torch.stack([wide_x[row] @ wide_stack[e] for row, e in enumerate(rows)])
    expected.backward(weight.double())
    assert x.grad is not None
    assert stack.grad is not None
    near = {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(found.double(), expected, **near)
    torch.testing.assert_close(x.grad.double(), wide_x.grad, **near)
    torch.testing.assert_close(stack.grad.double(), wide_stack.grad, **near)
    assert not stack.grad[[2, 4]].any()


@pytest.mark.parametrize("way", ["picked", "in turn"])
def test_what_a_formula_does_with_a_matrix(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(way, monkeypatch)
    torch.manual_seed(0)
    stack, x = torch.randn(EXPERTS, WIDTH, OUT).double(), torch.randn(len(IDS), WIDTH).double()
    biases, y = torch.randn(EXPERTS, 1, OUT).double(), torch.randn(len(IDS), OUT).double()
    rows = ExpertRows(IDS, EXPERTS)
    matrix, bias = ExpertMatrix(stack, rows), ExpertMatrix(biases, rows)
    product = torch.stack([row @ stack[e] for row, e in zip(x, IDS.tolist(), strict=True)])
    torch.testing.assert_close(torch.addmm(y, x, matrix, alpha=0.5), y + 0.5 * product)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.addmm(bias, x, matrix), biases[IDS, 0] + product)  # type: ignore[arg-type]
    turned = ExpertMatrix(stack.mT.contiguous(), rows)
    torch.testing.assert_close(nn.functional.linear(x, turned), product)  # type: ignore[arg-type]
    one = torch.mm(x[:1], matrix)  # type: ignore[arg-type]
    torch.testing.assert_close(one, torch.stack([x[0] @ stack[e] for e in IDS.tolist()]))
    torch.testing.assert_close(matrix.expand(len(IDS), WIDTH, OUT), stack[IDS])
    torch.testing.assert_close(each_rows(bias), biases[IDS, 0])
    picked = ExpertMatrix(stack[IDS], ExpertRows(IDS, EXPERTS, has_picked=True))
    torch.testing.assert_close(picked.picked(), stack[IDS])


def test_what_is_no_product_is_refused_by_name() -> None:
    matrix = ExpertMatrix(torch.zeros(EXPERTS, WIDTH, OUT), ExpertRows(IDS, EXPERTS))
    with pytest.raises(NotImplementedError, match="relu of a matrix of each expert"):
        nn.functional.relu(matrix)  # type: ignore[arg-type]
