"""Fused experts: an adapter at their W_down is what the same adapter is at a dense MLP, in every implementation."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import bem_peft
from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
    SiteError,
    count_parameters,
    find_sites,
)
from bem_peft.kernels.rank_mask import straight_through_k_hot
from bem_peft.tuners.base import expert_products
from bem_peft.tuners.base.expert_layer import AdapterExperts
from bem_peft.tuners.base.expert_twins import twins
from bem_peft.tuners.base.experts import ExpertWeight
from bem_peft.tuners.calls.call_state import find_call_state
from bem_peft.tuners.calls.routing import Routing
from tests.contract.methods import randomize
from tests.tiny_experts import EXPERTS, FAMILIES, OF_THEIR_OWN, SIZES, small, spread
from tests.tiny_models import tokens

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
CONFIGS: dict[str, Callable[..., Any]] = {
    "rank_mask": lambda **k: DynamicRankMaskConfig(total_rank=8, active_rank=4, sites=["mlp_down"], **k),
    "kronecker": lambda **k: KroneckerConfig(u_rank=3, v_rank=2, **k),
    "film": lambda **k: ResidualFiLMConfig(gamma_dim=3, beta_dim=2, sites=["mlp_down"], **k),
    "composite": lambda **k: CompositeConfig(
        [KroneckerConfig(u_rank=3, v_rank=2), ResidualFiLMConfig(gamma_dim=2, beta_dim=2, sites=["mlp_down"])], **k
    ),
}


def tolerance(implementation: str) -> dict[str, float]:
    """The router's weights add up to 1 in float32 whatever the model's dtype is."""
    size = 2e-4 if implementation == "grouped_mm" else 3e-6
    return {"rtol": size, "atol": size}


def dense() -> nn.Module:
    return spread(LlamaForCausalLM(LlamaConfig(**SIZES))).double().eval()


def dtype_of(implementation: str) -> torch.dtype:
    """float64; grouped_mm knows no wider number than float32."""
    return torch.float32 if implementation == "grouped_mm" else torch.float64


def upcycled(implementation: str) -> nn.Module:
    """The dense model with its MLP in each of four experts, of which a token takes two: the same function."""
    source = dense()
    config = MixtralConfig(**SIZES, num_local_experts=EXPERTS, num_experts_per_tok=2, rms_norm_eps=1e-6)
    for name in ("rope_parameters", "rope_theta"):  # its own default is another; the name is that of the release
        if hasattr(source.config, name):
            setattr(config, name, getattr(source.config, name))
    model = MixtralForCausalLM(config).double().eval()
    known = source.state_dict()
    weights = {name: known[name] for name in model.state_dict() if name in known}
    for i, layer in enumerate(source.model.layers):
        stacked = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        weights[f"model.layers.{i}.mlp.experts.gate_up_proj"] = stacked.expand(EXPERTS, -1, -1).clone()
        weights[f"model.layers.{i}.mlp.experts.down_proj"] = layer.mlp.down_proj.weight.expand(EXPERTS, -1, -1).clone()
        weights[f"model.layers.{i}.mlp.gate.weight"] = torch.randn(EXPERTS, SIZES["hidden_size"]).double()
    model.load_state_dict(weights)
    model.set_experts_implementation(implementation)
    return model.to(dtype_of(implementation))


def film_static(**changes: Any) -> Any:
    return ResidualFiLMConfig(mode="static", max_beta=0.0, sites=["mlp_down"], **changes)


def adapted(model: nn.Module, method: str, **changes: Any) -> nn.Module:
    dtype = next(model.parameters()).dtype
    make = film_static if method == "film_static" else CONFIGS[method]
    found = get_peft_model(model, make(task_type="CAUSAL_LM", **changes)).to(dtype)
    randomize(found)
    return found.eval()


def same_adapter(model: nn.Module, like: nn.Module) -> nn.Module:
    """`model` with the adapter weights of `like`, where the same site has another name."""
    given = {n.replace("mlp.experts", "mlp.down_proj"): p for n, p in like.named_parameters() if "bem_" in n}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bem_" in name:
                parameter.copy_(given[name])
    return model


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_upcycled_model_is_the_dense_one(implementation: str) -> None:
    """To what the router's softmax in float32 leaves of 1."""
    ids = tokens()
    found = upcycled(implementation)(ids).logits
    torch.testing.assert_close(found.double(), dense()(ids).logits, **tolerance(implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_on_experts_is_the_dense_adapter(method: str, implementation: str) -> None:
    """Output and every gradient, in float64: the experts are equal, and the weights of a token's experts add up to 1.

    PT4 is no linear map of y, but with equal experts y is the same for both.
    """
    ids = tokens()
    on_experts = adapted(upcycled(implementation), method)
    on_dense = same_adapter(adapted(dense(), method), on_experts)
    for training in (False, True):
        losses = []
        for model in (on_experts, on_dense):
            model.train(training)
            model.zero_grad()
            out = model(input_ids=ids, labels=ids)
            out.loss.backward()
            losses.append(out)
        torch.testing.assert_close(losses[0].logits.double(), losses[1].logits, **tolerance(implementation))
        gradients = {n.replace("mlp.experts", "mlp.down_proj"): p.grad for n, p in on_experts.named_parameters()}
        for name, parameter in on_dense.named_parameters():
            if parameter.requires_grad:
                found = gradients[name]
                assert (found is None) == (parameter.grad is None)
                if not training and "mask_weight" in name:  # a choice alone: no gradient
                    assert found is None or not found.any()
                elif found is not None:
                    torch.testing.assert_close(found.double(), parameter.grad, **tolerance(implementation))
    assert not torch.equal(losses[0].logits, dense()(ids).logits), "the adapter does something"


# the families


KINDS = [*((kind, name) for kind in FAMILIES for name in IMPLEMENTATIONS), *((kind, "eager") for kind in OF_THEIR_OWN)]


@pytest.mark.filterwarnings("ignore:.*is falling back to its reference PyTorch implementation")
@pytest.mark.parametrize(("kind", "implementation"), KINDS)
@torch.no_grad()
def test_a_fresh_adapter_changes_no_bit_and_all_implementations_agree(kind: str, implementation: str) -> None:
    ids = tokens()
    dtype = dtype_of(implementation)
    base = small(kind).to(dtype)
    base.set_experts_implementation(implementation)
    plain = base.requires_grad_(False)(ids).logits  # a parameter that is trained is multiplied in another order
    model = get_peft_model(base, CONFIGS["composite"](task_type="CAUSAL_LM")).to(dtype).eval()
    layers = [m for m in model.modules() if isinstance(m, AdapterExperts)]
    assert len(layers) == 2
    assert torch.equal(model(ids).logits, plain)
    randomize(model)
    found = model(ids).logits
    base.set_experts_implementation("eager")
    near = 1e-6 if dtype is torch.float64 else 2e-4  # a router that scores in float32 rounds what it multiplies
    torch.testing.assert_close(found, model(ids).logits, rtol=near, atol=near)
    assert not torch.equal(found, plain)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base(ids).logits)
    base.set_experts_implementation(implementation)
    model.unload()
    assert torch.equal(base(ids).logits, plain)
    assert not any(isinstance(m, AdapterExperts) or "_bem_peft_site" in m.__dict__ for m in base.modules())


def through_expert(experts: Any, kind: str, x: torch.Tensor, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters and what leaves W_down of expert e for one token x (d,), each of one row."""
    up, down = experts._parameters["gate_up_proj"][e], experts._parameters["down_proj"][e]
    if kind == "gpt_oss":
        inner = experts._apply_gate(x @ up + experts.gate_up_proj_bias[e])
        return inner.unsqueeze(0), (inner @ down + experts.down_proj_bias[e]).unsqueeze(0)
    gate, value = (up @ x).chunk(2)
    inner = experts.act_fn(gate) * value
    return inner.unsqueeze(0), (down @ inner).unsqueeze(0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_update_reads_what_enters_w_down_and_what_leaves_it(kind: str, implementation: str) -> None:
    """Against a loop over experts written here, in float64; GPT-OSS has biases, which PT4's y includes."""
    base = small(kind).to(dtype_of(implementation))
    base.set_experts_implementation(implementation)
    model = adapted(base, "film")
    layer = model.base_model.model.model.layers[0].mlp.experts
    adapter = next(iter(layer.adapters_named("default")))
    experts = layer.experts
    x = torch.randn(5, SIZES["hidden_size"], dtype=dtype_of(implementation))
    index = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [1, 1]])
    share = torch.rand(5, 2, dtype=x.dtype)
    found = layer(x, index, share)
    expected = torch.zeros_like(x)
    for token in range(5):
        for k in range(2):
            e = int(index[token, k])
            inner, y = through_expert(experts, kind, x[token], e)
            expected[token] += adapter(inner, y)[0] * share[token, k]
    near = 1e-10 if x.dtype is torch.float64 else 1e-4
    torch.testing.assert_close(found, expected, rtol=near, atol=near)


