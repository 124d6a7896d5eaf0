"""Files of other versions, other classes of models and other loaders: they load as PEFT's own do, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
)
from bem_peft.tuners.base.layer import AdapterLinear
from bem_peft.upstream import RefusedByTransformersError, refused_by_transformers
from tests.contract.invariants import logits
from tests.contract.methods import METHODS, adapted, randomize
from tests.tiny_models import build, tokens

O_PROJ = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
DOWN_PROJ = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
TARGETS: dict[str, tuple[Any, Any]] = {
    "found": (None, None),
    "full": (O_PROJ, DOWN_PROJ),
    "short": (["o_proj"], ["down_proj"]),
    "longer": (["self_attn.o_proj"], ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]),
    "pattern": (r".*\.o_proj", r"model\.layers\.\d+\.mlp\.down_proj"),
    "pattern and names": (r".*\.self_attn\.o_proj", DOWN_PROJ),
}
KINDS: dict[str, Callable[[Any, Any], Any]] = {
    "composite": lambda o, down: CompositeConfig(
        [HeadGroupGatingConfig(target_modules=o), KroneckerConfig(u_rank=3, v_rank=2, target_modules=down)]
    ),
    "composite, as a whole": lambda o, down: CompositeConfig(
        [DynamicRankMaskConfig(total_rank=4, active_rank=2), ResidualFiLMConfig(gamma_dim=2, beta_dim=2)],
        target_modules=down,
    ),
    "kronecker": lambda o, down: KroneckerConfig(u_rank=3, v_rank=2, target_modules=down),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved(base: Path, folder: Path, config: Any) -> nn.Module:
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


def by_peft(base: Path, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def by_peft_without_memory(base: Path, folder: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True).eval()


def by_auto_class(base: Path, folder: Path) -> nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(folder).eval()


def as_a_second(base: Path, folder: Path) -> nn.Module:
    model = by_peft(base, folder)
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model


def by_injection(base: Path, folder: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base)
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = True
    inject_adapter_in_model(config, model, adapter_name="own")
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), adapter_name="own")
    return model.eval()


def by_transformers(base: Path, folder: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(folder, adapter_name="own")
    return model.eval()


def by_transformers_folder(base: Path, folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


ROADS = [
    by_peft, by_peft_without_memory, by_auto_class, as_a_second, by_injection,
    # where transformers refuses the installed peft, tests/test_upstream.py holds the error
    *([] if refused_by_transformers() is not None else [by_transformers, by_transformers_folder]),
]  # fmt: skip


@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
@pytest.mark.parametrize("targets", list(TARGETS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_names_and_patterns_are_found_again(
    kind: str, targets: str, road: Callable[[Path, Path], nn.Module], base: Path, tmp_path: Path
) -> None:
    model = saved(base, tmp_path / "adapter", KINDS[kind](*TARGETS[targets]))
    expected = logits(model, input_ids=tokens())
    assert not torch.equal(expected, logits(build("llama"), input_ids=tokens()))
    assert torch.equal(logits(road(base, tmp_path / "adapter"), input_ids=tokens()), expected)


@pytest.mark.parametrize("targets", ["found", "full", "short", "longer"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_model_without_its_head_loads_what_was_made_with_it(
    kind: str, targets: str, base: Path, tmp_path: Path
) -> None:
    """transformers' own loading drops the prefix of the keys; the names in the config have it too."""
    model = saved(base, tmp_path / "adapter", KINDS[kind](*TARGETS[targets]))
    with torch.no_grad():
        expected = model(input_ids=tokens(), output_hidden_states=True).hidden_states[-1]
    headless = AutoModel.from_pretrained(base).eval()
    if refused_by_transformers() is not None:  # as it refuses the installed peft, LoRA included
        with pytest.raises(RefusedByTransformersError):
            headless.load_adapter(tmp_path / "adapter")
        return
    headless.load_adapter(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(headless(input_ids=tokens()).last_hidden_state, expected)


@pytest.mark.parametrize(
    "config",
    [
        lambda: CompositeConfig([DynamicRankMaskConfig(), ResidualFiLMConfig()], target_modules="all-linear"),
        lambda: CompositeConfig([ResidualFiLMConfig(target_modules="all-linear"), KroneckerConfig(u_rank=2, v_rank=2)]),
        lambda: ResidualFiLMConfig(target_modules="all-linear"),
    ],
    ids=["composite", "a part of it", "film"],
)
def test_all_linear_is_what_it_is_for_lora(config: Any, base: Path, tmp_path: Path) -> None:
    lora = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    expected = {name for name, module in lora.named_modules() if hasattr(module, "lora_A")}
    model = saved(base, tmp_path / "adapter", config())
    container = "bem_film_adapter" if isinstance(config(), ResidualFiLMConfig) else "bem_composite_film"
    adapted_by_film = {
        name
        for name, module in model.named_modules()
        if isinstance(module, AdapterLinear) and "default" in getattr(module, container)
    }
    assert adapted_by_film == expected
    found = logits(by_peft(base, tmp_path / "adapter"), input_ids=tokens())
    assert torch.equal(found, logits(model, input_ids=tokens()))


# newer files


def with_newer_fields(folder: Path) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["methods"][0]["brand_new"] = 3
    config["methods"][1]["also_new"] = None
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
def test_an_unknown_field_of_a_method_is_named_and_ignored(
    road: Callable[[Path, Path], nn.Module], base: Path, tmp_path: Path
) -> None:
    model = saved(base, tmp_path / "adapter", KINDS["composite"](None, None))
    with_newer_fields(tmp_path / "adapter")
    with (
        pytest.warns(UserWarning, match=r"\['brand_new'\] for class HeadGroupGatingConfig in `methods`.*-U bem_peft"),
        pytest.warns(UserWarning, match=r"\['also_new'\] for class KroneckerConfig"),
    ):
        loaded = road(base, tmp_path / "adapter")
    assert torch.equal(logits(loaded, input_ids=tokens()), logits(model, input_ids=tokens()))


def test_an_unknown_field_that_somebody_wrote_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"has no field \['u_rnak'\]"):
        CompositeConfig([{"peft_type": "BEM_KRONECKER", "u_rnak": 4}])


