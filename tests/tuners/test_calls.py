"""I14: calls do not see each other: threads, async tasks, nested calls, `generate`, after an exception.

Each answer is compared with the one that the same request gets alone.
"""

from __future__ import annotations

import asyncio
import copy
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

import bem_peft
from bem_peft import HeadGroupGatingConfig, retrieval_quality, use_kernels
from bem_peft.tuners.calls.call_state import find_call_state
from tests.contract.methods import METHODS, adapted, adapter_parameters, randomize
from tests.tiny_models import VOCABULARY, build, tokens

FORMS = ("torch", "cpp")
THREADS, REQUESTS = 8, 1000


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # threads change as often as they can
    yield
    sys.setswitchinterval(interval)
    use_kernels("torch")


def gated(architecture: str = "llama", **fields: Any) -> nn.Module:
    task = "SEQ_2_SEQ_LM" if architecture == "t5" else "CAUSAL_LM"
    model = get_peft_model(build(architecture), HeadGroupGatingConfig(task_type=task, retrieval="quality", **fields))
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "retrieval_weight" in name:
                parameter.fill_(4.0)
    return model.eval()


def answer(model: nn.Module, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def gradients_by_name(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in adapter_parameters(model).items() if p.grad is not None}


def is_clean(model: nn.Module) -> bool:
    state = find_call_state(model)
    assert state is not None
    return state.frame() is None and state.traced is None and not state.threads


# -- a server


def requests(seed: int, has_quality: bool) -> list[dict[str, Any]]:
    """Requests of 1 to 3 rows and 2 to 12 tokens; with names, with quality a row or a token, or with none."""
    draw = random.Random(seed)
    found = []
    for _ in range(40):
        rows, length = draw.randint(1, 3), draw.randint(2, 12)
        generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
        inputs: dict[str, Any] = {"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator)}
        kind = draw.choice(("row", "token", "none")) if has_quality else "none"
        if kind != "none":
            shape = (rows,) if kind == "row" else (rows, length)
            inputs["retrieval_quality"] = torch.rand(shape, generator=generator)
        if draw.random() < 0.5:
            inputs["adapter_names"] = [draw.choice(("default", "second", "__base__")) for _ in range(rows)]
        found.append(inputs)
    return found


def served(model: nn.Module, pool: list[dict[str, Any]], call: Callable[..., torch.Tensor], count: int) -> int:
    """How many of `count` answers, given by THREADS threads at once, are not those given alone."""
    alone = [call(model, **request) for request in pool]
    order = [random.Random(7).randrange(len(pool)) for _ in range(count)]
    assert len({tuple(a.flatten()[:4].tolist()) for a in alone}) > len(pool) // 2, "requests that cannot be told apart"

    def serve(index: int) -> bool:
        found = call(model, **pool[index])
        return found.shape == alone[index].shape and torch.allclose(found, alone[index], rtol=1e-5, atol=1e-6)

    with ThreadPoolExecutor(THREADS) as threads:
        return sum(not is_right for is_right in threads.map(serve, order))


def with_second(model: nn.Module, config: Any) -> nn.Module:
    torch.manual_seed(1)
    model.add_adapter("second", copy.deepcopy(config))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("statistics", ["output", "exact"])
def test_a_server_answers_each_request_as_if_alone(statistics: str, form: str) -> None:
    use_kernels(form)
    config = HeadGroupGatingConfig(task_type="CAUSAL_LM", retrieval="quality", attention_stats=statistics)
    model = with_second(gated(attention_stats=statistics), config)
    assert served(model, requests(0, True), answer, REQUESTS) == 0
    assert is_clean(model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_a_server_of_every_method(method: str, form: str) -> None:
    use_kernels(form)
    model = adapted(method, "llama")
    with_second(model, model.peft_config["default"])
    assert served(model, requests(1, False), answer, 200) == 0
    assert is_clean(model)


def generated(model: Any, **inputs: Any) -> torch.Tensor:
    return model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=2, pad_token_id=0,
        output_scores=True, return_dict_in_generate=True,
    ).sequences_scores  # fmt: skip


def test_a_server_that_generates() -> None:
    config = HeadGroupGatingConfig(task_type="CAUSAL_LM", retrieval="quality")
    pool = [r for r in requests(2, True) if getattr(r.get("retrieval_quality"), "ndim", 1) == 1]
    assert served(with_second(gated(), config), pool, generated, 120) == 0


class TrainedWhole(nn.Module):
    """A model with a head that `modules_to_save` holds: PEFT's wrapper takes names from a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.o_proj(x))


def test_modules_trained_whole_answer_each_request_as_if_alone() -> None:
    config = bem_peft.KroneckerConfig(
        target_modules=["o_proj"], modules_to_save=["head"], u_rank=2, v_rank=2, init_weights=False
    )
    model = get_peft_model(TrainedWhole(), config).eval()
    model.add_adapter("second", copy.deepcopy(config))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["second"].weight.normal_()
    draw = random.Random(3)
    pool = [
        {"x": torch.randn(3, 16), "adapter_names": [draw.choice(("default", "second", "__base__")) for _ in range(3)]}
        for _ in range(20)
    ] + [{"x": torch.randn(3, 16)} for _ in range(20)]

    def call(model: nn.Module, x: torch.Tensor, **names: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(x, **names)

    assert served(model, pool, call, REQUESTS) == 0


# -- one thread


@pytest.mark.parametrize("name", ["retrieval_qualty", "retrieval_score", "retrievals"])
def test_a_misspelt_name_is_refused(name: str) -> None:
    model, ids = gated(), tokens()
    with pytest.raises(ValueError, match=f"`{name}` is no argument of LlamaForCausalLM: write 'retrieval_quality' or"):
        model(**{"input_ids": ids, name: torch.ones(2)})
    assert is_clean(model)
    answer(model, input_ids=ids, retrieval_quality=torch.ones(2))


def test_async_tasks_do_not_see_each_other() -> None:
    model, ids = gated(), tokens()
    values = [torch.full((2,), value) for value in (0.0, 0.3, 0.6, 1.0)]
    alone = [answer(model, input_ids=ids, retrieval_quality=value) for value in values]

    async def handle(value: torch.Tensor) -> torch.Tensor:
        with retrieval_quality(model, value):
            await asyncio.sleep(0)
            first = answer(model, input_ids=ids)
            await asyncio.sleep(0)
            assert torch.equal(answer(model, input_ids=ids), first)
        return first

    async def serve() -> list[torch.Tensor]:
        return list(await asyncio.gather(*(handle(value) for value in values)))

    assert all(torch.equal(a, b) for a, b in zip(asyncio.run(serve()), alone, strict=True))
    assert is_clean(model)


def test_a_nested_call_leaves_the_outer_one_as_it_was() -> None:
    """A block of the model calls the model again, with values of its own, before its projections run."""
    model, ids = gated(), tokens()
    low, high = torch.zeros(2), torch.ones(2)
    alone = answer(model, input_ids=ids, retrieval_quality=low)
    inner = answer(model, input_ids=ids[:, :4], retrieval_quality=high)
    seen, is_inside = [], False

    def call_again(*_: Any) -> None:
        nonlocal is_inside
        if not is_inside:
            is_inside = True
            seen.append(answer(model, input_ids=ids[:, :4], retrieval_quality=high))
            is_inside = False

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(call_again)
    found = answer(model, input_ids=ids, retrieval_quality=low)
    handle.remove()
    assert torch.equal(found, alone)
    assert torch.equal(seen[0], inner)
    assert is_clean(model)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, asyncio.CancelledError])
@pytest.mark.parametrize("statistics", ["output", "exact"])
def test_a_call_that_ends_in_an_error_leaves_nothing(statistics: str, error: type[BaseException]) -> None:
    model, ids = gated(attention_stats=statistics), tokens()
    plain = answer(model, input_ids=ids)

    def fail(*_: Any) -> None:
        raise error

    for place in (model.base_model.model.model.layers[1].self_attn.o_proj, model.base_model.model.model.layers[0]):
        handle = place.register_forward_pre_hook(fail)
        for names in ({}, {"adapter_names": ["default", "default"]}):
            with pytest.raises(error):
                model(input_ids=ids, retrieval_quality=torch.ones(2), **names)
            assert is_clean(model)
        with pytest.raises(error):
            model.generate(input_ids=ids, retrieval_quality=torch.ones(2), max_new_tokens=2, pad_token_id=0)
        handle.remove()
        assert is_clean(model)
        assert torch.equal(answer(model, input_ids=ids), plain)


def test_the_encoder_of_a_generating_model_sees_the_quality() -> None:
    """The first decoding step of `generate` gives what the model called as a whole gives."""
    model, ids = gated("t5"), tokens()
    for quality in (torch.zeros(2), torch.tensor([1.0, 0.2])):
        start = torch.zeros(2, 1, dtype=torch.long)
        whole = answer(model, input_ids=ids, decoder_input_ids=start, retrieval_quality=quality)[:, -1]
        out = model.generate(
            input_ids=ids, retrieval_quality=quality, max_new_tokens=1, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        torch.testing.assert_close(out.logits[0], whole, rtol=1e-4, atol=1e-5)


def test_an_assistant_has_values_of_its_own() -> None:
    """Greedy assisted decoding gives the greedy text, whoever assists; the assistant's quality is not the model's."""
    model, assistant, ids = gated(), gated(), tokens(batch=1, length=6)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    seen = []
    handle = assistant.base_model.model.model.layers[0].register_forward_pre_hook(
        lambda *_: seen.append(find_call_state(assistant).values.retrieval_quality)  # type: ignore[union-attr]
    )
    for quality in (torch.zeros(1), torch.ones(1)):
        plain = model.generate(input_ids=ids, retrieval_quality=quality, **options)
        assisted = model.generate(input_ids=ids, retrieval_quality=quality, assistant_model=assistant, **options)
        assert torch.equal(assisted, plain)
    handle.remove()
    assert seen
    assert all(value is None for value in seen)
    assert is_clean(model)
    assert is_clean(assistant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_in_another_thread_has_the_values_of_its_call(reentrant: bool) -> None:
    """Checkpointed blocks run again in the backward pass, here while another call is at work in the first thread."""
    ids, quality = tokens(), torch.tensor([0.1, 0.9])
    plain = gated().train()
    plain(input_ids=ids, labels=ids, retrieval_quality=quality).loss.backward()
    expected = gradients_by_name(plain)
    model = gated().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    loss = model(input_ids=ids, labels=ids, retrieval_quality=quality).loss
    with retrieval_quality(model, torch.ones(2)):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    found = gradients_by_name(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


# -- one value a row


@pytest.mark.parametrize("joined", ["tiled", "interleaved"])
def test_a_batch_of_pairs_takes_a_value_for_each_row(joined: str) -> None:
    model, first, second = gated(), tokens(seed=1), tokens(seed=2)
    quality = torch.tensor([0.0, 1.0])
    stack = (lambda a, b: torch.cat((a, b))) if joined == "tiled" else lambda a, b: torch.stack((a, b), 1).flatten(0, 1)
    pairs = stack(first, second)
    for value in (quality, quality[:, None].expand(2, first.shape[1])):
        with pytest.raises(ValueError, match=r"`retrieval_quality` holds 2 values and the call has 4 rows.*one a row"):
            answer(model, input_ids=pairs, retrieval_quality=value)
        with retrieval_quality(model, value), pytest.raises(ValueError, match="one a row"):
            answer(model, input_ids=pairs)
    alone = stack(*(answer(model, input_ids=ids, retrieval_quality=quality) for ids in (first, second)))
    found = answer(model, input_ids=pairs, retrieval_quality=stack(quality, quality))
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        answer(model, input_ids=pairs, adapter_names=["default", "__base__"])
    assert is_clean(model)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generate_of_a_model_adapted_by_transformers_repeats_values_where_it_is_told(options: dict[str, int]) -> None:
    model, ids, quality = gated(), tokens(), torch.tensor([0.0, 1.0])
    options = {**options, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, retrieval_quality=quality, **options)
    base = model.base_model.model
    with retrieval_quality(base, quality, may_repeat=True):
        assert torch.equal(base.generate(input_ids=ids, **options), expected)
    with retrieval_quality(base, quality), pytest.raises(ValueError, match="one a row"):
        base.generate(input_ids=ids, **options)


# -- compiled regions, which cannot read a context variable


def test_compiled_blocks_have_the_values_of_their_call_and_refuse_two_threads() -> None:
    model, ids = gated(), tokens()
    values = [torch.zeros(2), torch.tensor([1.0, 0.3])]
    alone = [answer(model, input_ids=ids, retrieval_quality=value) for value in values]
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="eager")
    for value, expected in zip(values, alone, strict=True):
        torch.testing.assert_close(answer(model, input_ids=ids, retrieval_quality=value), expected)
    is_running, may_end = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        is_running.set()
        may_end.wait(60)

    handle = model.base_model.model.model.norm.register_forward_pre_hook(hold)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(answer, model, input_ids=ids, retrieval_quality=values[0])
        assert is_running.wait(60)
        handle.remove()
        with pytest.raises(RuntimeError, match="two threads"):
            answer(model, input_ids=ids, retrieval_quality=values[1])
        may_end.set()
        torch.testing.assert_close(slow.result(), alone[0])
    torch.testing.assert_close(answer(model, input_ids=ids, retrieval_quality=values[1]), alone[1])
    assert is_clean(model)
