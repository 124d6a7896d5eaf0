"""Every field of every config acts, where the table says so, or is refused; a field without an entry fails."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

import bem_peft
from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
)
from bem_peft.tuners import pt3_kronecker
from bem_peft.tuners.base.adapter import Adapter
from bem_peft.tuners.base.adapter_config import default_of
from tests.contract.methods import adapter_parameters, randomize
from tests.tiny_models import build, tokens

# what is looked at


def model_of(config: Any, architecture: str = "llama", fresh: bool = False) -> Any:
    torch.manual_seed(0)
    base = build(architecture)
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    if not fresh:
        randomize(model)
    return model.eval()


def adapters(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


def shapes(config: Any, architecture: str = "llama") -> Any:
    return {
        name: tuple(t.shape) for name, t in model_of(config, architecture, True).state_dict().items() if "bem_" in name
    }


def output(config: Any, fresh: bool = False) -> Any:
    with torch.no_grad():
        return {"": model_of(config, fresh=fresh)(input_ids=tokens()).logits}


def trained(config: Any) -> Any:
    model = model_of(config).train()
    torch.manual_seed(2)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    return model, loss


def stepped(config: Any) -> Any:
    model, _ = trained(config)
    torch.optim.SGD(adapter_parameters(model).values(), lr=0.1).step()
    return {name: p.detach() for name, p in adapter_parameters(model).items()}


def unsound(config: Any) -> Any:
    """Whether the weights are finite after a step whose gradients are not."""
    model, _ = trained(config)
    parameters = adapter_parameters(model)
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, torch.inf)
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    return {name: bool(torch.isfinite(p).all()) for name, p in parameters.items()}


def file(config: Any, tmp: Path) -> Any:
    config.save_pretrained(str(tmp))
    return json.loads((tmp / "adapter_config.json").read_text())


LOOKS: dict[str, Callable[[Any], Any]] = {
    "shapes": shapes,
    "shapes of experts": lambda config: shapes(config, "qwen2_moe"),
    "class": lambda config: {"": type(model_of(config, fresh=True)).__name__},
    "trainable": lambda config: {n: p.requires_grad for n, p in model_of(config, fresh=True).named_parameters()},
    "file of tensors": lambda config: dict.fromkeys(get_peft_model_state_dict(model_of(config, fresh=True))),
    "start": lambda config: {n: p.detach() for n, p in adapter_parameters(model_of(config, fresh=True)).items()},
    "fresh output": lambda config: output(config, True),
    "output": output,
    "loss in training": lambda config: {"": trained(config)[1].detach()},
    "gradients": lambda config: {n: p.grad for n, p in adapter_parameters(trained(config)[0]).items()},
    "a step": stepped,
    "a step of infinite gradients": unsound,
}


def differ(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a.keys() != b.keys():
        return True
    return any(not torch.equal(x, b[n]) if isinstance(x, torch.Tensor) else x != b[n] for n, x in a.items())


@dataclasses.dataclass(frozen=True)
class Sets:
    """`value` for the field, beside other fields, changes `seen_in`; or raises, `error` in the message."""

    value: Any
    seen_in: str = ""
    error: str = ""
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)


COMMON = {
    "task_type": Sets("CAUSAL_LM", "class"),
    "peft_type": Sets("LORA", error="`peft_type` = 'LORA'"),
    "auto_mapping": Sets({"a": "b"}, "file"),
    "peft_version": Sets("0.1", "file"),
    "base_model_name_or_path": Sets("somewhere", "file"),
    "revision": Sets("main", "file"),
    "inference_mode": Sets(True, "trainable"),
    "target_modules": Sets(["layers.1.mlp.down_proj"], "shapes"),
    "exclude_modules": Sets(r".*layers\.1\..*", "shapes"),
    "modules_to_save": Sets(["lm_head"], "file of tensors"),
    "layers_to_transform": Sets([1], "shapes"),
    "layers_pattern": Sets(
        "h", error="(?i)target modules.*not found", beside={"layers_to_transform": [1], "target_modules": ["down_proj"]}
    ),
    "sites": Sets(["mlp_down"], "shapes"),
    "fused_experts": Sets("skip", "shapes of experts"),
    "expert_sharing": Sets("each", "shapes of experts"),
    "budget": Sets("lora:r=10", "shapes"),
    "init_weights": Sets(False, "fresh output"),
}
LOW_RANK = {
    "scaling": Sets(3.0, "output"),
    "dropout": Sets(0.5, "loss in training"),
    "max_singular_value": Sets(0.01, "a step"),
    "fro_budget": Sets(0.01, "a step"),
}
TABLE: dict[type, dict[str, Sets]] = {
    HeadGroupGatingConfig: {
        **COMMON,
        **LOW_RANK,
        "target_modules": Sets(["layers.1.self_attn.o_proj"], "shapes"),
        "layers_pattern": Sets(
            "h",
            error="(?i)target modules.*not found",
            beside={"layers_to_transform": [1], "target_modules": ["o_proj"]},
        ),
        "rank_pattern": Sets({r"layers\.0\..*": 2}, "shapes"),
        "sites": Sets(["mlp_down"], error="`sites`"),
        # W_O is never a fused expert weight: the policy has nothing to decide, and says the same for all methods
        "fused_experts": Sets("skip", "nothing"),
        "expert_sharing": Sets("each", error="`expert_sharing` = 'each': no fused experts"),
        "num_groups": Sets(2, "shapes"),
        "strict_groups": Sets(True, error="`num_groups` = 3", beside={"num_groups": 3}),
        "num_heads": Sets(8, "shapes"),
        "rank_per_group": Sets([1, 2, 3, 4], "shapes"),
        "total_rank": Sets(6, "shapes"),
        "gate_temperature": Sets(0.5, "output"),
        "gate_dropout": Sets(0.5, "loss in training"),
        "decorrelation_strength": Sets(1.0, "gradients"),
        "decorrelation_anneal_steps": Sets(5, "shapes", beside={"decorrelation_strength": 1.0}),
        "gate_entropy_strength": Sets(1.0, "gradients"),
        "attention_stats": Sets("exact", "output"),
        "retrieval": Sets("quality", "shapes"),
    },
    DynamicRankMaskConfig: {
        **COMMON,
        **LOW_RANK,
        "rank_pattern": Sets({r"layers\.0\.mlp.*": {"active_rank": 2}}, "output"),
        "total_rank": Sets(32, "shapes"),
        "active_rank": Sets(3, "output"),
        "use_hadamard_path": Sets(False, "output"),
        "value_gate": Sets(False, "shapes"),
        "num_blocks": Sets(4, "shapes"),
        "mask_scope": Sets("task", "shapes"),
        "mask_temperature": Sets(0.3, "gradients"),
        "balance_strength": Sets(1.0, "gradients"),
    },
    KroneckerConfig: {
        **COMMON,
        **LOW_RANK,
        "rank_pattern": Sets({r"layers\.0\.mlp.*": 2}, "shapes"),
        "sites": Sets(["attention_output"], error="`sites`"),
        "u_rank": Sets(5, "shapes"),
        "v_rank": Sets(5, "shapes"),
        "u_dim": Sets(12, "shapes"),
        "v_dim": Sets(4, "shapes"),
        "init_method": Sets("random", "start"),
        "single_site_layer": Sets(0, "shapes"),
        "orthogonality_strength": Sets(1.0, "gradients"),
        "diversity_strength": Sets(1.0, "gradients"),
    },
    ResidualFiLMConfig: {
        **COMMON,
        "rank_pattern": Sets({r"layers\.0\.mlp.*": 2}, "shapes"),
        "scaling": Sets(4.0, error="`scaling` = 4.0.*clamp_range"),
        "gamma_dim": Sets(3, "shapes"),
        "beta_dim": Sets(3, "shapes"),
        "mode": Sets("spatial", "shapes"),
        "clamp_range": Sets(0.3, "output"),
        "max_beta": Sets(0.3, "output"),
        "beta_unit": Sets("absolute", "output"),
        "controller_unit": Sets("absolute", "output"),
        "minimal_overhead": Sets(True, error="`minimal_overhead`"),
        "emergency_stabilization": Sets(False, "a step of infinite gradients"),
        "explosion_threshold": Sets(1e-3, "a step"),
    },
    CompositeConfig: {
        **COMMON,
        "rank_pattern": Sets({"x": 2}, error="`rank_pattern`.*method's own"),
        "sites": Sets(["mlp_down"], error="`sites`.*method's own"),
        "scaling": Sets(3.0, error="`scaling`.*method's own"),
        "methods": Sets([DynamicRankMaskConfig()], "shapes"),
    },
}
SMALL = {"u_rank": 4, "v_rank": 3}
BASE: dict[type, Callable[[], dict[str, Any]]] = {
    KroneckerConfig: lambda: dict(SMALL),
    CompositeConfig: lambda: {"methods": [HeadGroupGatingConfig(), KroneckerConfig(**SMALL)]},
}
CASES = [(cls, name) for cls, cases in TABLE.items() for name in cases]


@pytest.mark.parametrize("cls", list(TABLE), ids=lambda cls: cls.__name__)
def test_the_table_has_every_field(cls: type) -> None:
    assert set(TABLE[cls]) == {field.name for field in dataclasses.fields(cls)}


@pytest.mark.filterwarnings("ignore:PT1 at down_proj, whose input is no heads:UserWarning")
@pytest.mark.filterwarnings("ignore:retrieval=.*remove_unused_columns:UserWarning")
@pytest.mark.parametrize(("cls", "name"), CASES, ids=[f"{cls.__name__}-{name}" for cls, name in CASES])
def test_a_field_acts_or_is_refused(cls: type, name: str, tmp_path: Path) -> None:
    case = TABLE[cls][name]
    base = {**BASE.get(cls, dict)(), **case.beside}

    def config(**changes: Any) -> Any:
        return cls(**{**base, **changes})

    if not case.seen_in:
        model_of(config())
        with pytest.raises((ValueError, TypeError), match=case.error):
            model_of(config(**{name: case.value}))
        return
    if case.seen_in == "nothing":
        return
    if case.seen_in == "file":
        found = [file(config(**change), tmp_path) for change in ({}, {name: case.value})]
        assert found[0] != found[1]
        return
    if case.seen_in == "shapes of experts":
        assert shapes(config(**{name: case.value}), "qwen2_moe") != shapes(config(), "qwen2_moe")
        return
    look = LOOKS[case.seen_in]
    plain = look(config())
    assert not differ(plain, look(config())), "the same twice"
    assert differ(plain, look(config(**{name: case.value})))


# combinations in which a field would do nothing

INERT: list[tuple[type, dict[str, Any], str]] = [
    (HeadGroupGatingConfig, {"total_rank": 8, "rank_per_group": 3}, "rank_per_group"),
    (HeadGroupGatingConfig, {"rank_pattern": {"o_proj": {"rank_per_group": 3, "total_rank": 12}}}, "rank_per_group"),
    (DynamicRankMaskConfig, {"active_rank": 16, "mask_temperature": 0.5}, "mask_temperature"),
    (DynamicRankMaskConfig, {"active_rank": 16, "balance_strength": 0.5}, "balance_strength"),
    (DynamicRankMaskConfig, {"mask_scope": "task", "balance_strength": 0.5}, "balance_strength"),
    (ResidualFiLMConfig, {"scaling": 100.0}, "scaling"),
    (ResidualFiLMConfig, {"mode": "static", "gamma_dim": 64}, "gamma_dim"),
    (ResidualFiLMConfig, {"mode": "static", "beta_dim": 3}, "beta_dim"),
    (ResidualFiLMConfig, {"mode": "static", "rank_pattern": {"o_proj": {"gamma_dim": 3}}}, "gamma_dim"),
    (ResidualFiLMConfig, {"clamp_range": 0.0, "gamma_dim": 64}, "gamma_dim"),
    (ResidualFiLMConfig, {"max_beta": 0.0, "beta_dim": 64}, "beta_dim"),
    (ResidualFiLMConfig, {"max_beta": 0.0, "beta_unit": "absolute"}, "beta_unit"),
    (ResidualFiLMConfig, {"mode": "static", "controller_unit": "absolute"}, "controller_unit"),
    (ResidualFiLMConfig, {"emergency_stabilization": False, "explosion_threshold": 10.0}, "explosion_threshold"),
]


@pytest.mark.parametrize(("cls", "fields", "name"), INERT)
def test_what_would_do_nothing_is_refused_but_in_files_that_exist(cls: type, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` = "):
        cls(**fields)
    from_file: Any = cls(**fields, inference_mode=True)
    from_file.inference_mode = False  # as PEFT does to train on
    before = shapes(from_file)
    assert not differ(before, shapes(dataclasses.replace(from_file, inference_mode=True)))
    assert from_file.with_sizes().is_from_file


def ranks(**fields: Any) -> list[Any]:
    return [adapter.ranks for adapter in adapters(model_of(HeadGroupGatingConfig(**fields)))]


@pytest.mark.parametrize("size", [3, {"rank_per_group": 3}])
def test_rank_per_group_of_one_module_beside_a_total(size: Any, tmp_path: Path) -> None:
    first, second = [3] * 4, [2] * 4
    pattern = {r"layers\.0\..*": size}
    assert ranks(total_rank=8, rank_pattern=pattern) == [first, second]
    model = model_of(HeadGroupGatingConfig(total_rank=8, rank_pattern=pattern))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    assert [adapter.ranks for adapter in adapters(again)] == [first, second]
    resized = HeadGroupGatingConfig(rank_pattern=pattern).with_sizes(total_rank=8)
    assert [adapter.ranks for adapter in adapters(model_of(resized))] == [first, second]
    assert ranks(total_rank=8, rank_pattern=pattern, inference_mode=True) == [second, second], "a file of before"
    assert ranks(rank_pattern={r"layers\.0\..*": {"total_rank": 6}}) == [[2, 2, 1, 1], [4] * 4]


def test_sites_beside_target_modules_must_agree() -> None:
    fields: dict[str, Any] = {"sites": ["mlp_down"], "target_modules": ["o_proj", "down_proj"]}
    with pytest.raises(ValueError, match=r"`sites` = \['mlp_down'\].*o_proj"):
        model_of(DynamicRankMaskConfig(**fields))
    assert len(adapters(model_of(DynamicRankMaskConfig(**fields, inference_mode=True)))) == 4, "a file of before"
    config = DynamicRankMaskConfig(sites=["mlp_down"], target_modules=["down_proj"])
    assert len(adapters(model_of(config))) == 2
    config = DynamicRankMaskConfig(sites=["mlp_down"])
    for _ in range(2):  # one config for two models
        assert len(adapters(model_of(config))) == 2


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_a_pattern_or_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`rank_pattern` has the keys \['layers.7'\]"):
        model_of(DynamicRankMaskConfig(rank_pattern={r"layers.7": 32}))
    with pytest.raises(ValueError, match=r"`layers_to_transform` = \[0, 2\].*2 blocks.*leave \[2\] out"):
        model_of(DynamicRankMaskConfig(layers_to_transform=[0, 2]))
    with pytest.raises(ValueError, match=r"`layers_to_transform` = 1: .*layers.0.mlp.down_proj in full"):
        model_of(KroneckerConfig(**SMALL, layers_to_transform=1, target_modules=["model.layers.0.mlp.down_proj"]))
    with pytest.raises(ValueError, match=r"`layers_pattern` = 'layers' is of use beside `target_modules` alone"):
        model_of(KroneckerConfig(**SMALL, layers_to_transform=1, layers_pattern="layers"))
    model_of(DynamicRankMaskConfig(rank_pattern={r"layers.7": 32}, inference_mode=True))


# the methods of a composite


@pytest.mark.parametrize("whole", [True, False])
def test_a_methods_init_weights_acts_in_a_composite(whole: bool) -> None:
    parts = [HeadGroupGatingConfig(), KroneckerConfig(**SMALL, init_weights=False)]
    for adapter in adapters(model_of(CompositeConfig(parts, init_weights=whole), fresh=True)):
        is_start = bool((adapter.B == 0).all())
        assert is_start == (whole and type(adapter).__name__ == "HeadGroupGatingAdapter")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task_type", "CAUSAL_LM"), ("inference_mode", True), ("auto_mapping", {"a": "b"}), ("revision", "main"),
        ("base_model_name_or_path", "somewhere"), ("modules_to_save", ["lm_head"]),
    ],
)  # fmt: skip
def test_what_is_the_composites_is_refused_in_a_method(name: str, value: Any) -> None:
    part = KroneckerConfig(**SMALL, **{name: value})
    for given in (part, part.to_dict()):
        with pytest.raises(ValueError, match=rf"`{name}` = .*stands in the composite"):
            CompositeConfig([HeadGroupGatingConfig(), given])
    assert CompositeConfig([part], inference_mode=True).methods, "a file of before"
    if name != "modules_to_save":
        assert CompositeConfig([part], **{name: value}).methods


def test_every_field_of_peft_is_the_composites() -> None:
    """A field that a later PEFT adds would be refused in a method, not ignored."""
    from bem_peft.tuners.composite import WHOLE

    assert {f.name for f in dataclasses.fields(PeftConfig)} - {"peft_type"} <= set(WHOLE)


def test_a_composites_field_that_every_method_has_of_its_own_is_refused() -> None:
    def parts() -> list[Any]:
        return [HeadGroupGatingConfig(layers_to_transform=[0]), KroneckerConfig(**SMALL, layers_to_transform=[1])]

    with pytest.raises(ValueError, match=r"`layers_to_transform` = \[1, 0\]: every method has its own"):
        CompositeConfig(parts(), layers_to_transform=[1, 0])
    named = [HeadGroupGatingConfig(target_modules=["o_proj"]), KroneckerConfig(**SMALL, target_modules=["down_proj"])]
    with pytest.raises(ValueError, match=r"`target_modules`.*every method has its own"):
        CompositeConfig(named, target_modules=["q_proj"])
    config = CompositeConfig(named)
    model_of(config)
    assert config.target_modules == {"o_proj", "down_proj"}
    assert dataclasses.replace(config).target_modules == config.target_modules


def test_a_composite_loaded_for_inference_decomposes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = pt3_kronecker.higher_order_svd
    monkeypatch.setattr(pt3_kronecker, "higher_order_svd", lambda *a: (calls.append(a), original(*a))[1])
    model = model_of(CompositeConfig([KroneckerConfig(**SMALL)], task_type="CAUSAL_LM"))
    assert len(calls) == 2
    model.save_pretrained(tmp_path)
    calls.clear()
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert not calls
    assert not any(p.requires_grad for p in loaded.parameters())
    again = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    assert all(p.requires_grad for p in adapter_parameters(again).values())
    saved, found = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert not differ(saved, found)
    assert (
        bem_peft.CompositeConfig.from_pretrained(str(tmp_path)).methods[0].u_rank
        == default_of(KroneckerConfig(), "u_rank") - 4
    )


def test_a_composites_own_constructor_has_the_defaults_of_the_fields() -> None:
    fields = {field.name: default_of(CompositeConfig(), field.name) for field in dataclasses.fields(CompositeConfig)}
    given = inspect.signature(CompositeConfig).parameters
    told = {name: parameter.default for name, parameter in given.items() if name not in ("methods", "rank_pattern")}
    assert told == {name: fields[name] for name in told}
    assert set(given) == set(fields)