def test_a_method_of_a_newer_version_is_an_error(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter", KINDS["composite"](None, None))
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["methods"][0]["peft_type"] = "BEM_NEWER"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"BEM_NEWER.*`peft_type` must be one of"):
        PeftConfig.from_pretrained(tmp_path / "adapter")


def test_the_dictionary_of_a_config_makes_it_again() -> None:
    config = KINDS["composite"](*TARGETS["full"])
    again = CompositeConfig([{**part} for part in config.to_dict()["methods"]])
    assert again.to_dict()["methods"] == config.to_dict()["methods"]


# what loading costs


@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_loading_for_inference_decomposes_nothing(
    method: str, road: Callable[[Path, Path], nn.Module], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []

    def count(name: str) -> None:
        original = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda *a, **k: (counted.append(name), original(*a, **k))[1])

    for name in ("qr", "svd", "eigh", "eigvalsh", "svdvals"):
        count(name)
    model = adapted(method, "llama")
    made = len(counted)
    assert bool(made) == (method in ("kronecker", "composite"))
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    counted.clear()
    loaded = road(base, tmp_path / "adapter")
    assert counted == []
    assert torch.equal(logits(loaded, input_ids=tokens()), logits(model, input_ids=tokens()))


# what PEFT has for some methods alone


def test_mixed_models_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"BEM_KRONECKER.*(not supported|not compatible|not allowed)"):
        PeftMixedModel(build("llama"), KroneckerConfig(u_rank=2, v_rank=2, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("method", METHODS)
def test_hot_swapping_works_or_is_refused_by_name(method: str, base: Path, tmp_path: Path) -> None:
    model = adapted(method, "llama")
    other = adapted(method, "llama")
    randomize(other, seed=9)
    other.save_pretrained(tmp_path / "other")
    before = logits(model, input_ids=tokens())
    try:
        hotswap_adapter(model, str(tmp_path / "other"), adapter_name="default")
    except (ValueError, KeyError, NotImplementedError) as error:
        assert "bem_" in str(error).lower()  # noqa: PT017
        assert torch.equal(logits(model, input_ids=tokens()), before)
    else:
        assert torch.equal(logits(model, input_ids=tokens()), logits(other, input_ids=tokens()))
