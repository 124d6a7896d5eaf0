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
    use_kernels,
)
from bem_peft.upstream import cache_argument, cache_of
from tests.tiny_models import llama

CONFIGS: dict[str, PeftConfig] = {
    "PT1": HeadGroupGatingConfig(num_groups=2, rank_per_group=3),
    "PT1 uneven": HeadGroupGatingConfig(num_groups=2, rank_per_group=[1, 3]),
    "PT2": DynamicRankMaskConfig(total_rank=8, active_rank=3),
    "PT2 a task": DynamicRankMaskConfig(total_rank=8, active_rank=3, mask_scope="task"),
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
    use_kernels("auto")


def adapted(name: str) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(llama(max_position_embeddings=128), copy.deepcopy(CONFIGS[name]))
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
