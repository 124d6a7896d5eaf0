"""The tuner types. Importing this package registers them with PEFT."""

from bem_peft.tuners.composite import CompositeConfig, CompositeModel
from bem_peft.tuners.pt1_head_gating import HeadGroupGatingConfig, HeadGroupGatingModel
from bem_peft.tuners.pt2_rank_mask import DynamicRankMaskConfig, DynamicRankMaskModel
from bem_peft.tuners.pt3_kronecker import KroneckerConfig, KroneckerModel
from bem_peft.tuners.pt4_film import ResidualFiLMConfig, ResidualFiLMModel

__all__ = [
    "CompositeConfig",
    "CompositeModel",
    "DynamicRankMaskConfig",
    "DynamicRankMaskModel",
    "HeadGroupGatingConfig",
    "HeadGroupGatingModel",
    "KroneckerConfig",
    "KroneckerModel",
    "ResidualFiLMConfig",
    "ResidualFiLMModel",
]
