"""How PT1 cuts the heads of a W_O into groups, and the rank of each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bem_peft import field_checks as check
from bem_peft.tuners.base.adapter import SiteShape


class Sizes(Protocol):
    """The fields of a config that are read here; see `HeadGroupGatingConfig`."""

    num_groups: int
    strict_groups: bool
    num_heads: int | None
    rank_per_group: int | list[int]
    total_rank: int | None


@dataclass(frozen=True)
class HeadGroups:
    """`heads` side by side in the site's input, in len(ranks) groups of equal width."""

    heads: int
    ranks: list[int]

    @property
    def slots(self) -> list[int]:
        """Where A is padded to the widest group: row i of A stands at slots[i]."""
        widest = max(self.ranks)
        return [g * widest + i for g, rank in enumerate(self.ranks) for i in range(rank)]


def resolve_head_groups(config: Sizes, site: SiteShape) -> HeadGroups:
    """The groups at one site.

    Raises:
        ValueError: the heads do not divide the site's input, or the ranks do not fit the number of groups.
    """
    heads = config.num_heads or site.num_heads
    if heads is None:  # neither given nor known: each group counts as one head
        heads = resolve_groups(site.in_features, config.num_groups, config.strict_groups, site.name)
    if site.in_features % heads:
        raise check.field_error("num_heads", heads, f"must divide the input width {site.in_features} of {site.name}")
    groups = resolve_groups(heads, config.num_groups, config.strict_groups, site.name)
    return HeadGroups(heads, _ranks(config, groups, site.name))


def resolve_groups(heads: int, num_groups: int, strict: bool, site: str) -> int:
    """The number of groups: `num_groups` where it divides `heads`, else the nearest divisor (the smaller of two)."""
    if heads % num_groups == 0:
        return num_groups
    divisors = [d for d in range(1, heads + 1) if heads % d == 0]
    if strict:
        raise check.field_error(
            "num_groups", num_groups, f"must divide the {heads} heads of {site}", f"choose one of {divisors}"
        )
    return min(divisors, key=lambda d: (abs(d - num_groups), d))


def _ranks(config: Sizes, groups: int, site: str) -> list[int]:
    if config.total_rank is not None:
        if config.total_rank < groups:
            raise check.field_error(
                "total_rank", config.total_rank, f"must be at least 1 for each of the {groups} groups"
            )
        even, rest = divmod(config.total_rank, groups)
        return [even + (g < rest) for g in range(groups)]
    ranks = config.rank_per_group
    if isinstance(ranks, int):
        return [ranks] * groups
    if len(ranks) != groups:
        raise check.field_error(
            "rank_per_group", ranks, f"must have one rank for each of the {groups} groups of {site}"
        )
    return list(ranks)
