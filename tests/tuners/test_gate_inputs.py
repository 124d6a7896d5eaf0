"""What reaches PT1's gates beside the hidden states: retrieval quality, exact attention rows, penalties' masks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import bem_peft
from bem_peft import CompositeConfig, HeadGroupGatingConfig
from bem_peft.tuners import pt1_head_gating
from bem_peft.tuners.base.adapter import SiteShape
from bem_peft.tuners.calls import attention_stats
from bem_peft.tuners.calls.attention_stats import AttentionRows, attention_rows
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.calls.retrieval_feature import list_features
from bem_peft.tuners.pt1_head_gating import HeadGroupGatingAdapter
from bem_peft.upstream import cache_argument, cache_of
from tests.contract.invariants import assert_same_gradients, gradients
from tests.contract.methods import adapted, adapter_parameters, randomize
from tests.tiny_models import VOCABULARY, build, llama, tokens


def gated(task_type: str | None = "CAUSAL_LM", **fields: Any) -> nn.Module:
    model = get_peft_model(build("llama"), HeadGroupGatingConfig(task_type=task_type, **fields))
    randomize(model)
    return model.eval()


def logits(model: nn.Module, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_retrieval_quality_reaches_the_gates(task_type: str | None) -> None:
    model, ids = gated(task_type, retrieval="quality"), tokens()
    low = logits(model, input_ids=ids, retrieval_quality=torch.tensor([0.0, 0.5]))
    high = logits(model, input_ids=ids, retrieval_quality=torch.tensor([1.0, 0.5]))
    absent = logits(model, input_ids=ids)
    assert not torch.allclose(low[0], high[0])
    assert torch.equal(low[1], high[1]), "the other sequence's quality leaked"
    torch.testing.assert_close(low[1], absent[1]), "one half is neutral"
    by_token = logits(model, input_ids=ids, retrieval_quality=torch.tensor([[0.0] * 9, [0.5] * 9]))
    torch.testing.assert_close(by_token, low)
    with bem_peft.retrieval_quality(model, torch.tensor([0.0, 0.5])):
        torch.testing.assert_close(logits(model, input_ids=ids), low)
    torch.testing.assert_close(logits(model, input_ids=ids), absent)


@pytest.mark.parametrize("beams", [1, 3])
def test_retrieval_quality_holds_for_every_generated_token(beams: int) -> None:
    model, ids = gated(retrieval="quality"), tokens(batch=2, length=5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    quality = torch.tensor([0.0, 1.0])
    found = model.generate(input_ids=ids, retrieval_quality=quality, **options)
    alone = [
        model.generate(input_ids=ids[i : i + 1], retrieval_quality=quality[i : i + 1], **options) for i in range(2)
    ]
    assert torch.equal(found, torch.cat(alone))
    with bem_peft.retrieval_quality(model, quality):
        without_cache = model.generate(input_ids=ids, use_cache=False, **options)
    assert torch.equal(found, without_cache)


def test_retriever_scores_are_scored_by_a_learned_scorer() -> None:
    model, ids = gated(retrieval="scores").train(), tokens()
    scores = torch.tensor([[9.0, 1.0, 0.5], [2.0, 1.9, float("-inf")]])
    model(input_ids=ids, labels=ids, retrieval_scores=scores).loss.backward()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    adapter = next(m for m in model.modules() if isinstance(m, HeadGroupGatingAdapter))
    w, b = adapter.scorer_weight.detach().numpy(), adapter.scorer_bias.item()
    for row, quality in zip(scores.tolist(), adapter.score_quality(scores).tolist(), strict=True):
        assert quality == pytest.approx(1 / (1 + np.exp(-(w @ features_of(row) + b))), rel=1e-5)


def features_of(scores: list[float]) -> np.ndarray:
    """`list_features` of one list, by numpy and scipy in float64, from the finite scores alone."""
    s = np.sort([value for value in scores if value > -np.inf])[::-1]
    if len(s) < 2 or s[0] - s[-1] <= 1e-6 * np.abs(s).max():
        return np.zeros(3)
    u = (s - s.mean()) / s.std()
    concentration = 1 - scipy.stats.entropy(np.exp(u - u[0])) / np.log(len(s))
    return np.array([u[0] / np.sqrt(len(s) - 1), (s[0] - s[1]) / (s[0] - s[-1]), concentration])


LISTS = {
    "bm25": [24.1, 18.7, 12.0], "cosines": [0.9, 0.8, 0.2], "two": [0.3, 0.2], "negative": [-3.0, -7.0, -1.0],
    "one": [5.0], "equal": [2.0, 2.0, 2.0], "zeros": [0.0, 0.0], "one stands out": [1.0, *[0.0] * 40],
    "gap": [-np.inf, 3.0, 1.0], "huge": [1e38, -1e38, 0.0], "tiny": [1e-38, 3e-38, 4e-38], "ties": [3.0, 3.0, 1.0],
}  # fmt: skip


@pytest.mark.parametrize("name", list(LISTS))
def test_features_of_a_list_are_its_shape_and_padding_changes_nothing(name: str) -> None:
    row, expected = LISTS[name], features_of(LISTS[name])
    plain = list_features(torch.tensor([row]))
    np.testing.assert_allclose(plain[0].numpy(), expected, atol=2e-6)
    assert ((plain >= 0) & (plain <= 1)).all()
    for padding in (1, 8, 98):
        padded = torch.tensor([row + [-np.inf] * padding, [0.5, 0.1] + [-np.inf] * (len(row) + padding - 2)])
        assert torch.equal(list_features(padded)[:1], plain)
    if np.abs(row).max() < 1e30:  # a shift and a positive factor
        moved = torch.tensor([[2.5 * value + 7.0 for value in row]], dtype=torch.float64)
        np.testing.assert_allclose(
            list_features(moved)[0].numpy(), expected, atol=1e-5 if min(np.abs(row)) > 0.05 else 1
        )


def test_the_scorer_is_not_saturated_by_any_retrievers_scale() -> None:
    adapter = HeadGroupGatingAdapter(HeadGroupGatingConfig(retrieval="scores"), SiteShape("s", 12, 8), CallState())
    adapter.reset_parameters(True, SiteShape("s", 12, 8))
    for factor in (1e-3, 1.0, 30.0, 1e4):
        scores = factor * torch.tensor([[0.9, 0.8, 0.2, -np.inf]])
        quality = adapter.score_quality(scores)
        assert 0.55 < float(quality.detach()) < 0.9
        gradients = torch.autograd.grad(quality.sum(), [adapter.scorer_weight, adapter.scorer_bias])
        assert all((gradient > 0.01).all() for gradient in gradients)
    none = adapter.score_quality(torch.full((1, 4), -np.inf))
    assert none.tolist() == [0.5], "a list of no documents is as no list"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(value: float) -> None:
    model, ids = gated(retrieval="scores"), tokens()
    scores = torch.tensor([[0.3, 0.2], [value, 0.1]])
    with pytest.raises(ValueError, match=r"`retrieval_scores` holds NaN or \+inf"):
        model(input_ids=ids, retrieval_scores=scores)
    with pytest.raises(ValueError, match=r"`retrieval_scores`"), bem_peft.retrieval_scores(model, scores):
        pass


def test_a_list_reads_the_same_alone_and_beside_a_longer_one() -> None:
    model, ids = gated(retrieval="scores"), tokens()
    short = torch.tensor([[24.1, 18.7]])
    alone = logits(model, input_ids=ids[:1], retrieval_scores=short)
    batch = torch.tensor([[24.1, 18.7, -np.inf, -np.inf], [0.5, 0.4, 0.3, 0.2]])
    torch.testing.assert_close(logits(model, input_ids=ids, retrieval_scores=batch)[:1], alone, rtol=1e-5, atol=1e-5)
    empty = torch.full((2, 3), -np.inf)
    torch.testing.assert_close(logits(model, input_ids=ids, retrieval_scores=empty), logits(model, input_ids=ids))


@pytest.mark.parametrize(("retrieval", "name"), [("quality", "retrieval_quality"), ("scores", "retrieval_scores")])
def test_a_training_step_without_retrieval_warns(retrieval: str, name: str) -> None:
    model, ids = gated(retrieval=retrieval), tokens()
    model(input_ids=ids)  # inference without it is a choice
    with pytest.warns(UserWarning, match=rf"no `{name}`.*remove_unused_columns=False"):
        model.train()(input_ids=ids, labels=ids)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_checkpointed_forwards_keep_their_own_quality(reentrant: bool) -> None:
    ids, first, second = tokens(), torch.tensor([0.1, 0.9]), torch.tensor([1.0, 0.3])

    def both(model: nn.Module) -> torch.Tensor:
        a = model(input_ids=ids, labels=ids, retrieval_quality=first).loss
        return a + model(input_ids=ids, labels=ids, retrieval_quality=second).loss

    plain = gated(retrieval="quality").train()
    expected = gradients(plain, both(plain))
    model = gated(retrieval="quality").train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same_gradients(gradients(model, both(model)), expected, 1e-4)


def eager_probabilities(model: nn.Module, **inputs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, output_attentions=True)


def numpy_statistics(p: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    n = np.maximum(visible.sum(-1), 1)  # a padding row sees nothing
    return entropy, (p**2).sum(-1) / n - 1 / n**2


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_exact_rows_equal_eager_probabilities(
    implementation: str, kv_heads: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64, causal, grouped queries, left padding, and one decoding step with a cache."""
    monkeypatch.setattr(attention_stats, "SCORES_AT_ONCE", chunk)
    torch.manual_seed(0)
    softmax = torch.nn.functional.softmax  # eager asks for float32; the reference is to be float64
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
    base = llama(num_key_value_heads=kv_heads, initializer_range=0.3).double().eval()
    eager = llama(num_key_value_heads=kv_heads, attn_implementation="eager").double().eval()
    eager.load_state_dict(base.state_dict())
    base.set_attn_implementation(implementation)
    seen: list[AttentionRows] = []
    take = pt1_head_gating.take_rows

    def record(reader: Any) -> Any:
        seen.append(take(reader))
        return seen[-1]

    monkeypatch.setattr(pt1_head_gating, "take_rows", record)
    config = HeadGroupGatingConfig(task_type="CAUSAL_LM", attention_stats="exact")
    model = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    ids = torch.randint(3, VOCABULARY, (2, 7))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, use_cache=True)
        reference = eager(input_ids=ids, attention_mask=mask, use_cache=True, output_attentions=True)
        step_mask = torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), dim=1)
        argument = cache_argument(model)
        model(input_ids=ids[:, :1], attention_mask=step_mask, **{argument: cache_of(out)})
        step = eager(
            input_ids=ids[:, :1],
            attention_mask=step_mask,
            output_attentions=True,
            **{argument: cache_of(reference)},
        )
    causal = np.tril(np.ones((7, 7), dtype=bool))[None, None] & mask.bool().numpy()[:, None, None, :]
    real = mask.bool().numpy()
    for layer in range(2):
        p = reference.attentions[layer].numpy()
        entropy, variance = numpy_statistics(p, causal)
        found = seen[layer]
        np.testing.assert_allclose(found.entropy.numpy()[real], entropy.transpose(0, 2, 1)[real], atol=1e-12)
        np.testing.assert_allclose(found.variance.numpy()[real], variance.transpose(0, 2, 1)[real], atol=1e-12)
        p = step.attentions[layer].numpy()
        entropy, variance = numpy_statistics(p, step_mask.bool().numpy()[:, None, None, :])
        found = seen[2 + layer]
        np.testing.assert_allclose(found.entropy.numpy(), entropy.transpose(0, 2, 1), atol=1e-12)
        np.testing.assert_allclose(found.variance.numpy(), variance.transpose(0, 2, 1), atol=1e-12)


