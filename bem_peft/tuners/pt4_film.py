r"""PT4, residual FiLM at W_O and W_down:  y' = y (1 + gamma) + beta rho(y).

c = tanh(W x / rho(y) + b), W (units, in): the controller, |c| <= 1. gamma = G c, beta = T c with rows of G, T
(out, units) bounded as a whole (`kernels.film`): |gamma| <= `clamp_range`, |beta| <= `max_beta` always. G, T are zero
at the start. rho(y) is the token's root mean square of y; `controller_unit="absolute"` and `beta_unit="absolute"` have
1 in its place. Modes: "channel", G and T have a row a channel; "spatial", one row for all of them; "static", no
controller (c = 1), which merges.

A step whose output or gradient is not finite, or whose output exceeds `explosion_threshold`, is not taken (`brake`).

Source: Perez et al., FiLM, 2018, arXiv:1709.07871 (eq. 2); theirs is unbounded and conditioned on another input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from bem_peft import field_checks as check
from bem_peft.kernels.film import bounded_rows, controller, film_update, token_norm
from bem_peft.tuners.base.adapter import Adapter, SiteShape
from bem_peft.tuners.base.adapter_config import AdapterConfig
from bem_peft.tuners.base.expert_products import each_rows
from bem_peft.tuners.base.forms import transposed
from bem_peft.tuners.base.model import AdapterModel
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.steps.brake import Braked


@dataclass
class ResidualFiLMConfig(AdapterConfig):
    """Config of PT4, y' = y (1 + gamma) + beta at W_O and W_down."""

    gamma_dim: int = field(default=8, metadata={"help": "Controller units that gamma reads."})
    beta_dim: int = field(default=8, metadata={"help": "Controller units that beta reads, the same ones."})
    mode: str = field(
        default="channel", metadata={"help": "'channel': a value a channel; 'spatial': a value a token; 'static'."}
    )
    clamp_range: float = field(default=0.1, metadata={"help": "Bound of |gamma|, in [0, 1)."})
    max_beta: float = field(default=1.0, metadata={"help": "Bound of |beta|, >= 0; 0: no beta."})
    beta_unit: str = field(default="rms", metadata={"help": "'rms': beta counts in the token's RMS of y; 'absolute'."})
    controller_unit: str | None = field(
        default=None,
        metadata={
            "help": "What the controller reads: 'rms', x over the token's RMS of y; 'absolute', x as it is. None: "
            "'rms', and 'absolute' for an adapter that was saved before there was this field."
        },
    )
    minimal_overhead: bool = field(
        default=False, metadata={"help": "True: an adapter of 1 % of the base's parameters or more is an error."}
    )
    emergency_stabilization: bool = field(
        default=True, metadata={"help": "Go back to the last good values after a non-finite or exploding step."}
    )
    explosion_threshold: float = field(
        default=1e6, metadata={"help": "Largest |output| of a site that still counts as stable, > 0."}
    )
    scaling: float = field(
        default=2.0,
        metadata={
            "help": "Not to be set: `clamp_range` and `max_beta` are the size of the update. Inside these bounds it is "
            "what the weights are multiplied by; files of adapters made with another value load."
        },
    )

    method: ClassVar[str] = "bem_film"
    aliases: ClassVar[tuple[str, ...]] = ("pt4", "residual_film")
    neighbours: ClassVar[Mapping[str, str]] = {
        "r": "`gamma_dim` and `beta_dim`, units of the controller",
        "rank": "`gamma_dim` and `beta_dim`, units of the controller",
        "lora_alpha": "`clamp_range` and `max_beta`, which bound the update",
        "alpha": "`clamp_range` and `max_beta`, which bound the update",
        "lora_dropout": "no option: this method has no dropout",
        "dropout": "no option: this method has no dropout",
        "bias": "no option: biases stay frozen",
    }
    rank_fields: ClassVar[tuple[str, ...]] = ("gamma_dim", "beta_dim")

    def __post_init__(self) -> None:
        check.check_int(self, "gamma_dim")
        check.check_int(self, "beta_dim")
        check.check_choice(self, "mode", ("channel", "spatial", "static"))
        check.check_number(self, "clamp_range", 0.0, 1.0)
        if self.clamp_range == 1.0:
            raise check.field_error(
                "clamp_range", self.clamp_range, "must be below 1, so that 1 + gamma keeps its sign"
            )
        check.check_number(self, "max_beta", 0.0)
        if self.clamp_range == 0.0 and self.max_beta == 0.0:
            raise check.field_error("max_beta", self.max_beta, "must be above 0 where `clamp_range` is 0")
        check.check_choice(self, "beta_unit", ("rms", "absolute"))
        if self.controller_unit is None and self.mode != "static":
            self.controller_unit = "absolute" if self.inference_mode else "rms"
        if self.controller_unit is not None:
            check.check_choice(self, "controller_unit", ("rms", "absolute"))
        check.check_bool(self, "minimal_overhead")
        check.check_bool(self, "emergency_stabilization")
        check.check_number(self, "explosion_threshold", 0.0, exclusive=True)
        super().__post_init__()

    @property
    def size_fields(self) -> tuple[str, ...]:
        """What a budget search may change."""
        return tuple(name for name in self.rank_fields if name not in self.inert_fields())

    def inert_fields(self) -> dict[str, str]:
        inert = {"scaling": "is no factor of a bounded update, whose size is `clamp_range` and `max_beta`"}
        if self.clamp_range == 0.0:
            inert["gamma_dim"] = "there is no gamma where `clamp_range` is 0"
        if self.max_beta == 0.0:
            inert["beta_dim"] = inert["beta_unit"] = "there is no beta where `max_beta` is 0"
        if self.mode == "static":
            inert["gamma_dim"] = inert["beta_dim"] = "mode='static' has no controller whose units could be read"
            inert["controller_unit"] = "mode='static' has no controller"
        if not self.emergency_stabilization:
            inert["explosion_threshold"] = "nothing is looked at where `emergency_stabilization` is off"
        return inert

    @property
    def limits_size(self) -> bool:
        return self.minimal_overhead

    def check_size(self, planned: int, base: int) -> None:
        if planned >= 0.01 * base:
            raise ValueError(
                f"`minimal_overhead` = True: the adapter would have {planned:,} parameters, {planned / base:.2%} of "
                f"the base's {base:,}, and must stay below 1 %; lower `gamma_dim` and `beta_dim`, or name fewer sites."
            )


