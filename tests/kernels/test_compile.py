"""torch.compile: one graph, compiled once, over training steps and over a growing cache; nothing waits for the host."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
    penalty_values,
    use_kernels,
)
from bem_peft.upstream import cache_argument, cache_of
from tests.tiny_models import llama

CONFIGS: dict[str, PeftConfig] = {
    "PT1": HeadGroupGatingConfig(num_groups=2, rank_per_group=3),
    "PT1 uneven": HeadGroupGatingConfig(num_groups=2, rank_per_group=[1, 3]),
    "PT2": DynamicRankMaskConfig(total_rank=8, active_rank=3),
    "PT2 a task": DynamicRankMaskConfig(total_rank=8, active_rank=3, mask_scope="task"),
    "PT2 blocks": DynamicRankMaskConfig(total_rank=8, active_rank=3, num_blocks=4),
    "PT3": KroneckerConfig(u_rank=3, v_rank=5),
    "PT4": ResidualFiLMConfig(gamma_dim=3, beta_dim=5),
    "composite": CompositeConfig([HeadGroupGatingConfig(rank_per_group=4), KroneckerConfig(u_rank=2, v_rank=2)]),
}
STEPS = 50


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    use_kernels("torch")


def adapted(config: str | PeftConfig, blocks: int = 2) -> Any:
    torch.manual_seed(0)
    given = copy.deepcopy(CONFIGS[config] if isinstance(config, str) else config)
    model = get_peft_model(llama(max_position_embeddings=128, num_hidden_layers=blocks), given)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "bem_" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 60, (2, 12), generator=generator) for _ in range(STEPS)]


def trained(model: Any, step: Any) -> list[float]:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for ids in batches():
        loss = step(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.filterwarnings("ignore")
def test_training_is_one_graph_compiled_once(name: str) -> None:
    expected = trained(model := adapted(name), model)
    counter = CompileCounterWithBackend("aot_eager")
    model = adapted(name)
    assert trained(model, torch.compile(model, backend=counter, fullgraph=True)) == pytest.approx(expected, rel=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.filterwarnings("ignore")
def test_one_block_is_compiled_and_all_others_reuse_it(name: str) -> None:
    """Two graphs in training, as without an adapter of ours: the input of the first block wants no gradient."""
    model, ids = adapted(name, blocks=4), torch.arange(3, 43).view(4, 10)
    with torch.no_grad():
        expected = model.eval()(ids, use_cache=False).logits
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    loss = model.train()(**inputs).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.get_base_model().model.layers:
        block.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    for _ in range(2):
        model.zero_grad()
        found = model.train()(**inputs).loss
        found.backward()
    assert counter.frame_count == 1 + 2
    assert float(found) == pytest.approx(float(loss), rel=1e-5)
    for gradient, parameter in zip(gradients, (p for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.filterwarnings("ignore")
def test_decoding_is_one_graph_while_the_cache_grows(name: str, kernels: str) -> None:
    """Compiled code is the torch form, whatever is chosen for eager calls: the compiler fuses it itself."""
    use_kernels(kernels)
    model = adapted(name).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    prompt = torch.arange(3, 8).unsqueeze(0)
    with torch.no_grad():
        argument = cache_argument(model)
        caches = [cache_of(model(input_ids=prompt, use_cache=True)) for _ in range(2)]
        for i in range(STEPS):
            token = torch.tensor([[i % 50 + 3]])
            expected, found = (
                f(input_ids=token, use_cache=True, **{argument: cache})
                for f, cache in ((model, caches[0]), (compiled, caches[1]))
            )
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(CONFIGS))
def test_inductor_gives_the_same_logits(name: str) -> None:
    model = adapted(name).eval()
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4
        )


class NoHostRead(TorchDispatchMode):
    """Fails where a value of a tensor, or a shape that depends on values, would have to reach the host."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(self.FORBIDDEN) or name.startswith("unique_dim_"), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_no_call_waits_for_the_device(name: str) -> None:
    """So that CUDA graphs can hold a forward and a backward pass of every adapted site."""
    model = adapted(name)
    sites = [
        module for module in model.modules() if type(module).__name__.endswith("Linear") and hasattr(module, "call")
    ]
    assert sites
    for site in sites:
        for is_training in (True, False):
            site.train(is_training)
            x = torch.randn(2, 3, site.in_features, requires_grad=True)
            with NoHostRead():
                site(x).sum().backward()
                with torch.no_grad():
                    site(x)
    with pytest.raises(AssertionError, match="waits for the device"), NoHostRead():
        torch.ones(1).item()


