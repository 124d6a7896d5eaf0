"""The invariants of the contract, as functions that raise AssertionError where one does not hold.

`test_contract.py` runs them over methods, architectures and dtypes; `test_contract_catches.py` breaks each on purpose.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import StaticCache

from bem_peft.upstream import cache_argument, cache_of
from tests.contract.methods import adapted, adapter_parameters
from tests.tiny_models import SEQ2SEQ, build, call, first_cache, tokens

# a batch, a cache or padding changes the order of the base's own sums: this much of the largest logit
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def logits(model: nn.Module, **inputs: Any) -> torch.Tensor:
    if not isinstance(model, PeftModel):  # torch.matmul rounds by whether a weight wants a gradient
        model.requires_grad_(False)
    with torch.no_grad():
        return model(**inputs).logits


def assert_close(given: torch.Tensor, expected: torch.Tensor, share: float = 1.0) -> None:
    """`share` of the positions agree within the dtype's rounding; positions are all axes but the last."""
    assert given.dtype is expected.dtype
    assert given.shape == expected.shape
    limit = CLOSE[expected.dtype] * float(expected.float().abs().max())
    worst = (given.float() - expected.float()).abs().amax(dim=-1)
    assert (worst <= limit).float().mean() >= share, f"differs by {worst.max():.3g}, allowed {limit:.3g}"


def share_of(method: str, architecture: str, dtype: torch.dtype) -> float:
    """A rank mask is a choice, and so is a router: two logits that are equal within bfloat16 may change places."""
    chooses = method.startswith("rank_mask") or architecture == "qwen2_moe"
    return 0.5 if dtype is torch.bfloat16 and chooses else 1.0


def gradient_limit(method: str, architecture: str, dtype: torch.dtype) -> float:
    """Allowed norm of the difference of two gradients, relative to the gradient's."""
    if share_of(method, architecture, dtype) < 1.0:
        return 0.6
    return {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]


def i1_fresh_is_base(method: str, architecture: str, dtype: torch.dtype) -> None:
    inputs = call(architecture, tokens())
    base = logits(build(architecture, dtype), **inputs)
    fresh = adapted(method, architecture, dtype, fresh=True)
    assert torch.equal(logits(fresh, **inputs), base), "a fresh adapter changes the logits"
    trained = adapted(method, architecture, dtype)
    assert not torch.equal(logits(trained, **inputs), base), "the adapter has no effect"
    with trained.disable_adapter():
        assert torch.equal(logits(trained, **inputs), base), "disable_adapter does not restore the base"
    assert not torch.equal(logits(trained, **inputs), base), "the adapter did not come back"


def i2_causal(method: str, architecture: str, dtype: torch.dtype) -> None:
    model, ids = adapted(method, architecture, dtype), tokens()
    later = ids.clone()
    later[:, 6] = (ids[:, 6] + 7) % 40 + 3
    if architecture in SEQ2SEQ:  # the encoder sees the whole input, the decoder only what came before
        before = logits(model, input_ids=ids, decoder_input_ids=ids)
        after = logits(model, input_ids=ids, decoder_input_ids=later)
    else:
        before, after = logits(model, input_ids=ids), logits(model, input_ids=later)
    assert_close(after[:, :6], before[:, :6], share_of(method, architecture, dtype))
    assert not torch.equal(after[:, 6:], before[:, 6:])


def i3_cached_decoding(method: str, architecture: str, dtype: torch.dtype) -> None:
    model, ids = adapted(method, architecture, dtype), tokens()
    if architecture in SEQ2SEQ:
        full = logits(model, input_ids=ids, decoder_input_ids=ids)
        encoder = model.get_base_model().get_encoder()(input_ids=ids)
        fixed: dict[str, Any] = {"encoder_outputs": encoder}
        name = "decoder_input_ids"
    else:
        full, fixed, name = logits(model, input_ids=ids), {}, "input_ids"
    cache, steps, argument = first_cache(model, len(ids)), [], cache_argument(model)
    for piece in (ids[:, :4], *ids[:, 4:].split(1, dim=1)):
        with torch.no_grad():
            out = model(**{name: piece, argument: cache}, **fixed, use_cache=True)
        cache = cache_of(out)
        steps.append(out.logits)
    assert_close(torch.cat(steps, dim=1), full, share_of(method, architecture, dtype))


