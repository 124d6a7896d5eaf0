r"""Statistics of the heads that PT1's gates read.

"output", from W_O's input alone, for head h of a token with output o_h (head_dim,):
    energy_h = log (|o_h|^2 / sum_h' |o_h'|^2)     (an even attention row averages its values away: low energy)
    evenness_h = (sum_c o_hc)^2 / sum_c o_hc^2     (head_dim where all channels are equal, about 1 where they cancel)
"exact", from the attention row p = softmax(s) over its n visible keys:
    H = lse(s) - sum_j p_j s_j,    var = (sum_j p_j^2) / n - 1 / n^2,    sum_j p_j^2 = exp(lse(2s) - 2 lse(s))
computed for a few query rows at a time, so that no T x T matrix is kept. Its gradient is not followed.

Exact rows come through transformers' attention interface: the model's implementation (eager, sdpa, flash) is registered
once more under a name of ours; it calls the original and hands the rows to the W_O of the same attention module.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

EXACT_PREFIX = "bem_peft_exact_"
SCORES_AT_ONCE = 1 << 22  # attention scores held at a time, in numbers


def head_output_statistics(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """energy and evenness of each head, (N, 2 heads) float32, from W_O's input x (N, heads * head_dim)."""
    heads = x.view(x.shape[0], num_heads, x.shape[1] // num_heads)
    wide = torch.promote_types(x.dtype, torch.float32)  # float16 may not hold a norm or a sum
    norm = torch.linalg.vector_norm(heads, dim=2, dtype=wide).float().clamp_min(1e-20)
    cosine = heads.sum(dim=2, dtype=wide).float() / norm
    return torch.cat((torch.log_softmax(_twice_log(norm), dim=1), cosine * cosine), dim=1)


def _twice_log(x: torch.Tensor) -> torch.Tensor:
    """2 log x, in one operator but on a CPU, which has no vector form of that one."""
    if not x.is_cpu:
        return torch.xlogy(2.0, x)
    log = x.log()
    return log + log


@dataclass(frozen=True)
class AttentionRows:
    """Statistics of attention rows, each (B, T, heads): entropy in nats, variance of the weights, visible keys."""

    entropy: torch.Tensor
    variance: torch.Tensor
    num_keys: torch.Tensor

    def pick(self, rows: torch.Tensor) -> AttentionRows:
        """The statistics of some sequences (indices) of the batch."""
        return AttentionRows(self.entropy[rows], self.variance[rows], self.num_keys[rows])

    def features(self) -> torch.Tensor:
        """(B * T, 2 heads) float32 in [0, 1]: 1 - H / log n, and the deviation relative to that of a one-hot row."""
        n = self.num_keys.clamp_min(2.0)
        focus = 1.0 - self.entropy / n.log()
        deviation = (self.variance.clamp_min(0.0) * n.square() / (n - 1.0)).sqrt()
        alone = self.num_keys < 2.0  # a token that sees one key only
        both = torch.cat((focus.masked_fill(alone, 1.0), deviation.masked_fill(alone, 1.0)), dim=2)
        return both.float().reshape(-1, both.shape[2])


@torch.no_grad()
def attention_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> AttentionRows:
    """Exact row statistics, float32 (float64 for float64 inputs).

    Args:
        query: (B, heads, T, head_dim). key: (B, kv_heads, S, head_dim), kv_heads dividing heads.
        mask: (B or 1, heads or 1, T, S), boolean (True: visible) or additive; None: all keys, or the causal ones.
        scaling: factor of the products.
        is_causal: with no mask, query t of T sees the keys up to t (T > 1).
        position_bias: (B or 1, heads or 1, T, S), added to the products.
        softcap: scores become softcap * tanh(scores / softcap).
    """
    batch, heads, tokens, _ = query.shape
    keys = key.shape[2]
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    groups = heads // key.shape[1]
    key = key.to(wide).repeat_interleave(groups, dim=1) if groups > 1 else key.to(wide)
    step = max(1, SCORES_AT_ONCE // (batch * heads * keys))
    parts = []
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        scores = query[:, :, rows].to(wide) @ key.transpose(2, 3) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if position_bias is not None:
            scores = scores + position_bias[:, :, rows if position_bias.shape[2] > 1 else slice(None), :keys].to(wide)
        visible = torch.ones((), dtype=torch.bool, device=scores.device).expand_as(scores)
        if mask is not None:
            piece = mask[:, :, rows if mask.shape[2] > 1 else slice(None), :keys]
            if piece.dtype is torch.bool:
                visible = piece.expand_as(scores)
            else:
                scores = scores + piece.to(wide)
                visible = (piece > torch.finfo(piece.dtype).min / 2).expand_as(scores)
        elif is_causal and tokens > 1:
            position = torch.arange(tokens, device=scores.device)[rows].unsqueeze(1)
            visible = (torch.arange(keys, device=scores.device) <= position).expand_as(scores)
        parts.append(_row_statistics(scores.masked_fill(~visible, -math.inf), visible))
    entropy, variance, count = (torch.cat(piece, dim=2).transpose(1, 2) for piece in zip(*parts, strict=True))
    return AttentionRows(entropy, variance, count)


def _row_statistics(scores: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entropy, variance and number of visible keys of softmax rows, each (B, heads, rows); rows that see nothing: 0."""
    count = visible.sum(dim=3).to(scores.dtype)
    blind = count == 0  # a padding row
    lse = torch.logsumexp(scores, dim=3)
    weights = torch.exp(scores - lse.masked_fill(blind, 0.0).unsqueeze(3))
    mean_score = (weights * scores.masked_fill(~visible, 0.0)).sum(dim=3)
    entropy = (lse - mean_score).masked_fill(blind, 0.0).clamp_min(0.0)
    square = torch.exp(torch.logsumexp(2.0 * scores, dim=3) - 2.0 * lse).masked_fill(blind, 0.0)
    n = count.clamp_min(1.0)
    return entropy, (square / n - 1.0 / n.square()).masked_fill(blind, 0.0), count


def require_interface(attention: nn.Module, site: str) -> None:
    """Raise ValueError where the attention module does not call transformers' attention interface."""
    if "ALL_ATTENTION_FUNCTIONS" not in inspect.getsource(type(attention)):
        raise ValueError(
            f"attention_stats='exact' cannot be had at {site}: {type(attention).__name__} does not go through "
            "transformers' attention interface; use attention_stats='output'."
        )


def use_exact_attention(model: nn.Module) -> set[str]:
    """Let every attention module of `model` hand its rows to its W_O; the implementations that were found."""
    found = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        name = getattr(config, "_attn_implementation", None)
        if isinstance(name, str) and not name.startswith(EXACT_PREFIX):
            register_exact(name)
            config._attn_implementation = EXACT_PREFIX + name  # type: ignore[union-attr]
            found.add(name)
    return found


def restore_attention(model: nn.Module) -> None:
    """Undo `use_exact_attention`."""
    for module in model.modules():
        config = getattr(module, "config", None)
        name = getattr(config, "_attn_implementation", None)
        if isinstance(name, str) and name.startswith(EXACT_PREFIX):
            config._attn_implementation = name.removeprefix(EXACT_PREFIX)  # type: ignore[union-attr]


def register_exact(name: str) -> None:
    """Make the attention implementation `name`, with rows handed to W_O, known to transformers in this process.

    Raises:
        ValueError: an implementation whose rows cannot be had.
    """
    if name == "flex_attention" or name.startswith("paged"):
        raise ValueError(
            f"attention_stats='exact' does not support attn_implementation={name!r}: use 'sdpa', 'eager' or a "
            "flash one, or attention_stats='output'."
        )
    AttentionInterface.register(EXACT_PREFIX + name, _exact_attention(name))
    masks = AttentionMaskInterface()
    if name in masks:
        AttentionMaskInterface.register(EXACT_PREFIX + name, masks[name])


def _exact_attention(name: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        readers = [child for child in module.children() if getattr(child, "wants_attention_rows", False)]
        if readers:
            rows = _rows_of_call(name, module, query, key, attention_mask, scaling, kwargs)
            for reader in readers:
                reader.take_attention_rows(rows)  # type: ignore[operator]
        if name == "eager":
            original = sys.modules[type(module).__module__].eager_attention_forward
        else:
            original = ALL_ATTENTION_FUNCTIONS[name]
        return original(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    return attention


def _rows_of_call(
    name: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> AttentionRows:
    for refused in ("s_aux", "cache"):
        if kwargs.get(refused) is not None:
            raise ValueError(
                f"attention_stats='exact' does not know attention with `{refused}` ({type(module).__name__}): "
                "use attention_stats='output'."
            )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    tokens, keys = query.shape[2], key.shape[2]
    if mask is None and (kwargs.get("sliding_window") or 0) and keys > kwargs["sliding_window"]:
        raise ValueError("attention_stats='exact' needs the mask of a sliding window: use attn_implementation='sdpa'.")
    if "flash" in name:  # the kernel takes the keys' padding mask, and aligns the last query with the last key
        position = torch.arange(keys - tokens, keys, device=query.device).unsqueeze(1)
        causal = torch.arange(keys, device=query.device) <= position
        visible = causal if is_causal else torch.ones_like(causal)
        mask = visible[None, None] if mask is None else mask[:, None, None, -keys:].bool() & visible
    return attention_rows(query, key, mask, scaling, is_causal, kwargs.get("position_bias"), kwargs.get("softcap"))