def test_where_every_token_runs_through_all_experts_it_meets_its_own_alone() -> None:
    """Llama 4: the rows of other experts are zeros, and stay so."""
    for method in CONFIGS:
        layer = adapted(small("llama4_text").double(), method).base_model.model.model.layers[0].feed_forward.experts
        assert layer.experts_site.runs_all
        assert layer.experts_site.experts_per_token == EXPERTS
        x = torch.randn(EXPERTS, 5, SIZES["hidden_size"]).double()
        x[1:, 0] = x[0, 1:] = 0.0
        out = layer(x.flatten(0, 1)).view_as(x)
        assert out[1:, 0].abs().max() == out[0, 1:].abs().max() == 0.0
        assert out[0, 0].abs().min() > 0.0
    with pytest.raises(ValueError, match=r"at model.layers.0.feed_forward.experts: .* set beta_unit='rms'"):
        adapted(small("llama4_text"), "film", beta_unit="absolute")


@pytest.mark.parametrize("method", ["rank_mask", "film"])
def test_experts_of_an_attention_have_a_w_o_each(method: str) -> None:
    """JetMoe: rows sorted by expert, each with its expert's W_O; against a loop over them, adapter and gradient."""
    make = {
        "rank_mask": lambda: DynamicRankMaskConfig(total_rank=8, active_rank=4, sites=["attention_output"]),
        "film": lambda: ResidualFiLMConfig(gamma_dim=3, beta_dim=2, sites=["attention_output"]),
    }
    model = get_peft_model(small("jetmoe").double(), make[method]()).double().train()
    randomize(model)
    layers = [m for m in model.modules() if isinstance(m, AdapterExperts)]
    assert [m.site_name for m in layers] == [f"model.layers.{i}.self_attention.experts.output_linear" for i in range(2)]
    adapter = next(iter(layers[0].adapters_named("default")))
    sizes, x = [2, 0, 3, 1], torch.randn(6, layers[0].in_features, dtype=torch.float64, requires_grad=True)
    found = layers[0](x, sizes)
    weights = layers[0].weight.detach()
    rows = [adapter(part, part @ weights[e].T) for e, part in enumerate(x.split(sizes)) if len(part)]
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-12, atol=1e-12)
    trained = [x, *adapter.parameters()]
    direction = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, trained, direction), torch.autograd.grad(torch.cat(rows), trained, direction),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="output_linear': holds experts, and HeadGroupGatingConfig reads heads"):
        get_peft_model(small("jetmoe"), HeadGroupGatingConfig())


