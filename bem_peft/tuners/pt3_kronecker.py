r"""PT3, a Kronecker update at W_down:  y' = y + s B (U (x) V) x.

U (u_rank, u_dim), V (v_rank, v_dim), u_dim * v_dim = in; B (out, u_rank * v_rank), zero at the start; s = `scaling`.
Computed as B vec(U X V^T), X = x reshaped (u_dim, v_dim): the product U (x) V is never built. It is a LoRA of rank
u_rank * v_rank whose A is bound to a product, so it merges and exports exactly.

Source: Edalati et al., KronA: parameter-efficient tuning with Kronecker adapter, 2022, arXiv:2212.10650 (eq. 5 has two
factors and no B); the initialisation is the higher-order SVD of De Lathauwer, De Moor, Vandewalle, 2000.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from bem_peft import field_checks as check
from bem_peft.kernels.kronecker import kronecker_update
from bem_peft.sites.find import MLP_DOWN
from bem_peft.tuners.base.adapter import SiteShape
from bem_peft.tuners.base.adapter_config import LowRankConfig
from bem_peft.tuners.base.forms import transposed
from bem_peft.tuners.base.low_rank import LowRankAdapter, root_of
from bem_peft.tuners.base.model import AdapterModel
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.calls.penalty import diversity, orthogonality
from bem_peft.tuners.steps.sharded import whole

FOLDS_TRIED = 12  # by a budget search


@dataclass
class KroneckerConfig(LowRankConfig):
    """Config of PT3, y' = y + s B (U (x) V) x at W_down."""

    u_rank: int = field(default=8, metadata={"help": "Rows of U, at most u_dim."})
    v_rank: int = field(default=8, metadata={"help": "Rows of V, at most v_dim."})
    u_dim: int | None = field(
        default=None, metadata={"help": "Columns of U; None: the most balanced factorisation of the input width."}
    )
    v_dim: int | None = field(default=None, metadata={"help": "Columns of V, at most u_dim by default."})
    init_method: str = field(
        default="svd",
        metadata={
            "help": "'svd': leading singular vectors of W_down's two unfoldings; 'orthogonal': random orthonormal "
            "rows; 'random': normal entries of variance 1/dim."
        },
    )
    single_site_layer: int | None = field(
        default=None, metadata={"help": "Index of the only block to adapt; None: every block."}
    )
    orthogonality_strength: float = field(
        default=0.0, metadata={"help": "Weight of the penalty |U U^T - I|^2 + |V V^T - I|^2 (means of squares)."}
    )
    diversity_strength: float = field(
        default=0.0, metadata={"help": "Weight of the mean squared cosine between rows of U, and of V."}
    )

    method: ClassVar[str] = "bem_kronecker"
    roles: ClassVar[tuple[str, ...]] = (MLP_DOWN,)
    aliases: ClassVar[tuple[str, ...]] = ("pt3",)
    neighbours: ClassVar[Mapping[str, str]] = {
        **LowRankConfig.neighbours,
        "r": "`u_rank` and `v_rank`, whose product is the rank of the update",
        "rank": "`u_rank` and `v_rank`, whose product is the rank of the update",
        "decompose_factor": "`u_dim` and `v_dim`",
    }
    rank_fields: ClassVar[tuple[str, ...]] = ("u_rank", "v_rank", "u_dim", "v_dim")
    size_fields: ClassVar[tuple[str, ...]] = ("u_rank", "v_rank")  # what a budget search may change

    def __post_init__(self) -> None:
        check.check_int(self, "u_rank")
        check.check_int(self, "v_rank")
        for name in ("u_dim", "v_dim"):
            if getattr(self, name) is not None:
                check.check_int(self, name)
        check.check_choice(self, "init_method", ("svd", "orthogonal", "random"))
        check.check_number(self, "orthogonality_strength", 0.0)
        check.check_number(self, "diversity_strength", 0.0)
        if self.single_site_layer is not None:
            check.check_int(self, "single_site_layer", 0)
            if self.layers_to_transform not in (None, [self.single_site_layer]):
                raise check.field_error(
                    "single_site_layer",
                    self.single_site_layer,
                    f"contradicts `layers_to_transform` = {self.layers_to_transform!r}",
                    "set one of them",
                )
            self.layers_to_transform = [self.single_site_layer]
        super().__post_init__()

    def further_sizes(self, widths: Sequence[Sequence[int]]) -> dict[str, list[int]]:
        """The ways to fold every site's input, the most balanced first."""
        if self.u_dim is not None or self.v_dim is not None:
            return {}
        shared = math.gcd(*widths[0])
        folds = {dim for pair in factor_pairs(shared) for dim in pair}
        return {"u_dim": sorted(folds, key=lambda dim: abs(math.log(dim * dim / shared)))[:FOLDS_TRIED]}


