"""PEFT tuner types for the attention output projection (W_O) and the MLP down projection (W_down).

`import bem_peft` registers the methods with PEFT; it initialises no device and changes nothing else.
"""

from bem_peft._version import __version__
from bem_peft.budget.check import BudgetConstraints, BudgetError, BudgetLine, BudgetReport, BudgetValidator
from bem_peft.budget.enforce import BudgetCallback, BudgetWarning, check_budget, write_report
from bem_peft.budget.flops import FlopCount, count_flops
from bem_peft.budget.latency import LatencyComparison, compare_latency
from bem_peft.budget.match import BudgetMatch, match_budget
from bem_peft.budget.memory import MemoryCount, count_memory
from bem_peft.budget.parameters import ParameterCount, count_parameters
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
from bem_peft.tuners.loop import AdapterCallback, penalty_values, set_loss_scale
from bem_peft.tuners.lora_export import LoraExportReport, export_lora
from bem_peft.tuners.probe import DeadSiteError, probe
from bem_peft.tuners.pt4_film import emergency_stabilize
from bem_peft.tuners.sites import Site, SiteError, SiteTable, find_sites

__all__ = [
    "AdapterCallback",
    "BudgetCallback",
    "BudgetConstraints",
    "BudgetError",
    "BudgetLine",
    "BudgetMatch",
    "BudgetReport",
    "BudgetValidator",
    "BudgetWarning",
    "CompositeConfig",
    "CompositeModel",
    "DeadSiteError",
    "DynamicRankMaskConfig",
    "DynamicRankMaskModel",
    "FlopCount",
    "HeadGroupGatingConfig",
    "HeadGroupGatingModel",
    "KroneckerConfig",
    "KroneckerModel",
    "LatencyComparison",
    "LoraExportReport",
    "MemoryCount",
    "ParameterCount",
    "ResidualFiLMConfig",
    "ResidualFiLMModel",
    "Site",
    "SiteError",
    "SiteTable",
    "SpectralGovernance",
    "SpectralNorms",
    "__version__",
    "check_budget",
    "compare_latency",
    "count_flops",
    "count_memory",
    "count_parameters",
    "emergency_stabilize",
    "export_lora",
    "find_sites",
    "match_budget",
    "penalty_values",
    "probe",
    "retrieval_quality",
    "retrieval_scores",
    "set_loss_scale",
    "write_report",
]