PENALISED: dict[str, PeftConfig] = {
    "PT1": HeadGroupGatingConfig(
        num_groups=2, rank_per_group=3, decorrelation_strength=0.3, decorrelation_anneal_steps=9,
        gate_entropy_strength=0.2,
    ),
    "PT2": DynamicRankMaskConfig(total_rank=8, active_rank=3, balance_strength=0.5),
    "PT3": KroneckerConfig(u_rank=3, v_rank=5, orthogonality_strength=0.5, diversity_strength=0.3),
}  # fmt: skip


def penalised_steps(model: Any, call: Any, **given: Any) -> tuple[list[dict[str, torch.Tensor]], dict[str, float]]:
    """The gradients of three calls, padded otherwise each time, and the penalties' values of the last."""
    model.train()
    gradients = []
    for i, ids in enumerate(batches()[:3]):
        mask = torch.ones_like(ids)
        mask[0, 12 - i :] = 0
        penalty_values(model)
        model.zero_grad()
        call(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), **given).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return gradients, penalty_values(model)


def penalised(name: str, *, is_on: bool = True) -> Any:
    config = copy.deepcopy(PENALISED[name])
    if not is_on:
        for field in ("decorrelation", "gate_entropy", "balance", "orthogonality", "diversity"):
            if hasattr(config, f"{field}_strength"):
                setattr(config, f"{field}_strength", 0.0)
    return adapted(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("items", [None, 31])
@pytest.mark.parametrize("name", list(PENALISED))
def test_penalties_are_compiled_into_the_one_graph_with_eager_gradients(name: str, items: int | None) -> None:
    given = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    expected, values = penalised_steps(model := penalised(name), model, **given)
    counter = CompileCounterWithBackend("aot_eager")
    model = penalised(name)
    found, compiled_values = penalised_steps(model, torch.compile(model, backend=counter, fullgraph=True), **given)
    assert counter.frame_count == 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert compiled_values == pytest.approx(values, rel=1e-5)
    assert values["penalty/total"] > 0.01
    without, _ = penalised_steps(model := penalised(name, is_on=False), model, **given)
    assert any(not torch.allclose(without[0][n], g, rtol=1e-2, atol=1e-5) for n, g in expected[0].items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(PENALISED))
@pytest.mark.parametrize("how", ["layers", "checkpointing"])
def test_penalties_of_a_model_that_is_compiled_in_part_have_eager_gradients(name: str, how: str) -> None:
    """Layer by layer, and in the pieces that gradient checkpointing leaves, where blocks run again."""

    def model_of() -> Any:
        model = penalised(name)
        if how == "checkpointing":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        return model

    expected, values = penalised_steps(model := model_of(), model)
    model = model_of()
    call = model
    if how == "layers":
        for layer in model.get_base_model().model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    else:
        call = torch.compile(model, backend="aot_eager")
    found, compiled_values = penalised_steps(model, call)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert compiled_values == pytest.approx(values, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_penalty_without_the_models_own_loss_is_refused() -> None:
    model = penalised("PT3").train()
    with pytest.raises(RuntimeError, match="this call has none: give the model `labels`"):
        torch.compile(model, backend="eager")(input_ids=batches()[0])
