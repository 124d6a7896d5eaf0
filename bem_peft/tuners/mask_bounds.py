r"""How large an update B D A can become, where each token has a diagonal D of its own: at most k entries, in [0, d].

For any positive weights, with b_i and a_i the columns of B and rows of A:

    sigma_1(B D A) <= d sigma_1(B^ S) sigma_1(A^ S),   B^_i = b_i sqrt(|a_i| / |b_i|),   A^_i = a_i sqrt(|b_i| / |a_i|)
    |B D A|_F^2  = sum_ij D_i D_j (A A^T)_ij (B^T B)_ij

S the k ranks that D keeps: sigma_1(B^ S)^2 is at most the largest eigenvalue of the Gram matrix of B^, (R, R), and at
most the largest sum of k absolute entries of one of its rows (Gershgorin). The norm of B A itself bounds nothing: a
mask undoes what cancels in it. Where the masks are few, the largest norm is found by trying them: it is convex in D, so
it lies at a corner, D_i in {0, d}.

Source: Horn and Johnson, Matrix Analysis, 2nd ed., 6.1.1 (Gershgorin) and 7.5.3 (the Schur product of Gram matrices).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from bem_peft.kernels.hadamard import hadamard_transform

TRIED = 5000  # masks that are tried one by one


@dataclass(frozen=True)
class RankMasks:
    """The masks and gates that stand between A and some B.

    a: A (R, in) float64, the scale included. k: ranks that a token keeps. largest: d, the largest gate; above 1,
    gates reach down to 0. kept (R,): the one mask of all tokens, which gates alone vary; None: any k ranks.
    hadamard: the masks' basis is that of H; `a` is H A, in it, and each B = left (out, R) float64 is in its own.
    """

    a: torch.Tensor
    k: int
    largest: float
    kept: torch.Tensor | None = None
    hadamard: bool = False

    def _used(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, in the basis of the masks, of the ranks that some token keeps; the others' are zero."""
        b = self._turned(left)
        return (self.a, b) if self.kept is None else (self.a * self.kept.unsqueeze(1), b * self.kept)

    def _turned(self, left: torch.Tensor) -> torch.Tensor:
        """B (out, R) between its own basis and that of the masks."""
        return hadamard_transform(left.t()).t() if self.hadamard else left

    def _balance(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """|a_i|, |b_i| -> sqrt(|a_i| / |b_i|), (R,), and 1 where one of the two is 0; with it, which are not."""
        a, b = self._used(left)
        rows, columns = a.norm(dim=1), b.norm(dim=0)
        is_live = (rows > 0) & (columns > 0)
        return torch.where(is_live, rows / columns.clamp_min(1e-300), torch.ones_like(rows)).sqrt(), is_live

    def _factors(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A^ (R, in), B^ (out, R), and the weights that made them; zero where the rank adds nothing."""
        a, b = self._used(left)
        weight, is_live = self._balance(left)
        return a / weight.unsqueeze(1) * is_live.unsqueeze(1), b * weight * is_live, weight

    def bounds(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Upper bounds of sigma_1 and the Frobenius norm over all D, for B = left; scalars."""
        a, b, _ = self._factors(left)
        gram_a, gram_b = a @ a.t(), b.t() @ b
        sigma = self.largest * (self._of_any_k(gram_a) * self._of_any_k(gram_b)).sqrt()
        overlap = (gram_a * gram_b).clamp_min(0.0).topk(self.k, dim=1).values.sum(1).topk(self.k).values.sum()
        return sigma, torch.minimum(self.largest * overlap.sqrt(), sigma * math.sqrt(self.k))

    def _of_any_k(self, gram: torch.Tensor) -> torch.Tensor:
        """A bound of the largest eigenvalue of any k by k principal part."""
        rows = gram.abs().topk(self.k, dim=1).values.sum(1).amax()
        return torch.minimum(torch.linalg.eigvalsh(gram)[-1], rows)

    def clipped(self, left: torch.Tensor, cap: float) -> torch.Tensor:
        """B where the bound of sigma_1 is about `cap`: the singular values of B^ clipped, or all of B scaled, whichever
        changes B^ less."""
        a, b, weight = self._factors(left)
        limit = cap / (self.largest * self._of_any_k(a @ a.t()).sqrt().clamp_min(1e-300))
        squared, vectors = torch.linalg.eigh(b.t() @ b)
        share = (limit / squared.clamp_min(1e-300).sqrt()).clamp_max(1.0)
        part = b @ (vectors * share) @ vectors.t()
        scaled = b * (cap / self.bounds(left)[0].clamp_min(1e-300)).clamp_max(1.0)
        nearer = torch.where((part - b).norm() < (scaled - b).norm(), part, scaled)
        return left + self._turned((nearer - b) / weight)

    def largest_norms(self, left: torch.Tensor) -> tuple[float, float, bool]:
        """The largest sigma_1 and Frobenius norm over all D, and False; their bounds and True where D are too many."""
        a, b = self._used(left)
        ranks = range(a.shape[0]) if self.kept is None else [int(i) for i in self.kept.nonzero().flatten()]
        sizes = range(1, self.k + 1) if self.largest > 1.0 else (self.k,)  # a gate may switch a rank off
        if sum(math.comb(len(ranks), size) for size in sizes) > TRIED:
            sigma, norm = self.bounds(left)
            return float(sigma), float(norm), True
        right, triangle = torch.linalg.qr(a.t()).R.t(), torch.linalg.qr(b).R
        found_sigma = found_norm = 0.0
        for size in sizes:
            chosen = torch.tensor(list(itertools.combinations(ranks, size)), device=a.device)  # (masks, size)
            updates = triangle[:, chosen].transpose(0, 1) @ right[chosen]  # (masks, R, R)
            found_sigma = max(found_sigma, float(torch.linalg.matrix_norm(updates, 2).amax()))
            found_norm = max(found_norm, float(torch.linalg.matrix_norm(updates).amax()))
        return self.largest * found_sigma, self.largest * found_norm, False