class ResidualFiLMAdapter(Braked, Adapter):
    """y' = y (1 + gamma(x)) + beta(x) rho(y)."""

    variant = "PT4"
    reads_output = True
    lr_groups = {
        "controller_weight": "controller",
        "controller_bias": "controller",
        "gamma": "gamma",
        "beta": "beta",
    }

    factors = ("gamma", "beta")
    kernel = "film"
    gamma: nn.Parameter
    beta: nn.Parameter
    controller_weight: nn.Parameter
    controller_bias: nn.Parameter

    def __init__(self, config: ResidualFiLMConfig, site: SiteShape, call: CallState) -> None:
        super().__init__(config, site, call)
        self.set_brake(config.emergency_stabilization, config.explosion_threshold)
        self.mode, self.clamp_range, self.max_beta = config.mode, config.clamp_range, config.max_beta
        self.is_rms, self.is_relative = config.beta_unit == "rms", config.controller_unit == "rms"
        self.moves_zero = not self.is_rms and config.max_beta > 0
        self.is_static = self.is_summable = config.mode == "static"
        self.has_operator = config.mode == "channel"
        self.is_mergeable = self.is_static and (not self.is_rms or config.max_beta == 0.0)
        self.merge_refusal = "its factors depend on the token, so no weight equals it; mode='static' merges"
        if self.is_static:
            self.merge_refusal = "beta counts in the token's RMS; set beta_unit='absolute' or max_beta=0"
        self.gamma_dim = 1 if self.is_static else config.gamma_dim
        self.beta_dim = 1 if self.is_static else config.beta_dim
        rows = 1 if config.mode == "spatial" else site.out_features
        units = max(self.gamma_dim * (self.clamp_range > 0), self.beta_dim * (self.max_beta > 0))
        if not self.is_static:
            self.controller_weight = nn.Parameter(torch.empty(units, site.in_features))
            self.controller_bias = nn.Parameter(torch.empty(units))
        if self.clamp_range > 0:
            self.gamma = nn.Parameter(torch.empty(rows, self.gamma_dim))
        if self.max_beta > 0:
            self.beta = nn.Parameter(torch.empty(rows, self.beta_dim))

    def reset_parameters(self, init_weights: bool, site: SiteShape) -> None:
        if not self.is_static:
            nn.init.normal_(self.controller_weight, std=self.in_features**-0.5)
            nn.init.zeros_(self.controller_bias)
        for name, parameter in self.named_parameters():
            if name in ("gamma", "beta"):
                if init_weights:
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter)
        self.keep_as_good()

    def derive(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        derived = []
        if not self.is_static:
            bias = self.controller_bias.to(dtype)
            derived += [self.controller_weight.to(dtype).mT, bias if bias.dim() == 1 else bias.unsqueeze(-2)]
        if self.clamp_range > 0:
            derived.append(transposed(bounded_rows(self.gamma, self.scaling, self.clamp_range, dtype), dtype))
        if self.max_beta > 0:
            derived.append(transposed(bounded_rows(self.beta, self.scaling, self.max_beta, dtype), dtype))
        return tuple(derived)

    def transform(self, x: torch.Tensor, y: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        u, bias = self.projection(x, *weights[:2])
        gamma_t = weights[-2 if self.max_beta > 0 else -1] if self.clamp_range > 0 else None
        beta_t = weights[-1] if self.max_beta > 0 else None
        return film_update(y, u, bias, gamma_t, beta_t, self.is_relative, self.is_rms)

    def projection(self, x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """W x (N, units) and b, or W x + b and None; None without a controller."""
        if self.is_static:
            return None, None
        if self.is_relative:
            return torch.mm(x, weights[0]), each_rows(weights[1])
        return torch.addmm(weights[1], x, weights[0]), None

    def modulation(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gamma and beta for x (N, in) and y (N, out), each (N, out), (N, 1) or (1, out); beta in `beta_unit`s."""
        weights = self.derive(x.dtype)
        u, bias = self.projection(x, *weights[:2])
        c = x.new_ones(1, 1) if u is None else controller(y, u, bias, token_norm(y) if self.is_relative else None)
        zero = x.new_zeros(1, 1)
        gamma = c[:, : self.gamma_dim] @ weights[-2 if self.max_beta > 0 else -1] if self.clamp_range > 0 else zero
        return gamma, c[:, : self.beta_dim] @ weights[-1] if self.max_beta > 0 else zero

    # what merges

    def static_vectors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """1 + gamma and beta of a static adapter, each (out,)."""
        none = next(self.parameters()).detach().new_zeros
        gamma, beta = self.modulation(none(1, self.in_features), none(1, self.out_features))
        return 1.0 + gamma.expand(1, self.out_features)[0], beta.expand(1, self.out_features)[0]

    def merge_obstacle(self, has_bias: bool) -> str | None:
        if self.is_mergeable and self.max_beta > 0 and not has_bias:
            return "the site has no bias to take beta; set max_beta=0"
        return super().merge_obstacle(has_bias)

    def merge_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.refuse_merge(bias is not None)
        factor, beta = (part.detach() for part in self.static_vectors())
        merged = (weight * factor.unsqueeze(1)).to(weight.dtype)
        return merged, None if bias is None else (bias * factor + beta).to(bias.dtype)

    def unmerge_from(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.refuse_merge(bias is not None)
        factor, beta = (part.detach() for part in self.static_vectors())
        plain = (weight / factor.unsqueeze(1)).to(weight.dtype)
        return plain, None if bias is None else ((bias - beta) / factor).to(bias.dtype)

    # sums, of static ones: gamma and beta add

    @staticmethod
    def weighted_fields(configs: Sequence[Any], weights: Sequence[float]) -> dict[str, Any]:
        units = {config.beta_unit for config in configs if config.max_beta > 0}
        clamp_range, max_beta = (
            sum(abs(weight) * getattr(config, name) for config, weight in zip(configs, weights, strict=True))
            for name in ("clamp_range", "max_beta")
        )
        if len(units) > 1 or clamp_range >= 1.0 or not clamp_range + max_beta:
            why = (
                f"beta counts in {sorted(units)} (`beta_unit`)"
                if len(units) > 1
                else f"|gamma| would be bounded by {clamp_range:g} (`clamp_range`), which must lie in (0, 1)"
            )
            raise ValueError(f"static PT4 adapters cannot be added up: {why}; choose other `weights` or adapters.")
        beta_unit = {"beta_unit": units.pop()} if units else {}
        return {"mode": "static", "clamp_range": clamp_range, "max_beta": max_beta, **beta_unit}

    @staticmethod
    def weighted_sizes(parts: Sequence[tuple[Any, float]]) -> dict[str, Any]:
        return {}

    def fill_weighted(self, parts: Sequence[tuple[Any, float]]) -> None:
        vectors = [(part.static_vectors(), weight) for part, weight in parts]
        for name, bound, index in (("gamma", self.clamp_range, 0), ("beta", self.max_beta, 1)):
            if bound > 0:
                share = sum(weight * (own[index] - (1.0 - index)) for own, weight in vectors) / bound
                unbounded = share / (1.0 - share.abs()).clamp_min(torch.finfo(torch.float32).eps)
                getattr(self, name).copy_((unbounded / self.scaling).unsqueeze(1))
        self.keep_as_good()


class ResidualFiLMModel(AdapterModel, config=ResidualFiLMConfig, adapter=ResidualFiLMAdapter):
    """A model with PT4 at W_O and W_down; made by `get_peft_model(model, ResidualFiLMConfig(...))`."""