def i3_static_cache(method: str, architecture: str, dtype: torch.dtype) -> None:
    model, ids = adapted(method, architecture, dtype), tokens()
    full = logits(model, input_ids=ids)
    cache = StaticCache(config=model.config, max_cache_len=16)
    steps, argument = [], cache_argument(model)
    for piece in (ids[:, :4], *ids[:, 4:].split(1, dim=1)):
        with torch.no_grad():
            out = model(input_ids=piece, use_cache=True, **{argument: cache})
        steps.append(out.logits)
    assert_close(torch.cat(steps, dim=1), full, share_of(method, architecture, dtype))


def i3_generate(method: str, architecture: str, dtype: torch.dtype) -> None:
    """Greedy and beam search choose the same tokens with and without the cache; left padding is no matter."""
    model, ids = adapted(method, architecture, dtype), tokens(batch=2, length=6)
    options = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5, "pad_token_id": 0}
    for beams in (1, 3):
        with_cache = model.generate(input_ids=ids, num_beams=beams, use_cache=True, **options)
        without = model.generate(input_ids=ids, num_beams=beams, use_cache=False, **options)
        assert torch.equal(with_cache, without), f"{beams} beams: the cache changes the tokens"
    if architecture in SEQ2SEQ or architecture == "jamba":  # a state-space block of transformers sees the padding
        return
    alone = model.generate(input_ids=ids[:1], attention_mask=torch.ones(1, 6, dtype=torch.long), **options)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids[:1]), dim=1)
    mask = torch.cat((torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 6, dtype=torch.long)), dim=1)
    left = model.generate(input_ids=padded, attention_mask=mask, **options)
    assert torch.equal(left[:, 9:], alone[:, 6:]), "left padding changes the tokens"


def i4_batch_equals_alone(method: str, architecture: str, dtype: torch.dtype) -> None:
    model, ids = adapted(method, architecture, dtype), tokens(batch=3)
    batch = logits(model, **call(architecture, ids))
    for row in range(3):
        alone = logits(model, **call(architecture, ids[row : row + 1]))
        assert_close(batch[row : row + 1], alone, share_of(method, architecture, dtype))
    if architecture == "jamba":
        return
    short = ids[:1, :6]
    alone = logits(model, **call(architecture, short))
    padded = torch.cat((short, torch.zeros(1, 3, dtype=torch.long)), dim=1)
    both = torch.cat((padded, ids[1:2]))
    mask = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])
    assert_close(logits(model, **call(architecture, both, mask))[:1, :6], alone, share_of(method, architecture, dtype))


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in adapter_parameters(model).items() if p.grad is not None}


def assert_same_gradients(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float) -> None:
    """In half precision a gradient that is a small difference of large ones is held to 2 % of the largest as well."""
    assert set(given) == set(expected), "not the same parameters have a gradient"
    least = 1e-6 if limit <= 1e-3 else 0.02 * max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        size = float(gradient.norm()) + least
        assert float((given[name] - gradient).norm()) <= limit * size, f"{name}: another gradient"


def loss_of(model: nn.Module, architecture: str, ids: torch.Tensor) -> torch.Tensor:
    return model(**call(architecture, ids)).logits.float().log_softmax(-1).square().mean()


def i5_gradient_checkpointing(method: str, architecture: str, dtype: torch.dtype) -> None:
    ids = tokens(batch=4)
    plain = adapted(method, architecture, dtype).train()
    expected = gradients(plain, loss_of(plain, architecture, ids))
    assert set(expected) == set(adapter_parameters(plain)), "a parameter has no gradient"
    for reentrant in (False, True):
        model = adapted(method, architecture, dtype).train()
        for module in model.modules():  # enable_input_require_grads of transformers 4.57 misses BART's embeddings
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda _module, _args, out: out.requires_grad_())
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        limit = gradient_limit(method, architecture, dtype)
        assert_same_gradients(gradients(model, loss_of(model, architecture, ids)), expected, limit)


def i5_accumulation_and_two_forwards(method: str, architecture: str, dtype: torch.dtype) -> None:
    ids = tokens(batch=4)
    model = adapted(method, architecture, dtype).train()
    expected = gradients(model, loss_of(model, architecture, ids))
    limit = gradient_limit(method, architecture, dtype)
    model.zero_grad()
    for part in ids.split(2):
        (loss_of(model, architecture, part) / 2).backward()
    halves = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
    assert_same_gradients(halves, expected, limit)
    first, second = loss_of(model, architecture, ids[:2]), loss_of(model, architecture, ids[2:])
    assert_same_gradients(gradients(model, (first + second) / 2), halves, limit)


