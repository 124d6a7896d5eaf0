"""An exported LoRA is the adapter, or the report says by how much it is not, or nothing is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    KroneckerConfig,
    LoraExportReport,
    export_lora,
    use_kernels,
)
from bem_peft.tuners import pt3_kronecker
from bem_peft.tuners.base.layer import AdapterLinear
from bem_peft.tuners.base.low_rank import LowRankAdapter
from bem_peft.tuners.lora_formats import runtime_flags
from tests.contract.invariants import assert_close, logits
from tests.contract.methods import CONFIGS, EVERY, adapted, randomize
from tests.tiny_models import build, call, tokens

GATED = ("head_gating", "head_gating_uneven", "rank_mask", "rank_mask_plain", "rank_mask_task_gated")


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def loaded(architecture: str, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The exported file, read by PEFT as a LoRA on a fresh base."""
    model = PeftModel.from_pretrained(build(architecture, dtype), folder).eval()
    assert isinstance(model.peft_config["default"], LoraConfig)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bart"])
@pytest.mark.parametrize("method", ["kronecker", "rank_mask_task", "rank_mask_whole"])
def test_a_linear_method_is_exported_exactly(
    method: str, architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {}
    if architecture == "llama" and method == "kronecker":
        changes["rank_pattern"] = {r"layers\.0\.mlp\.down_proj": {"u_rank": 2}}
    task = None if architecture == "bart" else "CAUSAL_LM"
    model = get_peft_model(build(architecture, dtype), EVERY[method](task_type=task, **changes)).eval()
    randomize(model)
    inputs = call(architecture, tokens())
    report = export_lora(model, tmp_path, calibration=[inputs])
    assert report.is_exact
    assert report.relative_error == {}
    assert report.logits is not None
    assert report.logits.relative_error < (1e-5 if dtype is torch.float32 else 3e-2)
    assert_close(logits(loaded(architecture, tmp_path, dtype), **inputs), logits(model, **inputs))
    card = tmp_path / "README.md"
    assert {"lora"} <= set(ModelCard.load(card).data.tags)
    card.write_text("words of one's own\n")
    export_lora(model, tmp_path)
    assert card.read_text() == "words of one's own\n"


@pytest.mark.parametrize("method", GATED)
def test_gates_are_fixed_where_that_loses_least(method: str, tmp_path: Path) -> None:
    """The error of a site is the residual of a least-squares fit that is written here, on what each gate adds."""
    model, inputs = adapted(method, "llama"), call("llama", tokens(batch=4, length=16))
    layer = next(m for m in model.modules() if isinstance(m, AdapterLinear))
    adapter = next(iter(layer.adapters_named("default")))
    seen: list[torch.Tensor] = []
    adapter.register_forward_hook(lambda m, args, out: seen.extend((args[0], (out - args[1]).detach())))
    with torch.no_grad():
        model(**inputs)
        x, update = (t.flatten(0, -2).double() for t in seen[:2])
        gates = adapter.gate_values(x.float())
        added = []
        for one in torch.eye(gates.shape[1]):
            a, b = (factor.double() for factor in adapter.lora_factors(one))
            added.append((adapter.scaling * x @ a.t() @ b.t()).flatten())
        features = torch.stack(added, dim=1)
        best = torch.linalg.lstsq(features, update.flatten().unsqueeze(1), driver="gelsd").solution
        lost = {"best": features @ best[:, 0], "mean": features @ gates.double().mean(0)}
        error = {name: float((update.flatten() - value).norm() / update.norm()) for name, value in lost.items()}
    report = export_lora(model, tmp_path, calibration=[inputs])
    assert report.relative_error[adapter.site_name] == pytest.approx(error["best"], rel=1e-4)
    assert error["best"] < error["mean"]


def test_constant_gates_are_exported_exactly(tmp_path: Path) -> None:
    """Fresh gates of PT1 are 1."""
    config = EVERY["head_gating"](task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(build("llama"), config).eval()
    inputs = {"input_ids": tokens(batch=3)}
    report = export_lora(model, tmp_path, calibration=[inputs])
    assert not report.is_exact
    assert max(report.relative_error.values()) < 1e-5
    assert report.logits is not None
    assert report.logits.relative_error < 1e-5
    assert_close(logits(loaded("llama", tmp_path), **inputs), logits(model, **inputs))


def mean_nll(scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Row by row, token by token, in float64."""
    found = []
    for row in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            if mask[row, t + 1]:
                found.append(-float(scores[row, t].double().log_softmax(0)[ids[row, t + 1]]))
    return sum(found) / len(found)


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", GATED)
def test_the_report_is_what_the_file_does(method: str, architecture: str, kernels: str, tmp_path: Path) -> None:
    model = adapted(method, architecture)
    ids = tokens(batch=4)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, 3:] = 0
    batches = [{"input_ids": ids[part], "attention_mask": mask[part]} for part in (slice(0, 3), slice(3, 4))]
    use_kernels(kernels)
    try:
        report = export_lora(model, tmp_path, calibration=iter(batches))
    finally:
        use_kernels("torch")
    real, inputs = mask.bool(), {"input_ids": ids, "attention_mask": mask}
    whole = {"adapter": logits(model, **inputs), "exported": logits(loaded(architecture, tmp_path), **inputs)}
    with model.disable_adapter():
        whole["base"] = logits(model, **inputs)
    lost = (whole["exported"] - whole["adapter"])[real].double()
    effect = (whole["adapter"] - whole["base"])[real].double()
    found = report.logits
    assert found is not None
    assert found.tokens == int(mask.sum())
    assert 0.0 < found.relative_error == pytest.approx(float(lost.norm() / effect.norm()), rel=1e-3)
    assert found.largest_difference == pytest.approx(float(lost.abs().max()), rel=1e-3)
    for name, value in found.nll.items():
        assert value == pytest.approx(mean_nll(whole[name], ids, mask), rel=1e-5)
        assert found.perplexity[name] == pytest.approx(math.exp(value))
    assert set(found.nll) == {"base", "adapter", "exported"}
    assert all(0.05 < error < 2.0 for error in report.relative_error.values())
    assert set(report.relative_error) == set(report.ranks)


@pytest.mark.parametrize("method", GATED)
def test_the_error_of_a_site_is_that_of_its_update(method: str, tmp_path: Path) -> None:
    model = adapted(method, "llama")
    ids = tokens(batch=4)
    report = export_lora(model, tmp_path, calibration=[{"input_ids": ids}])
    written = matrices(tmp_path)
    first = next(iter(report.ranks))
    layer: Any = model.base_model.model.get_submodule(first)
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer.register_forward_hook(lambda m, args, out: rows.append((args[0], out - m.base_layer(args[0]))))
    logits(model, input_ids=ids)
    x, update = (part.flatten(0, 1).double() for part in rows[0])
    a, b = (written[f"base_model.model.{first}.lora_{part}.weight"].double() for part in "AB")
    expected = float((update - x @ a.t() @ b.t()).norm() / update.norm())
    assert report.relative_error[first] == pytest.approx(expected, rel=1e-3)


def padded(ids: torch.Tensor, left: int, right: int) -> dict[str, torch.Tensor]:
    ones = torch.ones_like(ids)
    return {
        "input_ids": nn.functional.pad(ids, (left, right)),
        "attention_mask": nn.functional.pad(ones, (left, right)),
    }


@pytest.mark.parametrize(("left", "right"), [(24, 0), (0, 24), (7, 3)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", GATED)
def test_padding_changes_nothing(method: str, architecture: str, left: int, right: int, tmp_path: Path) -> None:
    model, ids = adapted(method, architecture), tokens(batch=2, length=8)
    plain = export_lora(model, tmp_path / "plain", calibration=[{"input_ids": ids}])
    report = export_lora(model, tmp_path / "padded", calibration=[padded(ids, left, right)])
    for name, matrix in matrices(tmp_path / "plain").items():
        torch.testing.assert_close(matrices(tmp_path / "padded")[name], matrix, rtol=1e-4, atol=1e-5)
    assert report.relative_error == pytest.approx(plain.relative_error, rel=1e-3)
    assert report.logits is not None
    assert plain.logits is not None
    assert report.logits.tokens == plain.logits.tokens == 16
    assert report.logits.relative_error == pytest.approx(plain.logits.relative_error, rel=1e-3)
    assert report.logits.nll == pytest.approx(plain.logits.nll, rel=1e-4)


@pytest.mark.parametrize("method", ["head_gating", "rank_mask"])
def test_padding_of_both_halves_changes_nothing(method: str, tmp_path: Path) -> None:
    """Encoder and decoder have masks of their own; labels tell the decoder's where nothing else does."""
    model = adapted(method, "t5")
    ids, labels = tokens(batch=2, length=8), tokens(batch=2, length=5, seed=2)
    export_lora(model, tmp_path / "plain", calibration=[{"input_ids": ids, "labels": labels}])
    encoder = padded(ids, 0, 6)
    target = nn.functional.pad(labels, (0, 4), value=-100)
    report = export_lora(model, tmp_path / "labels", calibration=[{**encoder, "labels": target}])
    assert report.logits is not None
    assert report.logits.tokens == 10
    for name, matrix in matrices(tmp_path / "plain").items():
        torch.testing.assert_close(matrices(tmp_path / "labels")[name], matrix, rtol=1e-4, atol=1e-5)


def test_padding_among_the_rows_of_experts_cannot_be_told(tmp_path: Path) -> None:
    model, ids = adapted("rank_mask", "qwen2_moe", fused_experts="skip"), tokens(batch=2, length=8)
    layer = next(module for module in model.modules() if isinstance(module, AdapterLinear))
    layer.register_forward_pre_hook(lambda m, args: (args[0].flatten(0, -2)[:3],))  # as a router hands them on
    layer.register_forward_hook(lambda m, args, out: torch.zeros(2, 11, 32))
    with pytest.raises(ValueError, match=r"has 3 rows for 22 tokens.*pass batches without padding"):
        export_lora(model, tmp_path / "lora", calibration=[padded(ids, 0, 3)])
    assert not (tmp_path / "lora").exists()


def test_a_mask_that_does_not_tell_is_refused(tmp_path: Path) -> None:
    batch = {"input_ids": tokens(), "attention_mask": torch.ones(2, 1, 9, 9, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"`attention_mask` must be a tensor \(batch, tokens\).*\(2, 1, 9, 9\)"):
        export_lora(adapted("rank_mask", "llama"), tmp_path / "lora", calibration=[batch])


def test_a_composite_is_exported_as_the_sum_of_its_parts(tmp_path: Path) -> None:
    from bem_peft import CompositeConfig, DynamicRankMaskConfig, HeadGroupGatingConfig

    config = CompositeConfig(
        [
            HeadGroupGatingConfig(),
            DynamicRankMaskConfig(total_rank=4, active_rank=2),
            KroneckerConfig(u_rank=2, v_rank=2),
        ],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(build("llama"), config).eval()
    randomize(model)
    batch = {"input_ids": tokens(batch=3)}
    report = export_lora(model, tmp_path, calibration=[batch])
    exported = logits(loaded("llama", tmp_path), **batch)
    lost = (exported - logits(model, **batch)).abs().max()
    assert report.logits is not None
    assert report.logits.largest_difference == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("uniform", [True, False])
def test_sites_of_different_ranks_are_filled_up_to_one(uniform: bool, tmp_path: Path) -> None:
    """A runtime that reads one alpha and divides it by each tensor's rank (llama.cpp) gives a scale of 1 everywhere."""
    config = KroneckerConfig(
        u_rank=2, v_rank=2, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM",
        rank_pattern={"o_proj": {"u_rank": 4, "v_rank": 2}},
    )  # fmt: skip
    model = get_peft_model(build("llama"), config).eval()
    randomize(model)
    report = export_lora(model, tmp_path, uniform_rank=uniform)
    assert set(report.ranks.values()) == {4, 8}
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    scales = {about["lora_alpha"] / tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}
    assert scales == ({1.0} if uniform else {1.0, 2.0})
    assert bool(about["rank_pattern"]) is not uniform
    expected = logits(model, input_ids=tokens(batch=2))
    torch.testing.assert_close(logits(loaded("llama", tmp_path), input_ids=tokens(batch=2)), expected)


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    model = adapted("rank_mask", "llama")
    model.add_adapter("second", CONFIGS["rank_mask"](task_type="CAUSAL_LM"))
    randomize(model, seed=8)
    model.set_adapter("second")
    model.train()
    model.base_model.model.lm_head.eval()
    before = logits(model, input_ids=tokens())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    report = export_lora(model, tmp_path, "default", calibration=[{"input_ids": tokens()}])
    assert torch.equal(logits(model, input_ids=tokens()), before)
    assert model.training
    assert not model.base_model.model.lm_head.training
    assert model.active_adapters == ["second"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, AdapterLinear))
    model.set_adapter("default")
    model.eval()
    adapter = logits(model, input_ids=tokens())
    lost = (logits(loaded("llama", tmp_path), input_ids=tokens()) - adapter).abs().max()
    assert report.logits is not None
    assert report.logits.largest_difference == pytest.approx(float(lost), rel=1e-3)


# what a LoRA file does not hold


def plain() -> Any:
    return adapted("kronecker", "llama")


def with_whole_modules() -> Any:
    return get_peft_model(build("llama"), CONFIGS["kronecker"](task_type="CAUSAL_LM", modules_to_save=["lm_head"]))


def merged() -> Any:
    model = plain()
    model.merge_adapter()
    return model


def with_two_active() -> Any:
    model = plain()
    model.add_adapter("second", CONFIGS["kronecker"](task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    return model


def with_a_trained_base() -> Any:
    model = plain()
    model.base_model.model.lm_head.weight.requires_grad_(True)
    return model


def with_a_parametrised_base() -> Any:
    model = plain()
    layer = next(module for module in model.modules() if isinstance(module, AdapterLinear))
    parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity())
    return model


def over_a_lora() -> Any:
    lora = inject_adapter_in_model(LoraConfig(target_modules=["down_proj"]), build("llama"), adapter_name="below")
    return get_peft_model(lora, KroneckerConfig(u_rank=2, v_rank=2, task_type="CAUSAL_LM"))


def beside_a_lora() -> Any:
    lora = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), build("llama"), adapter_name="beside")
    return get_peft_model(lora, KroneckerConfig(u_rank=2, v_rank=2, task_type="CAUSAL_LM"))


def with_trained_tokens() -> Any:
    from peft.utils.other import TrainableTokensWrapper

    model = plain()
    inner = model.base_model.model.model
    inner.embed_tokens = TrainableTokensWrapper(inner.embed_tokens, "default", token_indices=[3, 4])
    return model


def with_other_embeddings(tmp_path: Path) -> Any:
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    base.resize_token_embeddings(80)
    return get_peft_model(base, KroneckerConfig(u_rank=2, v_rank=2, task_type="CAUSAL_LM"))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "whole modules": (with_whole_modules, r"modules_to_save` = \['lm_head'\].*merge_and_unload"),
    "merged": (merged, r"\['default'\] are merged into .*down_proj.*unmerge_adapter"),
    "two active": (with_two_active, r"\['default', 'second'\] are active together.*set_adapter\('default'\)"),
    "a trained base": (with_a_trained_base, r"lm_head.weight and 0 further parameters of the base are trainable"),
    "a parametrised base": (with_a_parametrised_base, r"down_proj is parametrised"),
    "over a LoRA": (over_a_lora, r"down_proj.* is adapted by \w+ over or under the adapter"),
    "beside a LoRA": (beside_a_lora, r"q_proj is adapted by Linear over or under the adapter"),
    "trained tokens": (with_trained_tokens, r"embed_tokens is trained with 'default' \(TrainableTokensWrapper\)"),
    "FiLM": (lambda: adapted("film", "llama"), "multiplies the base output; no LoRA equals it"),
    "static FiLM": (lambda: adapted("film_static", "llama"), "multiplies the base output; no LoRA equals it"),
    "a composite with FiLM": (lambda: adapted("composite", "llama"), "multiplies the base output"),
    "exact statistics": (lambda: adapted("head_gating_exact", "llama"), "cannot be fixed from W_O's input"),
    "retrieval": (
        lambda: adapted("head_gating", "llama", retrieval="quality"), "cannot be fixed from W_O's input",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(REFUSED))
@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about adapters on adapters
def test_what_a_lora_does_not_hold_is_refused(kind: str, tmp_path: Path) -> None:
    made, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        export_lora(made(), tmp_path / "lora", calibration=[{"input_ids": tokens()}])
    assert not (tmp_path / "lora").exists()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_embeddings_that_are_saved_with_the_adapter_are_refused(tmp_path: Path) -> None:
    model = with_other_embeddings(tmp_path)
    with pytest.raises(ValueError, match=r"saved with .*embed_tokens.*merge and save the whole model"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_gated_method_of_ones_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pt3_kronecker.KroneckerAdapter, "is_mergeable", False)
    with pytest.raises(ValueError, match=r"KroneckerAdapter at .* depends on the token"):
        export_lora(plain(), tmp_path / "lora", calibration=[{"input_ids": tokens()}])
    assert not (tmp_path / "lora").exists()


def test_no_calibration_no_report_of_logits(tmp_path: Path) -> None:
    report: LoraExportReport = export_lora(plain(), tmp_path)
    assert report.logits is None
    with pytest.raises(ValueError, match="brought no token"):
        export_lora(adapted("rank_mask", "llama"), tmp_path, calibration=[])


# other runtimes' files


def with_two_methods() -> nn.Module:
    """PT2 with one mask a task at W_O (4 of 8 ranks), PT3 at W_down (6 ranks)."""
    methods = [
        DynamicRankMaskConfig(
            mask_scope="task", value_gate=False, sites=["attention_output"], total_rank=8, active_rank=4
        ),
        KroneckerConfig(u_rank=2, v_rank=3),
    ]
    model = get_peft_model(build("llama"), CompositeConfig(methods, task_type="CAUSAL_LM")).eval()
    randomize(model)
    return model


def test_the_gguf_file_is_what_llama_cpps_converter_makes(tmp_path: Path) -> None:
    """Names, shapes and the scale alpha / rank are llama.cpp's; the numbers are those of the file for PEFT, which its
    convert_lora_to_gguf.py (of b7000 and later, run by hand: benchmarks/runtimes.py) carries over as they are."""
    model = with_two_methods()
    export_lora(model, tmp_path / "peft")
    report = export_lora(model, tmp_path / "gguf", format="gguf")
    assert report.flags == {"llama.cpp": "--lora adapter.gguf"}
    reader = gguf.GGUFReader(tmp_path / "gguf" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0,
    }  # fmt: skip
    names = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
    expected = matrices(tmp_path / "peft")
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert len(found) == len(expected) == 2 * 2 * 2
    for i in range(2):
        for theirs, ours in names.items():
            for side in ("a", "b"):
                tensor = expected[f"base_model.model.model.layers.{i}.{ours}.lora_{side.upper()}.weight"]
                assert torch.equal(found[f"blk.{i}.{theirs}.weight.lora_{side}"], tensor)


def test_the_mlx_file_is_the_adapter_by_mlxs_own_formula(tmp_path: Path) -> None:
    """y + scale (x A) B at each key of the last `num_layers` blocks, A (in, r), B (r, out), as mlx_lm computes it."""
    model, inputs = with_two_methods(), call("llama", tokens())
    report = export_lora(model, tmp_path, format="mlx")
    assert report.rank == 8
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    weights = load_file(tmp_path / "adapters.safetensors")
    assert config["fine_tune_type"] == "lora"
    base, parameters = build("llama").eval(), config["lora_parameters"]
    assert parameters["keys"] == ["mlp.down_proj", "self_attn.o_proj"]
    changed = 0
    for i, block in list(enumerate(base.model.layers))[-config["num_layers"] :]:
        for key in parameters["keys"]:
            name = f"model.layers.{i}.{key}"
            a, b = weights.pop(f"{name}.lora_a"), weights.pop(f"{name}.lora_b")
            assert a.shape[1] == b.shape[0] == parameters["rank"]
            block.get_submodule(key).register_forward_hook(
                lambda m, args, y, a=a, b=b: y + parameters["scale"] * (args[0] @ a) @ b
            )
            changed += 1
    assert changed == 4
    assert not weights
    assert_close(logits(base, **inputs), logits(model, **inputs))


def test_ranks_that_add_nothing_are_left_out_on_request(tmp_path: Path) -> None:
    model, inputs = with_two_methods(), call("llama", tokens())
    report = export_lora(model, tmp_path, uniform_rank=False, lower_rank=True)
    assert report.ranks == {
        f"model.layers.{i}.{name}": rank
        for i in range(2)
        for name, rank in (("mlp.down_proj", 6), ("self_attn.o_proj", 4))
    }
    assert report.rank == 6
    assert_close(logits(loaded("llama", tmp_path), **inputs), logits(model, **inputs))
    with torch.no_grad():
        for adapter in (m for m in model.modules() if isinstance(m, LowRankAdapter)):
            adapter.B.zero_()
    assert set(export_lora(model, tmp_path, lower_rank=True).ranks.values()) == {1}


@pytest.mark.parametrize(("rank", "flag"), [(8, "8"), (9, "16"), (28, "32"), (400, "512")])
def test_what_runtimes_have_to_be_told(rank: int, flag: str) -> None:
    flags = runtime_flags(rank, "peft")
    assert f"--max-lora-rank {flag} " in flags["vLLM"]
    assert f"--max-lora-rank {rank} " in flags["SGLang"]
    assert "none takes rank 513" in runtime_flags(513, "peft")["vLLM"]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (with_two_methods, {"format": "onnx"}, "`format` = 'onnx': must be one of peft, gguf, mlx"),
        (with_two_methods, {"format": "gguf", "uniform_rank": False}, "'gguf' has one rank for all sites"),
        (lambda: adapted("kronecker", "bart"), {"format": "mlx"}, "no encoder-decoders"),
        (lambda: adapted("kronecker", "gpt2"), {"format": "gguf"}, "of 'gpt2' it is not known here"),
        (lambda: adapted("kronecker", "qwen2_moe"), {"format": "gguf"}, "holds fused experts"),
    ],
)
def test_what_a_format_does_not_hold_is_refused(
    make: Callable[[], nn.Module], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export_lora(make(), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
