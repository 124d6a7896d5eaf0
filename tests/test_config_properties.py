"""Property: a config either builds an adapter that trains, or raises ValueError/TypeError with the field's name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, get_peft_model
from torch import nn

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
)

numbers = st.one_of(
    st.floats(0.01, 0.9),
    st.floats(1.0, 3.0),
    st.sampled_from([0.0, 1.0, float("nan"), float("inf"), -1.0, "0.5"]),
    st.none(),
)
sizes = st.one_of(st.integers(-1, 20), st.sampled_from([2.0, True, "4", None]))
flags = st.one_of(st.booleans(), st.sampled_from([0, "yes"]))


def words(*valid: str) -> st.SearchStrategy[Any]:
    return st.sampled_from([*valid, "other", 1])


COMMON = {"scaling": numbers}
LOW_RANK = {"dropout": numbers, "max_singular_value": numbers, "fro_budget": numbers}
FIELDS: dict[type, dict[str, st.SearchStrategy[Any]]] = {
    HeadGroupGatingConfig: {
        "num_groups": sizes,
        "strict_groups": flags,
        "num_heads": sizes,
        "rank_per_group": st.one_of(sizes, st.lists(st.integers(0, 4), max_size=4)),
        "total_rank": sizes,
        "gate_temperature": numbers,
        "gate_dropout": numbers,
        "decorrelation_strength": numbers,
        "retrieval": words("none", "quality", "scores"),
        **LOW_RANK,
    },
    DynamicRankMaskConfig: {
        "total_rank": sizes,
        "active_rank": sizes,
        "use_hadamard_path": flags,
        "value_gate": flags,
        "mask_scope": words("token", "task"),
        "mask_temperature": numbers,
        "balance_strength": numbers,
        **LOW_RANK,
    },
    KroneckerConfig: {
        "u_rank": sizes,
        "v_rank": sizes,
        "u_dim": sizes,
        "v_dim": sizes,
        "init_method": words("svd", "orthogonal", "random"),
        "orthogonality_strength": numbers,
        "diversity_strength": numbers,
        **LOW_RANK,
    },
    ResidualFiLMConfig: {
        "gamma_dim": sizes,
        "beta_dim": sizes,
        "mode": words("channel", "spatial", "static"),
        "clamp_range": numbers,
        "max_beta": numbers,
        "beta_unit": words("rms", "absolute"),
        "controller_unit": words("rms", "absolute"),
        "emergency_stabilization": flags,
        "explosion_threshold": st.sampled_from([100.0, 1e6, 0.0, -1.0, float("nan"), "1e6", None]),
    },
}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(96, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.project(x))


def try_config(cls: type, values: dict[str, Any]) -> bool:
    """True where the adapter was built and trained, False where it was refused with the name of a field."""
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    base = Tiny()(x)
    try:
        model = get_peft_model(Tiny(), cls(target_modules=["project"], **values))
    except (ValueError, TypeError) as error:
        names = {field.name for field in dataclasses.fields(cls)}
        if not any(f"`{name}`" in str(error) for name in names):
            raise AssertionError("no field is named") from error
        return False
    assert torch.equal(model(x), base)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.02)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable)
        optimizer.step()
    model.eval()
    assert torch.isfinite(model(x)).all()
    assert not torch.equal(model(x), base)
    return True


@pytest.mark.filterwarnings("ignore:retrieval=.*remove_unused_columns:UserWarning")
@pytest.mark.parametrize("cls", FIELDS, ids=lambda cls: cls.__name__)
def test_a_config_builds_what_trains_or_names_the_field(cls: type) -> None:
    outcomes: set[bool] = set()

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        strategies = {**COMMON, **FIELDS[cls]}
        chosen = data.draw(st.sets(st.sampled_from(sorted(strategies)), max_size=3))
        values = {name: data.draw(strategies[name], label=name) for name in sorted(chosen)}
        outcomes.add(try_config(cls, values))

    run()
    assert outcomes == {True, False}, "both sides were seen"


@pytest.mark.parametrize("cls", [*FIELDS, CompositeConfig], ids=lambda cls: cls.__name__)
def test_a_config_survives_saving(cls: type, tmp_path: Path) -> None:
    config = cls(target_modules=["a", "b"], task_type="CAUSAL_LM")
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is cls
    assert loaded.to_dict() == config.to_dict()


def test_every_field_has_its_help() -> None:
    for cls in (*FIELDS, CompositeConfig):
        for field in dataclasses.fields(cls):
            assert field.metadata.get("help"), f"{cls.__name__}.{field.name}"