def test_experts_that_cannot_be_adapted_say_why() -> None:
    """float8 holds no numbers that a product reads; processes that hold some of the experts would train them apart."""
    for change, reason in (
        (
            lambda e: e._parameters.update(down_proj=nn.Parameter(e.down_proj.to(torch.float8_e4m3fn), False)),
            "quantised",
        ),
        (lambda e: setattr(e, "_is_expert_parallel", True), "expert parallelism"),
        (lambda e: e._parameters.update(down_proj=nn.Parameter(e.down_proj.flatten(0, 1))), "side by side"),
    ):
        model = small("mixtral")
        change(model.model.layers[0].mlp.experts)
        with pytest.raises(SiteError, match=f"model.layers.0.mlp.experts.down_proj; .*{reason}"):
            get_peft_model(model, CONFIGS["kronecker"]())
        assert get_peft_model(model, DynamicRankMaskConfig(fused_experts="skip")) is not None


def test_routers_are_not_touched() -> None:
    """Bit for bit, in the first block, whose input the adapters of later blocks do not reach."""
    ids = tokens()
    model = adapted(small("mixtral"), "kronecker").float()
    router = model.base_model.model.model.layers[0].mlp.gate
    seen: list[Any] = []
    router.register_forward_hook(lambda module, args, out: seen.append([t.clone() for t in out]))
    model(ids)
    with model.disable_adapter():
        model(ids)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_save_load_copy_pickle_and_merge(tmp_path: Any) -> None:
    ids = tokens()
    model = adapted(small("mixtral").double(), "kronecker")
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small("mixtral").double(), tmp_path).double().eval()
    assert torch.equal(loaded(ids).logits, expected)
    assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
    revived = pickle.loads(pickle.dumps(model.base_model.model.model.layers[0].mlp.experts))
    assert type(revived.experts).__mro__[1] is type(small("mixtral").model.layers[0].mlp.experts)
    assert revived.experts.__dict__["_bem_peft_site"][1] is revived
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-10)
    model.unmerge_adapter()
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-10)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-10)
    assert not any(isinstance(m, AdapterExperts) for m in merged.modules())
    with pytest.raises(ValueError, match="factors depend on the token"):
        adapted(small("mixtral"), "film").merge_and_unload()


def test_training_under_checkpointing_is_training_without() -> None:
    ids, gradients = tokens(), []
    for is_on in (False, True):
        model = adapted(small("qwen3_moe").double(), "composite").train()
        if is_on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-12)


