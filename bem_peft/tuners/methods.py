"""The methods of this package, in the order in which a composite applies them; a new one is added here."""

from __future__ import annotations

from bem_peft.tuners.base.model import AdapterModel
from bem_peft.tuners.pt1_head_gating import HeadGroupGatingModel
from bem_peft.tuners.pt2_rank_mask import DynamicRankMaskModel
from bem_peft.tuners.pt3_kronecker import KroneckerModel
from bem_peft.tuners.pt4_film import ResidualFiLMModel

METHODS: tuple[type[AdapterModel], ...] = (
    HeadGroupGatingModel,
    DynamicRankMaskModel,
    KroneckerModel,
    ResidualFiLMModel,
)