def test_rows_with_softcap_and_position_bias_equal_a_plain_softmax() -> None:
    query, key = torch.randn(2, 4, 5, 8, dtype=torch.float64), torch.randn(2, 2, 5, 8, dtype=torch.float64)
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    rows = attention_rows(query, key, None, 0.3, True, position_bias=bias, softcap=2.0)
    scores = 2 * torch.tanh(query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3 / 2) + bias
    p = scores.masked_fill(~torch.ones(5, 5).tril().bool(), float("-inf")).softmax(-1).numpy()
    entropy, variance = numpy_statistics(p, np.tril(np.ones((5, 5)))[None, None])
    np.testing.assert_allclose(rows.entropy.numpy(), entropy.transpose(0, 2, 1), atol=1e-12)
    np.testing.assert_allclose(rows.variance.numpy(), variance.transpose(0, 2, 1), atol=1e-12)


def test_unloading_restores_the_attention_implementation() -> None:
    model = adapted("head_gating_exact", "llama")
    assert model.config._attn_implementation.startswith("bem_peft_exact_")
    assert model.unload().config._attn_implementation == "sdpa"


def test_attention_outside_the_interface_is_refused() -> None:
    model = build("jamba").get_submodule("model")
    config = HeadGroupGatingConfig(attention_stats="exact", target_modules=["mamba.out_proj"], num_heads=4)
    with pytest.raises(ValueError, match=r"exact.*JambaMambaMixer"):
        get_peft_model(model, config)


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (["q_proj"], {"q_proj"}),
        (["o_proj", "down_proj"], {"down_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}),
        (["o_proj"], set()),
        (None, set()),
    ],
)
def test_a_target_whose_input_is_no_heads_is_told_once_a_kind(targets: Any, told: set[str], tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = HeadGroupGatingConfig(target_modules=targets, num_groups=2)
        model = get_peft_model(build("llama"), CompositeConfig([config], task_type="CAUSAL_LM"))
    found = [str(w.message) for w in caught if "no heads side by side" in str(w.message)]
    assert sorted(text.split()[2].strip(",") for text in found) == sorted(told)
    assert all("each of its 2 groups is" in text and "`num_heads`" in text for text in found)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(build("llama"), tmp_path)  # a warning would be an error here
    named = HeadGroupGatingConfig(target_modules=targets, num_groups=2, num_heads=4)
    get_peft_model(build("llama"), CompositeConfig([named], task_type="CAUSAL_LM"))