def test_threads_with_and_without_the_adapter_do_not_meet() -> None:
    """One model, two adapters' calls at once: each thread sees its own weights alone."""
    models = [adapted(small("mixtral"), "kronecker").float() for _ in range(2)]
    with torch.no_grad():
        for parameter in (p for n, p in models[1].named_parameters() if "bem_" in n):
            parameter.mul_(2.0)
    ids = tokens()
    with torch.no_grad():
        expected = [model(ids).logits for model in models]
        wrong: list[int] = []

        def work(i: int) -> None:
            with torch.no_grad():
                wrong.extend(i for _ in range(20) if not torch.equal(models[i](ids).logits, expected[i]))

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_what_cannot_be_adapted_is_refused_by_name() -> None:
    ids = tokens()
    with pytest.raises(SiteError, match=r"experts.down_proj; fused_experts='adapt', the default, adapts"):
        get_peft_model(small("mixtral"), KroneckerConfig(u_rank=2, v_rank=3, fused_experts="error"))
    model = adapted(small("mixtral"), "kronecker")
    with pytest.raises(ValueError, match=r"`adapter_names` at model.layers.0.mlp.experts: .* a router chose"):
        model(ids, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="HeadGroupGatingConfig reads heads"):
        get_peft_model(small("mixtral"), HeadGroupGatingConfig(target_modules=["experts"]))
    layer = model.base_model.model.model.layers[0].mlp.experts
    assert layer.experts.down_proj is layer.weight, "what everybody sees but a forward pass"
    layer.passes.append(None)
    weight = layer.experts.down_proj
    layer.passes.pop()
    assert isinstance(weight, ExpertWeight)
    x = torch.randn(EXPERTS, 3, 48)
    with pytest.raises(NotImplementedError, match=r"mlp.experts: its experts read their W_down by `einsum`"):
        torch.einsum("eti,eoi->eto", x, weight)
    with pytest.raises(NotImplementedError, match="bem_peft does not know as a product"):
        weight.to(torch.bfloat16)
    with pytest.raises(TypeError, match="unsupported operand"):
        weight * 2
    with pytest.raises(NotImplementedError, match="by `mul`, which bem_peft does not know"):
        torch.mul(weight, 2)
    with pytest.raises(NotImplementedError, match="by `mul`, which bem_peft does not know"):
        x * weight
    with pytest.raises(AttributeError, match="a tensor has no 'quant_state'"):
        weight.quant_state  # noqa: B018
    with pytest.raises(NotImplementedError, match="read their W_down at"):
        weight[:, 0]


def test_sites_parameters_and_default_targets() -> None:
    model = small("gpt_oss")
    sites = find_sites(model).experts
    assert [(s.name, s.parameter, s.num_experts, s.in_features, s.out_features, s.is_transposed) for s in sites] == [
        (f"model.layers.{i}.mlp.experts", "down_proj", EXPERTS, 48, 32, True) for i in (0, 1)
    ]
    found = get_peft_model(model, KroneckerConfig(u_rank=2, v_rank=3))
    assert set(found.peft_config["default"].target_modules) == {f"model.layers.{i}.mlp.experts" for i in (0, 1)}
    one = get_peft_model(dense(), KroneckerConfig(u_rank=2, v_rank=3))
    assert count_parameters(found).trainable == count_parameters(one).trainable
    assert find_sites(found.base_model.model).experts == sites, "an adapted model has the same sites"
    blocks = KroneckerConfig(layers_to_transform=[1], u_rank=2, v_rank=3)
    only = get_peft_model(small("gpt_oss"), blocks)
    assert set(only.peft_config["default"].target_modules) == {"model.layers.1.mlp.experts"}


# an adapter for each expert


OWN = ("each", "factors")  # with "factors" these alone are each expert's
FACTORS = {"rank_mask": {"B"}, "kronecker": {"B"}, "film": {"gamma", "beta"}, "composite": {"B", "gamma", "beta"}}


def each(model: nn.Module, method: str, **changes: Any) -> nn.Module:
    return adapted(model, method, **{"expert_sharing": "each", **changes})


def is_own(name: str, method: str, sharing: str) -> bool:
    """Whether each expert has its own of the parameter."""
    return sharing == "each" or name.rpartition(".")[2] in FACTORS[method]


