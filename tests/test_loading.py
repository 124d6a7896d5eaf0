"""Saving and loading on every road that LoRA has."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import PeftType
from torch import nn
from transformers import AutoModelForCausalLM

import bem_peft
from bem_peft import DeadSiteError, KroneckerConfig, probe
from bem_peft.tuners import pt3_kronecker
from bem_peft.tuners.base import registry
from bem_peft.upstream import RefusedByTransformersError, refused_by_transformers
from tests.contract.invariants import assert_close, logits
from tests.contract.methods import CONFIGS, METHODS, adapted, adapter_parameters, randomize
from tests.tiny_models import build, call, llama, tokens

methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@methods
def test_auto_classes_load_the_adapter(method: str, base_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(base, CONFIGS[method](task_type="CAUSAL_LM"))
    randomize(model)
    expected = logits(model.eval(), input_ids=tokens())
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert "import bem_peft" in card
    assert str(base_folder) in card
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder).eval(), input_ids=tokens()), expected)
    assert PeftConfig.from_pretrained(folder).peft_type == CONFIGS[method]().peft_type
    for changes in ({"low_cpu_mem_usage": True}, {"is_trainable": True}):
        fresh = AutoModelForCausalLM.from_pretrained(base_folder)
        loaded = PeftModel.from_pretrained(fresh, folder, **changes).eval()
        assert torch.equal(logits(loaded, input_ids=tokens()), expected)
        assert any(p.requires_grad for p in loaded.parameters()) is ("is_trainable" in changes)


@methods
@pytest.mark.parametrize("name", ["first", "second"])
def test_native_integration_of_transformers(method: str, name: str, base_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    if refused_by_transformers() is not None:  # 5.24 with peft < 0.22: for LoRA as well
        for add in (model.add_adapter, model.load_adapter):
            with pytest.raises(RefusedByTransformersError, match=r"asks for peft >= .*get_peft_model"):
                add(CONFIGS[method](task_type="CAUSAL_LM"))
        return
    model.add_adapter(CONFIGS[method](task_type="CAUSAL_LM"), adapter_name="first")
    randomize(model)
    expected = logits(model, input_ids=tokens())
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    base = logits(fresh, input_ids=tokens())
    fresh.load_adapter(tmp_path / "adapter", adapter_name=name)
    assert torch.equal(logits(fresh, input_ids=tokens()), expected)
    fresh.disable_adapters()
    assert torch.equal(logits(fresh, input_ids=tokens()), base)


@methods
def test_direct_injection_round_trip(method: str) -> None:
    config = CONFIGS[method](task_type="CAUSAL_LM")
    model = inject_adapter_in_model(copy.deepcopy(config), build("llama"), adapter_name="one").eval()
    randomize(model)
    state = get_peft_model_state_dict(model, adapter_name="one")
    other = inject_adapter_in_model(copy.deepcopy(config), build("llama"), adapter_name="two").eval()
    set_peft_model_state_dict(other, state, adapter_name="two")
    assert torch.equal(logits(other, input_ids=tokens()), logits(model, input_ids=tokens()))


@methods
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_rows_of_a_batch_use_their_own_adapter(method: str, architecture: str) -> None:
    model = adapted(method, architecture)
    model.add_adapter("second", CONFIGS[method](task_type=model.peft_config["default"].task_type))
    randomize(model, seed=11)
    ids = tokens(batch=3)
    inputs = call(architecture, ids)
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["default", "__base__", "second"]).logits
    with model.disable_adapter():
        assert_close(mixed[1], logits(model, **inputs)[1])
    assert_close(mixed[0], logits(model, **inputs)[0])
    model.set_adapter("second")
    assert_close(mixed[2], logits(model, **inputs)[2])
    model.set_adapter("default")
    model.delete_adapter("second")
    assert "second" not in str(model.state_dict().keys())


def test_beam_search_with_mixed_adapters() -> None:
    model, ids = adapted("kronecker", "llama"), tokens(batch=2, length=5)
    options = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=["default", "__base__"], **options)
    assert torch.equal(mixed[:1], model.generate(input_ids=ids[:1], **options))
    with model.disable_adapter():
        assert torch.equal(mixed[1:], model.generate(input_ids=ids[1:], **options))


def test_loading_for_inference_does_no_decomposition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = pt3_kronecker.higher_order_svd
    monkeypatch.setattr(pt3_kronecker, "higher_order_svd", lambda *a: calls.append(1) or original(*a))
    adapted("kronecker", "llama").save_pretrained(tmp_path)
    assert len(calls) == 2
    PeftModel.from_pretrained(build("llama"), tmp_path)
    assert len(calls) == 2


def test_modules_to_save_and_layers_to_transform(tmp_path: Path) -> None:
    config = KroneckerConfig(
        task_type="CAUSAL_LM", u_rank=2, v_rank=2, layers_to_transform=[1], modules_to_save=["lm_head"]
    )
    model = get_peft_model(build("llama"), config).train()
    assert all(".layers.1." in name for name in adapter_parameters(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded, input_ids=tokens()), logits(model, input_ids=tokens()))


def test_registration_is_idempotent_and_pickles() -> None:
    registry.register("bem_kronecker", KroneckerConfig, bem_peft.KroneckerModel)
    member = PeftType("BEM_KRONECKER")
    assert member is PeftType["BEM_KRONECKER"]
    assert member in list(PeftType)
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.dumps(member) == '"BEM_KRONECKER"'
    assert registry.extend_peft_type("BEM_KRONECKER") is member


@methods
@pytest.mark.parametrize("name", ["A", "B", "C", "U", "V", "gamma", "beta", "gate_weight", "mlp", "layers", "0"])
def test_an_adapter_name_that_would_lose_tensors_is_refused_or_saves_whole(
    method: str, name: str, tmp_path: Path
) -> None:
    """PEFT drops each saved key that has another adapter's name in it: `<site>.<container>.default.A` beside an `A`."""
    model = adapted(method, "llama")
    whole, config = get_peft_model_state_dict(model), CONFIGS[method](task_type="CAUSAL_LM")
    if name in {part for key in model.state_dict() for part in key.split(".")}:
        with pytest.raises(ValueError, match=rf"adapter_name = '{name}'.*{name}_adapter"):
            model.add_adapter(name, config)
        assert list(model.peft_config) == ["default"]
    else:
        model.add_adapter(name, config)
        assert get_peft_model_state_dict(model, adapter_name=name).keys() == whole.keys()
    assert get_peft_model_state_dict(model).keys() == whole.keys()
    with pytest.raises(ValueError, match="adapter_name"):
        get_peft_model(build("llama"), config, adapter_name="layers")