def i6_saved_and_loaded(method: str, architecture: str, dtype: torch.dtype, folder: Any) -> None:
    model, inputs = adapted(method, architecture, dtype), call(architecture, tokens())
    expected = logits(model, **inputs)
    model.save_pretrained(folder)
    assert not list(folder.glob("*.bin"))
    loaded = PeftModel.from_pretrained(build(architecture, dtype), folder).eval()
    assert torch.equal(logits(loaded, **inputs), expected), "the loaded adapter gives other logits"
    other = PeftModel.from_pretrained(build(architecture, dtype), folder, adapter_name="another").eval()
    assert torch.equal(logits(other, **inputs), expected), "under another name it gives other logits"


def i8_merged_equals_unmerged(method: str, architecture: str, dtype: torch.dtype) -> None:
    model, inputs = adapted(method, architecture, dtype), call(architecture, tokens())
    before = {k: v.clone() for k, v in model.get_base_model().state_dict().items() if "base_layer" in k}
    expected = logits(model, **inputs)
    model.merge_adapter()
    assert_close(logits(model, **inputs), expected)
    model.unmerge_adapter()
    assert_close(logits(model, **inputs), expected)
    for name, weight in model.get_base_model().state_dict().items():
        if name in before:
            torch.testing.assert_close(weight, before[name], rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert_close(logits(model.merge_and_unload(safe_merge=True), **inputs), expected)


@functools.cache
def base_compiles_whole(architecture: str) -> bool:
    """Whether the model without an adapter is one graph: T5 and BART of transformers 4.57 are not, with torch 2.8."""
    torch._dynamo.reset()
    model = torch.compile(build(architecture), fullgraph=True, backend="eager")
    try:
        with torch.no_grad():
            model(**call(architecture, tokens()))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


def i10_compiles_whole(method: str, architecture: str, dtype: torch.dtype, backend: str = "aot_eager") -> None:
    """As whole as the base model does, and with its numbers."""
    is_whole = base_compiles_whole(architecture)
    torch._dynamo.reset()
    model, ids = adapted(method, architecture, dtype), tokens()
    expected = logits(model, **call(architecture, ids))
    compiled = torch.compile(model, fullgraph=is_whole, backend=backend)
    with torch.no_grad():
        assert_close(compiled(**call(architecture, ids)).logits, expected, share_of(method, architecture, dtype))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(3):
                compiled(**call(architecture, tokens(seed=seed)))
    torch._dynamo.reset()


def i10_training_step_compiles_whole(method: str, architecture: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model, ids = adapted(method, architecture, dtype).train(), tokens()
    expected = gradients(model, loss_of(model, architecture, ids))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_gradients(gradients(model, loss_of(compiled, architecture, ids)), expected, 1e-3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            optimizer.zero_grad()
            loss_of(compiled, architecture, tokens(seed=seed)).backward()
            optimizer.step()
    torch._dynamo.reset()


def i11_dtypes(method: str, architecture: str, dtype: torch.dtype) -> None:
    model, ids = adapted(method, architecture, dtype), tokens()
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}, "masters are not float32"
    base = build(architecture, dtype)
    assert logits(model, **call(architecture, ids)).dtype is logits(base, **call(architecture, ids)).dtype
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.register_forward_hook(lambda _m, args, out: seen.append((args[0].dtype, out.dtype)))
    logits(model, **call(architecture, ids))
    assert seen
    assert set(seen) == {(dtype, dtype)}, f"a site changed the dtype: {set(seen)}"


def i12_only_sites_touched(method: str, architecture: str, dtype: torch.dtype) -> None:
    model = adapted(method, architecture, dtype).train()
    base = {k: v.clone() for k, v in build(architecture, dtype).state_dict().items()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(trainable) == sorted(adapter_parameters(model)), "something else is trainable"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, architecture, tokens()).backward()
        optimizer.step()
    state = model.get_base_model().state_dict()
    written = {k.replace(".base_layer", ""): v for k, v in state.items() if "bem_" not in k}
    assert set(written) == set(base)
    for name, weight in base.items():
        assert torch.equal(written[name], weight), f"{name} was written"
    sites = {name.split(".bem_")[0].rpartition(".")[2] for name in adapter_parameters(model)}
    assert sites <= {"o_proj", "down_proj", "c_proj", "o", "wo", "out_proj", "fc2", "experts"}, sites