@pytest.mark.parametrize(
    ("picked", "implementation"), [*((64, name) for name in IMPLEMENTATIONS), (0, "batched_mm"), (0, "grouped_mm")]
)
@pytest.mark.parametrize("sharing", OWN)
@pytest.mark.parametrize("method", CONFIGS)
def test_equal_adapters_of_each_expert_are_the_shared_one(
    method: str, sharing: str, picked: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output in both modes, and the experts' gradients add up to those of the shared adapter."""
    monkeypatch.setattr(expert_products, "PICKED_ROWS", picked)
    ids, outputs, gradients = tokens(), [], []
    shared = adapted(small("mixtral").to(dtype_of(implementation)), method)
    own = each(small("mixtral").to(dtype_of(implementation)), method, expert_sharing=sharing)
    known = dict(shared.named_parameters())
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if "bem_" in name:
                lead = (EXPERTS,) if is_own(name, method, sharing) else ()
                assert parameter.shape == (*lead, *known[name].shape)
                parameter.copy_(known[name].expand_as(parameter))
    for model in (shared, own):
        model.base_model.model.set_experts_implementation(implementation)
        outputs.append(model(ids).logits)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    near = 1e-10 if outputs[0].dtype is torch.float64 else 3e-4
    torch.testing.assert_close(outputs[0], outputs[1], rtol=near, atol=near)
    for name, gradient in gradients[0].items():  # PT4's bounds are derived in float32
        found = gradients[1][name].sum(0) if is_own(name, method, sharing) else gradients[1][name]
        torch.testing.assert_close(found, gradient, rtol=max(near, 2e-6), atol=max(near, 1e-7))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("sharing", ["shared", *OWN])
def test_blocks_at_experts_are_a_matrix_with_zeros_around_them(sharing: str, implementation: str) -> None:
    """Output, and the blocks' gradients, in float64."""
    ids, outputs, gradients = tokens(), [], []
    blocks = adapted(small("mixtral").double(), "rank_mask", expert_sharing=sharing, num_blocks=4)
    wide = adapted(small("mixtral").double(), "rank_mask", expert_sharing=sharing)
    known = dict(blocks.named_parameters())

    def placed(a: torch.Tensor) -> torch.Tensor:
        of_each = [torch.block_diag(*one.chunk(4)) for one in (a if a.dim() == 3 else a[None])]
        return torch.stack(of_each) if a.dim() == 3 else of_each[0]

    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            if "bem_" in name:
                parameter.copy_(placed(known[name]) if name.endswith(".A") else known[name])
    for model in (blocks, wide):
        model.base_model.model.set_experts_implementation(implementation)
        outputs.append(model(ids).logits)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)
    for name, gradient in gradients[0].items():
        found = gradients[1][name]
        if name.endswith(".A"):
            gradient, found = placed(gradient), found * (placed(torch.ones_like(gradient)) > 0)
        torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sharing", OWN)
@pytest.mark.parametrize(
    ("kind", "method"), [("gpt_oss", "film"), ("mixtral", "rank_mask"), ("qwen3_moe", "composite")]
)
def test_every_token_meets_its_experts_own_adapter(kind: str, method: str, sharing: str, implementation: str) -> None:
    """Against a loop over tokens and experts written here, with a shared adapter that has one expert's weights."""
    dtype = dtype_of(implementation)
    base = small(kind).to(dtype)
    base.set_experts_implementation(implementation)
    layer = each(base, method, expert_sharing=sharing).base_model.model.model.layers[0].mlp.experts
    single = adapted(small(kind).to(dtype), method).base_model.model.model.layers[0].mlp.experts
    experts = layer.experts
    x = torch.randn(5, SIZES["hidden_size"], dtype=dtype)
    index = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [1, 0]])
    share = torch.rand(5, 2, dtype=dtype)
    found = layer(x, index, share)
    expected = torch.zeros_like(x)
    for e in range(EXPERTS):
        with torch.no_grad():
            pairs = zip(single.adapters_named("default"), layer.adapters_named("default"), strict=True)
            for one, stacked in pairs:
                for name, parameter in one.named_parameters():
                    given = stacked.get_parameter(name)
                    parameter.copy_(given[e] if is_own(name, method, sharing) else given)
        for token, k in (index == e).nonzero().tolist():
            inner, y = through_expert(experts, kind, x[token], e)
            for one in single.adapters_named("default"):
                y = one(inner, y)
            expected[token] += y[0] * share[token, k]
    near = 1e-10 if dtype is torch.float64 else 1e-4
    torch.testing.assert_close(found, expected, rtol=near, atol=near)


def test_adapters_of_each_expert_are_saved_merged_and_start_from_its_weight(tmp_path: Any) -> None:
    ids = tokens()
    base = small("mixtral").double()
    plain = base(ids).logits
    fresh = get_peft_model(base, CONFIGS["kronecker"](expert_sharing="each")).double().eval()
    assert torch.equal(fresh(ids).logits, plain)
    adapter = next(m for m in fresh.modules() if getattr(m, "num_experts", None) == EXPERTS and hasattr(m, "U"))
    assert not torch.equal(adapter.U[0], adapter.U[1]), "each starts at the singular vectors of its own W_down"
    model = each(small("mixtral").double(), "kronecker")
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small("mixtral").double(), tmp_path).double().eval()
    assert torch.equal(loaded(ids).logits, expected)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sharing", OWN)