def factor_pairs(width: int) -> list[tuple[int, int]]:
    """All (u_dim, v_dim) with u_dim * v_dim = width and u_dim >= v_dim, the most balanced first."""
    return [(width // v, v) for v in range(math.isqrt(width), 0, -1) if width % v == 0]


def resolve_dims(width: int, u_dim: int | None, v_dim: int | None, site: str) -> tuple[int, int]:
    """(u_dim, v_dim) for a site of input `width`. Raises ValueError that lists the valid pairs."""
    if u_dim is None and v_dim is None:
        return factor_pairs(width)[0]
    if u_dim is None and v_dim is not None and width % v_dim == 0:
        return width // v_dim, v_dim
    if v_dim is None and u_dim is not None and width % u_dim == 0:
        return u_dim, width // u_dim
    if u_dim is None or v_dim is None or u_dim * v_dim != width:
        pairs = ", ".join(f"{u}x{v}" for u, v in factor_pairs(width))
        raise ValueError(
            f"`u_dim` = {u_dim!r}, `v_dim` = {v_dim!r}: their product must be the input width {width} of {site}; "
            f"choose one of {pairs} (in either order), or leave both None."
        )
    return u_dim, v_dim


class KroneckerAdapter(LowRankAdapter):
    """y' = y + s B (U (x) V) x."""

    variant = "PT3"
    lr_groups = {"B": "projection", "U": "factors", "V": "factors"}
    kernel, has_operator = "kronecker", True
    is_mergeable = is_summable = True

    def __init__(self, config: KroneckerConfig, site: SiteShape, call: CallState) -> None:
        super().__init__(config, site, call)
        u_dim, v_dim = resolve_dims(site.in_features, config.u_dim, config.v_dim, site.name)
        for name, rank, dim in (("u_rank", config.u_rank, u_dim), ("v_rank", config.v_rank, v_dim)):
            if rank > dim:
                raise check.field_error(
                    name, rank, f"must not exceed {name[0]}_dim = {dim} at {site.name} (input width {site.in_features})"
                )
        self.init_method, self.inference_mode = config.init_method, config.inference_mode
        self.orthogonality_strength = config.orthogonality_strength
        self.diversity_strength = config.diversity_strength
        self.is_penalised = bool(self.orthogonality_strength or self.diversity_strength)
        self.has_parameter_penalties = self.is_penalised
        self.U = nn.Parameter(torch.empty(config.u_rank, u_dim))
        self.V = nn.Parameter(torch.empty(config.v_rank, v_dim))
        self.v_rank = config.v_rank
        self.B = nn.Parameter(torch.empty(site.out_features, config.u_rank * config.v_rank))

    def reset_parameters(self, init_weights: bool, site: SiteShape) -> None:
        if init_weights:
            nn.init.zeros_(self.B)
        else:
            nn.init.normal_(self.B, std=self.B.shape[1] ** -0.5)
        if self.U.device.type == "meta":  # filled by the checkpoint that is being loaded
            return
        if self.init_method == "svd" and not self.inference_mode and site.weight is not None:
            weight = site.weight()
            if weight.device.type != "meta":
                u, v = higher_order_svd(weight, self.U.shape, self.V.shape)
                with torch.no_grad():
                    self.U.copy_(u)
                    self.V.copy_(v)
                return
        for factor in (self.U, self.V):
            # an adapter that is loaded for inference gets its factors from the file: no decomposition for nothing
            if self.init_method == "random" or self.inference_mode:
                nn.init.normal_(factor, std=factor.shape[1] ** -0.5)
            else:
                nn.init.orthogonal_(factor)

    def derive(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return self.U.to(dtype), self.V.to(dtype), transposed(self.B, dtype)

    def transform(self, x: torch.Tensor, y: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        u, v, b_t = weights
        if self.carries_penalties(y):
            y = self.carry_parameter_penalties(y)
        if self.dropout:
            x = self.drop(x)
        return kronecker_update(x, y, u, v, b_t, self.scaling)

    def carry_parameter_penalties(self, y: torch.Tensor) -> torch.Tensor:
        """y with the orthogonality and diversity penalties of U and V."""
        if self.orthogonality_strength:
            value = orthogonality(self.U) + orthogonality(self.V)
            y = self.penalise(y, "orthogonality", self.orthogonality_strength, value, once=True)
        if self.diversity_strength:
            value = diversity(self.U) + diversity(self.V)
            y = self.penalise(y, "diversity", self.diversity_strength, value, once=True)
        return y

    def right_root(self) -> tuple[torch.Tensor, torch.Tensor]:
        (u, u_inverse), (v, v_inverse) = root_of(whole(self.U).double()), root_of(whole(self.V).double())
        return torch.kron(u, v) * self.scaling, torch.kron(u_inverse, v_inverse) / self.scaling

    def lora_factors(self, gate: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A (R, in) and B (out, R) with s B A the update; exact."""
        return torch.kron(self.U.detach(), self.V.detach()), self.B.detach()

    @staticmethod
    def weighted_fields(configs: Sequence[Any], weights: Sequence[float]) -> dict[str, Any]:
        return {"init_method": "random"}

    @staticmethod
    def weighted_sizes(parts: Sequence[tuple[Any, float]]) -> dict[str, Any]:
        """Rows of U and of V of all of them, as far as there is room: the widths are a basis of any more."""
        folds = {(part.U.shape[1], part.V.shape[1]) for part, _ in parts}
        if len(folds) > 1:
            raise ValueError(
                f"PT3 at {parts[0][0].site_name} folds its input as {sorted(folds)} (`u_dim`, `v_dim`) in adapters "
                "that are to be added up: no one PT3 is their sum; merge them one after the other, or export each as a "
                "LoRA (`export_lora`)."
            )
        ((u_dim, v_dim),) = folds
        u_rank, v_rank = (sum(getattr(part, n).shape[0] for part, _ in parts) for n in ("U", "V"))
        return {"u_rank": min(u_rank, u_dim), "v_rank": min(v_rank, v_dim), "u_dim": u_dim, "v_dim": v_dim}

    def fill_weighted(self, parts: Sequence[tuple[Any, float]]) -> None:
        """B = sum_i w_i (s_i / s) B_i (C_i (x) D_i)  with  U_i = C_i U, V_i = D_i V."""
        u_shares, v_shares = (
            _common_rows(self.U, [p.U for p, _ in parts]),
            _common_rows(self.V, [p.V for p, _ in parts]),
        )
        total = torch.zeros_like(self.B).view(-1, self.U.shape[0], self.V.shape[0])
        for (part, weight), u, v in zip(parts, u_shares, v_shares, strict=True):
            blocks = part.B.view(-1, part.U.shape[0], part.V.shape[0]) * (weight * part.scaling / self.scaling)
            total += torch.einsum("ouv,ui,vj->oij", blocks, u, v)
        self.B.copy_(total.flatten(1))

    def delta_weight(self) -> torch.Tensor:
        """s B (U (x) V), (out, in): built block by block from B's columns, never through U (x) V."""
        (u_rank, u_dim), (v_rank, v_dim) = self.U.shape, self.V.shape
        blocks = self.B.detach().view(-1, u_rank, v_rank)
        delta = torch.einsum("ouv,ui,vj->oij", blocks, self.U.detach(), self.V.detach())
        return delta.reshape(self.out_features, u_dim * v_dim) * self.scaling

    def merge_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return weight + self.delta_weight().to(weight), bias

    def unmerge_from(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return weight - self.delta_weight().to(weight), bias


def _common_rows(rows: torch.Tensor, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Write rows that all `parts` (n_i, dim) are made of into `rows` (n, dim); C_i (n_i, n), each part C_i rows."""
    if sum(part.shape[0] for part in parts) > rows.shape[0]:  # more than the width: its unit vectors
        rows.copy_(torch.eye(rows.shape[1]))
        return parts
    rows.copy_(torch.cat(parts))
    return list(torch.eye(rows.shape[0], device=rows.device, dtype=rows.dtype).split([len(part) for part in parts]))


@torch.no_grad()
def higher_order_svd(
    weight: torch.Tensor, u_shape: torch.Size, v_shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading left singular vectors of the two unfoldings of W reshaped (out, u_dim, v_dim).

    Args:
        weight: (out, in). u_shape: (u_rank, u_dim). v_shape: (v_rank, v_dim).

    Returns:
        U (u_rank, u_dim), V (v_rank, v_dim) in float64 with orthonormal rows; the largest entry of each row is
        positive, so that the result does not depend on the sign that the eigensolver chose.
    """
    tensor = weight.detach().float().view(weight.shape[0], u_shape[1], v_shape[1])
    factors = []
    for axis, rank in ((1, u_shape[0]), (2, v_shape[0])):
        unfolded = tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)
        gram = (unfolded @ unfolded.t()).double()
        rows = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank].t()
        largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
        factors.append(rows * largest.sign())
    return factors[0], factors[1]


class KroneckerModel(AdapterModel, config=KroneckerConfig, adapter=KroneckerAdapter):
    """A model with PT3 at W_down; made by `get_peft_model(model, KroneckerConfig(...))`."""
