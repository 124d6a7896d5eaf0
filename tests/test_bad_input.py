"""Wrong configs, calls and files: each ends in an error that names what is wrong and what to change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import bem_peft
from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
    SpectralGovernance,
    export_lora,
)
from tests.contract.methods import EVERY, adapted
from tests.tiny_models import build, tokens

PT1, PT2, PT3, PT4 = HeadGroupGatingConfig, DynamicRankMaskConfig, KroneckerConfig, ResidualFiLMConfig
NAN, INF = float("nan"), float("inf")

# (call, exception, what the message must say)
CONFIGS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "negative scaling": (lambda: PT3(scaling=-1.0), ValueError, "`scaling` = -1.0"),
    "zero scaling": (lambda: PT1(scaling=0), ValueError, "`scaling` = 0"),
    "NaN scaling": (lambda: PT2(scaling=NAN), ValueError, "`scaling` = nan.*finite"),
    "text for a number": (lambda: PT4(scaling="2"), TypeError, "`scaling` = '2'.*number"),
    "rank 0": (lambda: PT3(u_rank=0), ValueError, "`u_rank` = 0.*at least 1"),
    "float rank": (lambda: PT3(v_rank=2.0), TypeError, "`v_rank` = 2.0.*int"),
    "bool rank": (lambda: PT2(total_rank=True), TypeError, "`total_rank` = True.*int"),
    "k above R": (lambda: PT2(total_rank=8, active_rank=9), ValueError, "`active_rank` = 9.*at most 8"),
    "R no power of two": (lambda: PT2(total_rank=12), ValueError, "`total_rank` = 12.*power of two.*use 16"),
    "temperature 0": (lambda: PT2(mask_temperature=0.0), ValueError, "`mask_temperature` = 0.0"),
    "unknown scope": (lambda: PT2(mask_scope="batch"), ValueError, "`mask_scope` = 'batch'.*'token', 'task'"),
    "unknown mode": (lambda: PT4(mode="row"), ValueError, "`mode` = 'row'.*'channel'"),
    "clamp of 1": (lambda: PT4(clamp_range=1.0), ValueError, "`clamp_range` = 1.0.*below 1"),
    "negative clamp": (lambda: PT4(clamp_range=-0.1), ValueError, "`clamp_range` = -0.1"),
    "nothing left": (lambda: PT4(clamp_range=0.0, max_beta=0.0), ValueError, "`max_beta` = 0.0.*clamp_range"),
    "infinite beta": (lambda: PT4(max_beta=INF), ValueError, "`max_beta` = inf"),
    "unknown controller unit": (lambda: PT4(controller_unit="std"), ValueError, "`controller_unit` = 'std'"),
    "unknown unit": (lambda: PT4(beta_unit="std"), ValueError, "`beta_unit` = 'std'"),
    "truthy flag": (lambda: PT4(minimal_overhead=1), TypeError, "`minimal_overhead` = 1.*True or False"),
    "unknown statistics": (lambda: PT1(attention_stats="eager"), ValueError, "`attention_stats` = 'eager'"),
    "unknown retrieval": (lambda: PT1(retrieval="bm25"), ValueError, "`retrieval` = 'bm25'"),
    "empty rank list": (lambda: PT1(rank_per_group=[]), ValueError, r"`rank_per_group` = \[\]"),
    "rank list of text": (lambda: PT1(rank_per_group=["4"]), TypeError, "`rank_per_group`"),
    "gate dropout of 1": (lambda: PT1(gate_dropout=1.0), ValueError, "`gate_dropout` = 1.0"),
    "negative penalty": (lambda: PT1(decorrelation_strength=-1.0), ValueError, "`decorrelation_strength` = -1.0"),
    "dropout above 1": (lambda: PT3(dropout=1.5), ValueError, "`dropout` = 1.5"),
    "unknown init": (lambda: PT3(init_method="pissa"), ValueError, "`init_method` = 'pissa'.*'svd'"),
    "cap of 0": (lambda: PT3(max_singular_value=0.0), ValueError, "`max_singular_value` = 0.0"),
    "two layers": (
        lambda: PT3(single_site_layer=1, layers_to_transform=[0]),
        ValueError,
        "`single_site_layer` = 1.*layers_to_transform",
    ),
    "negative layer": (lambda: PT2(layers_to_transform=[-1]), ValueError, "`layers_to_transform`.*at least 0"),
    "no layer": (lambda: PT2(layers_to_transform=[]), TypeError, "`layers_to_transform`"),
    "pattern alone": (lambda: PT2(layers_pattern="h"), ValueError, "`layers_pattern`.*layers_to_transform"),
    "foreign site": (lambda: PT3(sites=["attention_output"]), ValueError, "`sites`.*mlp_down"),
    "unknown site": (lambda: PT2(sites=["q_proj"]), ValueError, "`sites`"),
    "unknown pattern field": (lambda: PT3(rank_pattern={"x": {"r": 2}}), ValueError, r"`rank_pattern`.*\['r'\]"),
    "bad pattern value": (lambda: PT3(rank_pattern={"x": -2}), ValueError, "`u_rank` = -2"),
    "experts": (lambda: PT3(fused_experts="ignore"), ValueError, "`fused_experts` = 'ignore'"),
    "unknown field": (lambda: PT3(r=8), TypeError, "'r'"),
    "unknown task": (lambda: PT3(task_type="CHAT"), ValueError, "task type"),
    "targets as int": (lambda: PT3(target_modules=3), TypeError, "`target_modules` = 3"),
    "composite of nothing": (lambda: CompositeConfig([]), TypeError, r"`methods` = \[\]"),
    "composite of a method twice": (lambda: CompositeConfig([PT3(), PT3(u_rank=2)]), ValueError, "different methods"),
    "composite of LoRA": (lambda: CompositeConfig([PeftConfig()]), TypeError, "`methods` holds a PeftConfig"),
    "composite with a scaling": (lambda: CompositeConfig([PT3()], scaling=1.0), ValueError, "`scaling` = 1.0.*own"),
    "composite from unknown": (lambda: CompositeConfig([{"peft_type": "LORA"}]), ValueError, "`methods`.*LORA"),
    "governance of nothing": (lambda: SpectralGovernance(), ValueError, "max_singular_value.*fro_budget"),
}

LLAMA = {"task_type": "CAUSAL_LM"}
BUILDS: dict[str, tuple[str, Callable[[], Any], type[Exception], str]] = {
    "factorisation": ("llama", lambda: PT3(u_dim=5, v_dim=7), ValueError, r"48 of model.*8x6"),
    "u_rank above u_dim": ("llama", lambda: PT3(u_rank=9, v_rank=2), ValueError, "`u_rank` = 9.*u_dim = 8"),
    "heads and strict groups": (
        "llama",
        lambda: PT1(num_groups=3, strict_groups=True),
        ValueError,
        r"`num_groups` = 3.*4 heads.*\[1, 2, 4\]",
    ),
    "heads that do not divide": ("llama", lambda: PT1(num_heads=5), ValueError, "`num_heads` = 5.*width 32"),
    "ranks for other groups": ("llama", lambda: PT1(rank_per_group=[1, 2]), ValueError, "`rank_per_group`.*4 groups"),
    "no such module": ("llama", lambda: PT3(target_modules=["dense"]), ValueError, "dense.*not found"),
    "one such module": ("llama", lambda: PT2(target_modules=["o_proj", "w2"]), ValueError, r"no module.*\['w2'\]"),
    "block that is not there": (
        "llama",
        lambda: PT3(layers_to_transform=[7]),
        ValueError,
        r"`layers_to_transform` = \[7\].*2 blocks",
    ),
    "fused experts": (
        "qwen2_moe",
        lambda: PT3(fused_experts="error"),
        ValueError,
        "experts.down_proj.*fused_experts='skip'",
    ),
    "embedding": ("llama", lambda: PT3(target_modules=["embed_tokens"]), TypeError, "Embedding.*target_modules"),
    "too large": ("llama", lambda: PT4(minimal_overhead=True), ValueError, "`minimal_overhead`.*gamma_dim"),
    "exact statistics without the interface": (
        "jamba",
        lambda: PT1(attention_stats="exact"),
        ValueError,
        "exact.*attention_stats='output'",
    ),
}


def unmergeable(method: str) -> Callable[[], Any]:
    return lambda: adapted(method, "llama").merge_adapter()


def call(method: str = "head_gating", **inputs: Any) -> Callable[[], Any]:
    return lambda: adapted(method, "llama")(input_ids=tokens(), **inputs)


def with_quality(**inputs: Any) -> Callable[[], Any]:
    def run() -> Any:
        model = get_peft_model(build("llama"), PT1(retrieval="quality", **LLAMA))
        return model(input_ids=tokens(), **inputs)

    return run


CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "merge PT1": (unmergeable("head_gating"), ValueError, "HeadGroupGating.*cannot be merged.*export_lora"),
    "merge PT2": (unmergeable("rank_mask"), ValueError, "DynamicRankMask.*cannot be merged"),
    "merge PT4": (unmergeable("film"), ValueError, "ResidualFiLM.*cannot be merged"),
    "merge static PT4 in rms": (unmergeable("film_static_rms"), ValueError, "beta_unit='absolute' or max_beta=0"),
    "merge beta without a bias": (unmergeable("film_static_beta"), ValueError, "no bias.*max_beta=0"),
    "merge a gated task mask": (unmergeable("rank_mask_task_gated"), ValueError, "value_gate=False"),
    "merge the composite": (lambda: adapted("composite", "llama").merge_and_unload(), ValueError, "cannot be merged"),
    "quality without a reader": (call(retrieval_quality=torch.ones(2)), ValueError, 'retrieval="quality"'),
    "quality of 2": (with_quality(retrieval_quality=torch.tensor([0.5, 2.0])), ValueError, r"\[0, 1\]"),
    "quality of another batch": (
        with_quality(retrieval_quality=torch.ones(5)),
        ValueError,
        "5 values.*2 rows.*one a row",
    ),
    "quality of another length": (with_quality(retrieval_quality=torch.ones(2, 4)), ValueError, "retrieval_quality"),
    "integer quality": (with_quality(retrieval_quality=torch.ones(2, dtype=torch.long)), ValueError, "floating point"),
    "scores without a scorer": (with_quality(retrieval_scores=torch.ones(2, 3)), ValueError, 'retrieval="scores"'),
    "adapter names in training": (
        lambda: adapted("kronecker", "llama").train()(input_ids=tokens(), adapter_names=["default", "default"]),
        ValueError,
        "training mode",
    ),
    "unknown adapter names": (call(adapter_names=["default", "nobody"]), ValueError, "nobody"),
    "adapter names for another batch": (call(adapter_names=["default"] * 3), ValueError, "Length of `adapter_names`"),
    "unknown adapter": (lambda: adapted("film", "llama").set_adapter("nobody"), (KeyError, ValueError), "nobody"),  # type: ignore[dict-item]
    "delete an unknown adapter": (lambda: adapted("film", "llama").delete_adapter("nobody"), ValueError, "nobody"),
    "a second method": (lambda: adapted("film", "llama").add_adapter("second", PT3()), ValueError, "peft types"),
    "export FiLM": (lambda: export_lora(adapted("film", "llama"), "nowhere"), ValueError, "no LoRA equals it"),
    "export gates without data": (lambda: export_lora(adapted("rank_mask", "llama"), "x"), ValueError, "calibration"),
    "export an unknown adapter": (
        lambda: export_lora(adapted("kronecker", "llama"), "x", "nobody"),
        ValueError,
        "`adapter_name` = 'nobody'",
    ),
    "quality on a bare model": (
        lambda: bem_peft.retrieval_quality(build("llama"), torch.ones(2)).__enter__(),
        ValueError,
        "no bem_peft adapter",
    ),
    "probe a bare model": (lambda: bem_peft.probe(build("llama")), ValueError, "no bem_peft adapter"),
    "govern FiLM": (
        lambda: SpectralGovernance(max_singular_value=1.0).attach(adapted("film", "llama")),
        ValueError,
        "no head-gating",
    ),
}


@pytest.mark.parametrize("row", CONFIGS)
def test_wrong_config_names_the_field(row: str) -> None:
    make, error, message = CONFIGS[row]
    with pytest.raises(error, match=f"(?s){message}"):
        make()


@pytest.mark.parametrize("row", BUILDS)
def test_wrong_fit_is_told_before_the_model_changes(row: str) -> None:
    architecture, config, error, message = BUILDS[row]
    model = build(architecture)
    modules = [(name, type(module)) for name, module in model.named_modules()]
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    with pytest.raises(error, match=f"(?s){message}"):
        get_peft_model(model, config())
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1])


@pytest.mark.parametrize("row", CALLS)
def test_wrong_call_tells_what_to_do(row: str) -> None:
    make, error, message = CALLS[row]
    with pytest.raises(error, match=f"(?s){message}"):
        make()


def test_refused_merge_changes_nothing() -> None:
    model = adapted("composite", "llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# files


def saved(folder: Path, method: str = "kronecker") -> Path:
    adapted(method, "llama").save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def load(folder: Path, model: nn.Module | None = None) -> PeftModel:
    return PeftModel.from_pretrained(build("llama") if model is None else model, folder)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(tensors)[0]


FILES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], type[Exception], str]] = {
    "missing key": (lambda t: t.pop(first(t)), ValueError, "missing .*layers.0.mlp.down_proj"),
    "foreign key": (
        lambda t: t.update({first(t).replace("layers.0", "layers.9"): torch.ones(2)}),
        ValueError,
        "unexpected .*layers.9",
    ),
    "foreign container": (
        lambda t: t.update({first(t).replace("bem_kronecker_adapter", "bem_kronecker_other"): torch.ones(2)}),
        ValueError,
        "unexpected .*bem_kronecker_other",
    ),
    "another method": (
        lambda t: t.update({first(t).replace("bem_kronecker_adapter", "bem_film_adapter"): torch.ones(2)}),
        ValueError,
        "unexpected .*bem_film_adapter",
    ),
    "other shape": (lambda t: t.update({first(t): torch.ones(3, 3)}), RuntimeError, "size mismatch"),
    "nothing in it": (lambda t: t.clear(), ValueError, "missing"),
}


@pytest.mark.parametrize("row", FILES)
def test_tampered_file_is_refused(row: str, tmp_path: Path) -> None:
    change, error, message = FILES[row]
    rewrite(saved(tmp_path), change)
    with pytest.raises(error, match=f"(?s){message}"):
        load(tmp_path)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SafetensorError, match=r"(?i)incomplete|invalid|header|metadata"):
        load(tmp_path)


def test_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    from tests.tiny_models import llama

    saved(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"size mismatch|missing|unexpected"):
        load(tmp_path, llama(intermediate_size=96))


def test_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match="down_proj"):
        load(tmp_path, build("gpt2"))


def test_key_of_a_newer_version_in_a_composite_is_dropped_with_a_warning(tmp_path: Path) -> None:
    saved(tmp_path, "composite")
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config["methods"][0]["colour"] = "blue"
    file.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="colour"):
        load(tmp_path)


def test_key_of_a_newer_version_is_dropped_with_a_warning(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "colour": "blue"}))
    with pytest.warns(UserWarning, match="colour"):
        load(tmp_path)


def test_the_tables_hold_at_least_forty_rows() -> None:
    assert len(CONFIGS) + len(BUILDS) + len(CALLS) + len(FILES) >= 40
    assert set(EVERY) >= {"head_gating", "rank_mask", "kronecker", "film", "composite"}