@pytest.mark.parametrize("method", ["rank_mask", "kronecker", "film"])
def test_what_is_kept_in_a_scope_is_each_experts_own_and_current(
    method: str, sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `generate` keeps it: derived once for each expert, and anew once a weight was written or exchanged."""
    ids, model = tokens(), each(small("mixtral"), method, expert_sharing=sharing).float()
    adapter = next(m for m in model.modules() if getattr(m, "num_experts", None) == EXPERTS and hasattr(m, "stacked"))
    derived: list[int | None] = []
    original = type(adapter).derive
    monkeypatch.setattr(
        type(adapter), "derive", lambda self, dtype: derived.append(self.expert) or original(self, dtype)
    )
    writes: list[Callable[[nn.Parameter], Any]] = [
        lambda p: p.mul_(1.5), lambda p: setattr(p, "data", p.data * 0.5), lambda p: p[1:].add_(0.3),
    ]  # fmt: skip
    with torch.no_grad(), bem_peft.kept_weights(model):
        expected = copy.deepcopy(model)(ids).logits
        assert torch.equal(model(ids).logits, expected)
        derived.clear()
        assert torch.equal(model(ids).logits, expected)
        assert derived == []
        for write in writes:
            for name in adapter.stacked:
                write(adapter.get_parameter(name))
            found = model(ids).logits
            assert torch.equal(found, copy.deepcopy(model)(ids).logits)
            assert not torch.equal(found, expected)
            expected = found


@pytest.mark.parametrize("sharing", ["shared", *OWN])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_static_pt4_merges_into_every_experts_weight(kind: str, sharing: str) -> None:
    """GPT-OSS has biases, which its factor multiplies as well."""
    ids, model = tokens(), adapted(small(kind).double(), "film_static", expert_sharing=sharing)
    expected = model(ids).logits
    plain = small(kind).double()(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=0, atol=2e-7)  # bounds in float32
    assert (expected - plain).abs().max() > 0.01


@pytest.mark.parametrize("sharing", ["shared", *OWN])
def test_the_brake_of_pt4_acts_on_adapters_of_experts(sharing: str) -> None:
    """Back to the values of the last step that was sound at its beginning, as at a dense site."""
    ids = tokens()
    model = adapted(small("mixtral"), "film", expert_sharing=sharing).float().train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    values = []
    for factor in (1.0, 1.0, float("nan")):
        (model(input_ids=ids, labels=ids).loss * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append({name: parameter.detach().clone() for name, parameter in trained.items()})
    assert list(bem_peft.emergency_stabilize(model).values()) == [1, 1]
    for name in trained:
        assert torch.equal(values[2][name], values[0][name])
        assert not torch.equal(values[1][name], values[0][name])


@pytest.mark.parametrize("sharing", OWN)
@pytest.mark.parametrize("cap", ["max_singular_value", "fro_budget"])
def test_caps_hold_for_each_experts_update(cap: str, sharing: str) -> None:
    """Measured on what merging would add to each W_down."""
    ids, limit = tokens(), 0.05
    model = each(small("mixtral"), "kronecker", expert_sharing=sharing, **{cap: limit}).float().train()
    layers = [m for m in model.modules() if isinstance(m, AdapterExperts)]

    def norms() -> list[float]:
        kind = 2 if cap == "max_singular_value" else "fro"
        return [
            float(torch.linalg.matrix_norm(delta.double(), kind))
            for layer in layers
            for delta in layer.get_delta_weight("default")
        ]

    assert min(norms()) > limit
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert max(norms()) <= limit * (1 + 1e-5)
    assert min(norms()) >= 0.9 * limit, "moved to the cap, not to zero"
    site, *_ = bem_peft.SpectralGovernance.measure(model)
    kind = "max_singular_value" if cap == "max_singular_value" else "frobenius"
    assert getattr(site, kind) == pytest.approx(max(norms()[:EXPERTS]), rel=1e-4)


@pytest.mark.parametrize("sharing", OWN)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_penalties_of_parameters_count_once_for_each_expert(sharing: str, implementation: str) -> None:
    """The gradient is that of the loss and, written here, strength times each expert's mean of (U U^T - I)^2."""
    ids, strength, gradients = tokens(), 0.3, []
    for carried in (0.0, strength):
        base = small("mixtral").to(dtype_of(implementation))
        base.set_experts_implementation(implementation)
        model = each(base, "kronecker", expert_sharing=sharing, orthogonality_strength=carried).train()
        loss = model(input_ids=ids, labels=ids).loss
        if not carried:
            for factor in (p for n, p in model.named_parameters() if n.endswith((".U", ".V"))):
                for one in factor if sharing == "each" else [factor]:
                    loss = loss + strength * (one @ one.T - torch.eye(len(one), dtype=one.dtype)).square().mean()
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    near = 1e-10 if dtype_of(implementation) is torch.float64 else 3e-4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=near, atol=near)