def test_probe_names_a_site_that_a_fused_kernel_bypasses() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Linear(8, 8)
            self.out_proj = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": nn.functional.linear(self.down_proj(x), self.out_proj.weight)}

    config = bem_peft.ResidualFiLMConfig(target_modules=["down_proj", "out_proj"])
    with pytest.raises(DeadSiteError, match=r"1 of 2.*out_proj"):
        probe(get_peft_model(Fused(), config), {"x": torch.randn(3, 8)})
    assert probe(adapted("film", "t5").train()) == 10


def test_kept_weights_follow_every_way_of_changing_a_parameter() -> None:
    model, ids = adapted("rank_mask", "llama"), tokens()
    adapter = next(m for m in model.modules() if isinstance(m, bem_peft.tuners.pt2_rank_mask.DynamicRankMaskAdapter))
    seen = [logits(model, input_ids=ids)]

    def fresh() -> torch.Tensor:  # with gradients nothing is kept
        return model(input_ids=ids).logits.detach()

    with torch.no_grad():
        adapter.B.mul_(2.0)
    seen.append(logits(model, input_ids=ids))
    adapter.B.data = adapter.B.data * 0.5 + 1.0
    seen.append(logits(model, input_ids=ids))
    adapter.B = nn.Parameter(torch.randn_like(adapter.B))
    seen.append(logits(model, input_ids=ids))
    torch.testing.assert_close(seen[-1], fresh(), rtol=1e-4, atol=1e-4)
    for i, a in enumerate(seen):
        assert all(not torch.allclose(a, b) for b in seen[i + 1 :])


def test_a_shared_weight_is_not_merged_twice() -> None:
    base = llama()
    base.model.layers[1].mlp.down_proj.weight = base.model.layers[0].mlp.down_proj.weight
    model = get_peft_model(base, KroneckerConfig(u_rank=2, v_rank=2))
    with pytest.raises(ValueError, match="share one weight"):
        model.merge_adapter()


@pytest.mark.parametrize(("task_type", "auto_class"), [("CAUSAL_LM", "CausalLM"), ("SEQ_2_SEQ_LM", "Seq2SeqLM")])
def test_the_card_begins_with_what_must_be_installed_and_keeps_the_rest(
    task_type: str, auto_class: str, tmp_path: Path
) -> None:
    config = CONFIGS["kronecker"](task_type=task_type)
    (tmp_path / "README.md").write_text("---\nbase_model: x\ntags:\n- mine\n---\n\n# My adapter\n\nA text of mine.\n")
    for _ in range(2):  # the second save replaces what the first one wrote
        config.save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    head, _, body = text.partition("\n---\n\n")
    assert head == "---\nbase_model: x\ntags:\n- mine"
    assert body.startswith("## Loading this adapter\n\nThe adapter is of type `BEM_KRONECKER`")
    assert text.count("## Loading this adapter") == 1
    assert f'pip install "bem_peft>={bem_peft.__version__}"' in body
    assert f"from transformers import AutoModelFor{auto_class}\n" in body
    assert body.endswith("\n\n# My adapter\n\nA text of mine.\n")
    (tmp_path / "README.md").write_text("No metadata.\n")
    config.save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text().startswith("## Loading this adapter")


def test_the_blank_card_that_peft_begins_with_goes_away_and_what_was_written_into_it_stays(tmp_path: Path) -> None:
    model = get_peft_model(llama(), KroneckerConfig(u_rank=2, v_rank=2))
    for _ in range(2):  # PEFT writes its tags anew each time
        model.save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert "[More Information Needed]" not in card.text
        whole = r"## Loading this adapter\n.*-->\n+### Framework versions\n\n- PEFT \S+"
        assert re.fullmatch(whole, card.text.strip(), re.S)
        assert {"bem_peft", "bem_kronecker", "transformers"} < set(card.data.tags)
        assert len(card.data.tags) == len(set(card.data.tags)) == 4
    blank = ModelCard.from_template(ModelCardData()).text
    written = blank.replace("## Uses\n", "## Uses\n\nVerses.\n")
    (tmp_path / "README.md").write_text(written)
    model.save_pretrained(tmp_path)
    assert written.strip() in (tmp_path / "README.md").read_text()
