"""PEFT tuner types for the attention output projection (W_O) and the MLP down projection (W_down).

`import bem_peft` registers the methods with PEFT; it initialises no device and changes nothing else.
"""

from bem_peft._version import __version__
from bem_peft.tuners import (
    CompositeConfig,
    CompositeModel,
    DynamicRankMaskConfig,
    DynamicRankMaskModel,
    HeadGroupGatingConfig,
    HeadGroupGatingModel,
    KroneckerConfig,
    KroneckerModel,
    ResidualFiLMConfig,
    ResidualFiLMModel,
)
from bem_peft.tuners.call_state import retrieval_quality, retrieval_scores
from bem_peft.tuners.governance import SpectralGovernance, SpectralNorms
from bem_peft.tuners.lora_export import LoraExportReport, export_lora
from bem_peft.tuners.probe import DeadSiteError, probe
from bem_peft.tuners.pt4_film import emergency_stabilize
from bem_peft.tuners.sites import Site, SiteError, SiteTable, find_sites

__all__ = [
    "CompositeConfig",
    "CompositeModel",
    "DeadSiteError",
    "DynamicRankMaskConfig",
    "DynamicRankMaskModel",
    "HeadGroupGatingConfig",
    "HeadGroupGatingModel",
    "KroneckerConfig",
    "KroneckerModel",
    "LoraExportReport",
    "ResidualFiLMConfig",
    "ResidualFiLMModel",
    "Site",
    "SiteError",
    "SiteTable",
    "SpectralGovernance",
    "SpectralNorms",
    "__version__",
    "emergency_stabilize",
    "export_lora",
    "find_sites",
    "probe",
    "retrieval_quality",
    "retrieval_scores",
]