def rows_in_use(adapter: Any, layer: Any, kind: str, seen: tuple[Any, ...], real: torch.Tensor) -> torch.Tensor:
    """The penalty by its definition: a loop over sequences, tokens and experts."""
    hidden, choice = seen[:2]
    total, batch = hidden.new_zeros(()), real.shape[0]
    for b in range(batch):
        pairs = [
            (e, through_expert(layer.experts, kind, hidden[token], e)[0])
            for token in range(hidden.shape[0])
            for e in choice[token].tolist()
            if token // real.shape[1] == b and real.flatten()[token]
        ]
        for group in range(EXPERTS if adapter.num_experts else 1):
            mine = [(e, x) for e, x in pairs if e == group or not adapter.num_experts]
            masks = []
            for e, x in mine:
                one = adapter if adapter.num_experts is None else twins(adapter)[e]
                weights = one.derive(x.dtype)
                logits = one.control(x.double() @ weights[0].double(), *weights[2:])[0]
                masks.append(straight_through_k_hot(logits, one.active_rank, one.temperature))
            if masks:
                use = torch.cat(masks).mean(0)
                deviation = (use - adapter.active_rank / use.shape[0]).square().mean()
                total = total + deviation * len(mine) / len(pairs) / batch
    return total


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("kind", "sharing"), [("mixtral", "shared"), ("gpt_oss", "shared"), ("mixtral", "each")])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_penalty_of_tokens_counts_the_rows_of_each_sequence(
    kind: str, sharing: str, implementation: str, is_checkpointed: bool
) -> None:
    """Its value, and the gradient: that of the loss and strength times the penalty as it is defined, written here."""
    ids, strength, gradients = torch.randint(3, 60, (3, 6)), 0.3, []
    real = torch.ones_like(ids)
    real[1, :2] = 0
    for carried in (0.0, strength):
        base = small(kind).to(dtype_of(implementation))
        base.set_experts_implementation(implementation)
        model = adapted(base, "rank_mask", expert_sharing=sharing, balance_strength=carried).train()
        layers = [m for m in model.modules() if isinstance(m, AdapterExperts)]
        seen: dict[Any, Any] = {}
        if is_checkpointed and carried:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        hooks = [m.register_forward_pre_hook(seen.__setitem__) for m in layers]
        loss = model(input_ids=ids, attention_mask=real, labels=ids.masked_fill(real == 0, -100)).loss
        for hook in hooks:
            hook.remove()
        expected = [
            rows_in_use(adapter, layer, kind, seen[layer], real)
            for layer in layers
            for adapter in layer.adapters_named("default")
        ]
        if carried:
            mean = float(torch.stack(expected).detach().mean())
            assert find_call_state(model).log.read()["penalty/balance"] == pytest.approx(mean, rel=1e-5)
        else:
            loss = loss + strength * torch.stack(expected).sum()
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    near = 1e-10 if dtype_of(implementation) is torch.float64 else 3e-4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=max(near, 1e-6), atol=max(near, 1e-8))


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "mixtral"])
def test_every_implementation_counts_the_same_rows(kind: str) -> None:
    """Three orders of the rows, one penalty: the eager loop of each family takes them as is known of it."""
    ids, found = torch.randint(3, 60, (3, 6)), []
    for implementation in IMPLEMENTATIONS:
        base = small(kind).float()
        base.set_experts_implementation(implementation)
        model = adapted(base, "rank_mask", balance_strength=0.1).train()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append(find_call_state(model).log.read()["penalty/balance"])
    assert found[0] > 0
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


def test_what_there_is_no_expert_for_is_refused() -> None:
    with pytest.raises(ValueError, match="`expert_sharing` = 'each': no fused experts are adapted"):
        get_peft_model(dense(), CONFIGS["kronecker"](expert_sharing="each"))
    with pytest.raises(ValueError, match=r"`balance_strength` at model.layers.0.feed_forward.experts: .* a router"):
        adapted(small("llama4_text"), "rank_mask", balance_strength=0.1)
    with pytest.raises(RuntimeError, match="the order of the rows of experts_implementation='sonicmoe' is not known"):
        Routing(torch.zeros(2, 2), "sonicmoe").meet(0, "model.layers.0.mlp.experts")


def exported_config(method: str, sharing: str) -> Any:
    if method == "rank_mask":
        own = {"mask_scope": "task", "value_gate": False, "total_rank": 8, "active_rank": 4}
        return DynamicRankMaskConfig(expert_sharing=sharing, **own)  # W_O as well, of the same rank
    return CompositeConfig(
        [KroneckerConfig(u_rank=3, v_rank=2), DynamicRankMaskConfig(total_rank=2, active_rank=2, value_gate=False)],
        expert_sharing=sharing,
    )


