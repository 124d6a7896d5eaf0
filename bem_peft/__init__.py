"""PEFT tuner types for the attention output projection (W_O) and the MLP down projection (W_down).

`import bem_peft` registers the methods with PEFT; it initialises no device and changes nothing else.
"""

from typing import TYPE_CHECKING

from bem_peft._version import __version__
from bem_peft.budget import match as _match
from bem_peft.budget.check import BudgetConstraints, BudgetValidator
from bem_peft.budget.enforce import BudgetCallback, BudgetWarning, check_budget, write_report
from bem_peft.budget.flops import FlopCount, count_flops
from bem_peft.budget.latency import LatencyComparison, compare_latency
from bem_peft.budget.match import BudgetMatch, match_budget
from bem_peft.budget.memory import MemoryCount, count_memory
from bem_peft.budget.parameters import ParameterCount, count_parameters
from bem_peft.budget.report import BudgetError, BudgetLine, BudgetReport
from bem_peft.dial import choose_sizes, rate_of
from bem_peft.hub import push_run, push_to_hub
from bem_peft.kept import kept_weights
from bem_peft.kernels.backend import use_kernels
from bem_peft.sites.find import Site, SiteError, SiteTable, find_sites
from bem_peft.training.checkpoints import last_complete_checkpoint
from bem_peft.training.parameter_groups import LearningRates, parameter_groups
from bem_peft.tuners.adapter_spec import parse_adapter
from bem_peft.tuners.base import registry as _registry
from bem_peft.tuners.calls.call_state import retrieval_quality, retrieval_scores
from bem_peft.tuners.calls.loop import AdapterCallback, penalty_values, set_loss_scale
from bem_peft.tuners.composite import CompositeConfig, CompositeModel
from bem_peft.tuners.governance import SpectralGovernance, SpectralNorms
from bem_peft.tuners.lora_export import LoraExportReport, export_lora
from bem_peft.tuners.probe import DeadSiteError, probe
from bem_peft.tuners.pt1_head_gating import HeadGroupGatingConfig, HeadGroupGatingModel
from bem_peft.tuners.pt2_rank_mask import DynamicRankMaskConfig, DynamicRankMaskModel
from bem_peft.tuners.pt3_kronecker import KroneckerConfig, KroneckerModel
from bem_peft.tuners.pt4_film import ResidualFiLMConfig, ResidualFiLMModel
from bem_peft.tuners.steps.brake import emergency_stabilize

_match.parse_anchor, _match.suggest_rate, _registry.choose_sizes = parse_adapter, rate_of, choose_sizes

if TYPE_CHECKING:
    from bem_peft.evaluation.evaluator import ComprehensiveEvaluator
    from bem_peft.evaluation.intervals import Comparison, compare_means
    from bem_peft.evaluation.paired import PairedScores
    from bem_peft.evaluation.pareto import Objective, ParetoAnalyzer
    from bem_peft.evaluation.profiler import PerformanceProfiler, Profile, Workload
    from bem_peft.evaluation.scores import Scores
    from bem_peft.evaluation.slices import slice_b_analysis
    from bem_peft.evaluation.validator import StatisticalValidator
    from bem_peft.training.trainer import PTTrainer, PTTrainingConfig

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
    "Comparison",
    "CompositeConfig",
    "CompositeModel",
    "ComprehensiveEvaluator",
    "DeadSiteError",
    "DynamicRankMaskConfig",
    "DynamicRankMaskModel",
    "FlopCount",
    "HeadGroupGatingConfig",
    "HeadGroupGatingModel",
    "KroneckerConfig",
    "KroneckerModel",
    "LatencyComparison",
    "LearningRates",
    "LoraExportReport",
    "MemoryCount",
    "Objective",
    "PTTrainer",
    "PTTrainingConfig",
    "PairedScores",
    "ParameterCount",
    "ParetoAnalyzer",
    "PerformanceProfiler",
    "Profile",
    "ResidualFiLMConfig",
    "ResidualFiLMModel",
    "Scores",
    "Site",
    "SiteError",
    "SiteTable",
    "SpectralGovernance",
    "SpectralNorms",
    "StatisticalValidator",
    "Workload",
    "__version__",
    "check_budget",
    "compare_latency",
    "compare_means",
    "count_flops",
    "count_memory",
    "count_parameters",
    "emergency_stabilize",
    "export_lora",
    "find_sites",
    "kept_weights",
    "last_complete_checkpoint",
    "match_budget",
    "parameter_groups",
    "penalty_values",
    "probe",
    "push_run",
    "push_to_hub",
    "retrieval_quality",
    "retrieval_scores",
    "set_loss_scale",
    "slice_b_analysis",
    "use_kernels",
    "write_report",
]


def __getattr__(name: str) -> object:
    """What loads transformers' Trainer or scipy, when it is asked for."""
    from importlib import import_module

    rooms = {
        "evaluation.evaluator": ("ComprehensiveEvaluator",),
        "evaluation.intervals": ("Comparison", "compare_means"),
        "evaluation.paired": ("PairedScores",),
        "evaluation.pareto": ("Objective", "ParetoAnalyzer"),
        "evaluation.profiler": ("PerformanceProfiler", "Profile", "Workload"),
        "evaluation.scores": ("Scores",),
        "evaluation.slices": ("slice_b_analysis",),
        "evaluation.validator": ("StatisticalValidator",),
        "training.trainer": ("PTTrainer", "PTTrainingConfig"),
    }
    for room, names in rooms.items():
        if name in names:
            return getattr(import_module(f"bem_peft.{room}"), name)
    raise AttributeError(f"module 'bem_peft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
