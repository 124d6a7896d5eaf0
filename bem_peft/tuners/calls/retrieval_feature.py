r"""Retrieval in a call: how good the retrieved documents are, and a gate's feature of it.

The feature is 2q - 1 in [-1, 1] for a quality q in [0, 1], given (`retrieval_quality`) or scored from the retriever's
scores (`retrieval_scores`):  q = sigmoid(w . `list_features` + b).  Where a call gives none it is 0, as q = 1/2 is.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from torch import nn

from bem_peft.tuners.calls.call_frame import repeat_rows
from bem_peft.tuners.calls.call_state import CallState


def list_features(scores: torch.Tensor) -> torch.Tensor:
    r"""What the scorer reads of a retriever's scores: (B, 3) float32 in [0, 1], from (B, K), -inf where none.

    With s_1 >= ... >= s_n the finite scores of a list and u_i = (s_i - mean) / deviation:
        u_1 / sqrt(n - 1)               how far the first stands out; 1: it alone differs
        (s_1 - s_2) / (s_1 - s_n)       its margin, in ranges of the list
        1 - H(softmax(u)) / log n       how concentrated the list is
    All three are 0 for one document, and where the scores are equal (to 1e-6 of the largest |s|).

    Retrievers score on scales of their own (BM25 up to some 30, cosines below 1), so that features of the scores
    themselves would saturate the scorer with one and not move it with another. These do not change with a shift or a
    positive factor of the list's scores, nor with how far it is padded. The level of the scores is not read.

    Source: u is the zero-mean, unit-variance normalisation of Montague and Aslam, Relevance score normalization for
    metasearch, CIKM 2001; that the deviation within a list tells a query's quality: Shtok et al., Predicting query
    performance by query-drift estimation, TOIS 2012.
    """
    scores = scores.to(torch.float64 if scores.device.type == "cpu" else torch.float32)
    found = scores > -torch.inf
    largest = scores.abs().masked_fill(~found, 0.0).amax(1, keepdim=True)
    scaled = scores / largest.clamp_min(torch.finfo(scores.dtype).tiny)  # no difference can overflow
    ordered = scaled.sort(dim=1, descending=True).values
    real = ordered > -torch.inf
    below = (ordered[:, :1] - ordered).masked_fill(~real, 0.0)  # s_1 - s_i
    width = below.amax(1, keepdim=True)
    varies = width > 1e-6
    below = torch.where(varies, below / width.clamp_min(1e-6), 0.0)  # in [0, 1]
    n = found.sum(1, keepdim=True).clamp_min(1).to(scores.dtype)
    mean = below.sum(1, keepdim=True) / n
    deviation = ((below - mean).masked_fill(~real, 0.0).square().sum(1, keepdim=True) / n).sqrt()
    u = (mean - below) / torch.where(varies, deviation, 1.0)
    share = torch.where(real, (u - u[:, :1]).exp(), 0.0)
    share = share / share.sum(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    entropy = torch.special.entr(share).sum(1, keepdim=True)
    margin = below[:, 1:2] if below.shape[1] > 1 else below
    features = (u[:, :1] / (n - 1.0).clamp_min(1.0).sqrt(), margin, 1.0 - entropy / n.clamp_min(2.0).log())
    return torch.where(varies, torch.cat(features, dim=1), 0.0).float()


class RetrievalReader(nn.Module):
    """What an adapter with a feature of retrieval adds to its parameters: a weight (G,) and, for scores, the scorer."""

    retrieval: str  # "none", "quality" or "scores"
    call: CallState
    site_name: str
    lr_groups: ClassVar[dict[str, str]] = dict.fromkeys(
        ("retrieval_weight", "scorer_weight", "scorer_bias"), "controller"
    )

    def add_retrieval_parameters(self, kind: str, gates: int) -> None:
        """For `__init__`: the parameters that `kind` needs, for G = `gates`."""
        self.retrieval = kind
        if kind != "none":
            self.retrieval_weight = nn.Parameter(torch.empty(gates))
        if kind == "scores":
            self.scorer_weight = nn.Parameter(torch.empty(3))
            self.scorer_bias = nn.Parameter(torch.empty(1))

    def reset_retrieval_parameters(self) -> None:
        """No influence at the start, and a scorer that counts each feature alike."""
        if self.retrieval != "none":
            nn.init.zeros_(self.retrieval_weight)
        if self.retrieval == "scores":
            nn.init.ones_(self.scorer_weight)
            nn.init.zeros_(self.scorer_bias)

    def retrieval_feature(self, tokens: int) -> torch.Tensor:
        """(N, 1) or (1, 1) in [-1, 1]."""
        values, device = self.call.values, self.retrieval_weight.device
        if self.retrieval == "scores":
            used = (self.scorer_weight.sum() + self.scorer_bias).float().view(1, 1) * 0.0  # in the graph of every step
            if values.retrieval_scores is None:
                self.warn_of_no_retrieval("retrieval_scores")
                return used
            quality = self.score_quality(values.retrieval_scores.to(device))
        elif values.retrieval_quality is None:
            self.warn_of_no_retrieval("retrieval_quality")
            return torch.zeros(1, 1, device=device)
        else:
            quality = values.retrieval_quality.to(device).float()
        lead = self.call.lead
        quality = repeat_rows(quality, lead[0])
        if quality.dim() == 1:
            quality = quality.view(-1, *(1,) * (len(lead) - 1)).expand(lead)
        elif quality.shape != lead:
            raise ValueError(
                f"`retrieval_quality` a token has shape {tuple(quality.shape)}, {self.site_name} sees {tuple(lead)}: "
                "give one value a sequence, (batch,), for cached decoding and for encoder-decoder models."
            )
        return (2.0 * quality - 1.0).reshape(tokens, 1)

    def warn_of_no_retrieval(self, name: str) -> None:
        """In training: a Trainer drops a column that it does not know, and nothing else would tell."""
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            warnings.warn(
                f"retrieval={self.retrieval!r}, and this training step was given no `{name}`: the gates read a quality "
                "of 1/2. As a Trainer column it needs TrainingArguments(remove_unused_columns=False).",
                stacklevel=2,
            )

    def score_quality(self, scores: torch.Tensor) -> torch.Tensor:
        """sigmoid(w . `list_features` + b), (B,), from scores (B, K), -inf where none; 1/2 for a list of none."""
        features = list_features(scores)
        quality = torch.sigmoid(features @ self.scorer_weight.float() + self.scorer_bias.float())
        return torch.where((scores > -torch.inf).any(1), quality, 0.5)