@pytest.mark.parametrize("is_uniform", [True, False])
@pytest.mark.parametrize("sharing", ["shared", *OWN])
@pytest.mark.parametrize("method", ["rank_mask", "composite"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_plain_peft_loads_the_export_with_the_same_logits(
    kind: str, method: str, sharing: str, is_uniform: bool, tmp_path: Any
) -> None:
    """As a LoRA of the parameter, `target_parameters`: nothing of this package is in the model then."""
    ids = tokens()
    model = get_peft_model(small(kind).double(), exported_config(method, sharing)).double().eval()
    randomize(model)
    report = bem_peft.export_lora(model, tmp_path, uniform_rank=is_uniform)
    assert report.is_exact
    loaded = PeftModel.from_pretrained(small(kind).double(), tmp_path).double().eval()
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    assert len([m for m in loaded.modules() if hasattr(m, "parameter_name")]) == 2
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-9)
    assert (model(ids).logits - small(kind).double()(ids).logits).abs().max() > 0.1


def test_gates_at_experts_are_not_exported_and_probe_sees_the_experts(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"at model.layers.0.mlp.experts has gates .* that a router chose"):
        bem_peft.export_lora(adapted(small("mixtral"), "rank_mask"), tmp_path / "lora", calibration=[])
    assert not (tmp_path / "lora").exists()
    assert bem_peft.probe(adapted(small("mixtral"), "kronecker").float()) == 2


@pytest.mark.parametrize(
    ("sharing", "implementation"),
    [("shared", "batched_mm"), ("shared", "grouped_mm"), ("each", "grouped_mm"), ("factors", "batched_mm")],
)
@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_compiles_to_one_graph(
    method: str, sharing: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few rows and with many."""
    torch.compiler.reset()
    base = small("mixtral").float()
    base.set_experts_implementation(implementation)
    model = each(base, method, expert_sharing=sharing).float()
    monkeypatch.setattr(expert_products, "PICKED_ROWS", 32)
    for ids in (tokens()[:1, :4], tokens(batch=4)):
        with torch.no_grad():
            expected = model(ids).logits
            found = torch.compile(model, backend="aot_eager", fullgraph=True)(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*Graph break:UserWarning")
@pytest.mark.parametrize("sharing", ["shared", "each"])
def test_experts_that_are_kept_out_of_a_graph_are_right(sharing: str) -> None:
    torch.compiler.reset()
    base = small("mixtral").float()
    base.set_experts_implementation("grouped_mm")
    model = each(base, "kronecker", expert_sharing=sharing).float()
    for layer in [m for m in model.modules() if isinstance(m, AdapterExperts)]:
        layer.experts.forward = torch.compiler.disable(layer.experts.forward)
    ids = tokens()
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(ids).logits
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(found, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_the_same_function_and_gradients_as_pefts_lora_of_the_parameter() -> None:
    """PEFT adds B_e A_e to the whole parameter at every forward; PT2 with all its ranks and no gate is that update,
    computed on the tokens alone."""
    ids, rank = tokens(), 4
    by_parameter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=["experts.down_proj"])
    reference = get_peft_model(small("mixtral").double(), by_parameter).double()
    config = DynamicRankMaskConfig(
        total_rank=rank, active_rank=rank, value_gate=False, use_hadamard_path=False, sites=["mlp_down"], scaling=2.0,
        expert_sharing="each",
    )  # fmt: skip
    ours = get_peft_model(small("mixtral").double(), config).double()
    wrappers = [m for m in reference.modules() if hasattr(m, "parameter_name") and hasattr(m, "lora_A")]
    adapters = [m for m in ours.modules() if getattr(m, "num_experts", None) == EXPERTS and hasattr(m, "mask_weight")]
    assert len(wrappers) == len(adapters) == 2
    generator = torch.Generator().manual_seed(5)

    def taken_apart(wrapper: Any, of: Callable[[nn.Module], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = of(wrapper.lora_A["default"]), of(wrapper.lora_B["default"])
        return a.reshape(EXPERTS, rank, -1), b.reshape(b.shape[0], rank, EXPERTS).permute(2, 0, 1)

    with torch.no_grad():
        for wrapper, adapter in zip(wrappers, adapters, strict=True):
            for linear in (wrapper.lora_A["default"], wrapper.lora_B["default"]):
                linear.weight.normal_(std=0.2, generator=generator)
            a, b = taken_apart(wrapper, lambda linear: linear.weight)
            adapter.A.copy_(a)
            adapter.B.copy_(b)
    for model in (reference, ours):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(ours(ids).logits, reference(ids).logits, rtol=1e-9, atol=1e-10)
    for wrapper, adapter in zip(wrappers, adapters, strict=True):
        a, b = taken_apart(wrapper, lambda linear: linear.weight.grad)
        torch.testing.assert_close(adapter.A.grad, a, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(adapter.B.grad, b, rtol=1e-9, atol=1e-11)
