"""What more data would give, against simulation; the shares of variance against the truth they were drawn from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bem_peft.evaluation.intervals import compare_means
from bem_peft.evaluation.outlook import outlooks
from bem_peft.evaluation.planning import Components, required_items


def study(seeds: int, items: int, effect: float = 0.0, spread: float = 0.02, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    parts = rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 0.3, (1, items)) + rng.normal(0, 0.4, (seeds, items))
    return effect + parts


def test_components_are_those_that_the_data_were_drawn_from() -> None:
    found = [Components.of(study(4, 300, spread=0.1, seed=s)) for s in range(200)]
    assert np.mean([c.item for c in found]) == pytest.approx(0.09, rel=0.03)
    assert np.mean([c.rest for c in found]) == pytest.approx(0.16, rel=0.03)
    assert np.mean([c.seed for c in found]) == pytest.approx(0.01, rel=0.2)
    shares = Components(0.09, 0.01, 0.16, 4, 300, 1.0).shares()
    whole = 0.09 / 300 + 0.01 / 4 + 0.16 / 1_200
    assert shares == pytest.approx(
        {"item": 0.09 / 300 / whole, "seed": 0.01 / 4 / whole, "seed x item": 0.16 / 1_200 / whole}
    )
    assert Components(0.0, 0.0, 0.0, 2, 3, 1.0).shares() == {"seed": 0.0, "item": 0.0, "seed x item": 0.0}


@pytest.mark.parametrize(("seeds", "items"), [(5, 200), (8, 200), (5, 1_200)])
def test_a_plan_has_the_width_that_such_studies_have(seeds: int, items: int) -> None:
    parts = Components(0.09, 0.0004, 0.16, 5, 200, 199 / 200)
    plan = parts.plan(seeds, items)
    widths = [compare_means(study(seeds, items, seed=s)) for s in range(200)]
    assert plan.half_width == pytest.approx(np.median([(c.high - c.low) / 2 for c in widths]), rel=0.1)
    assert plan.power is None


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("size", [1, 4])
def test_the_plan_of_what_there_is_has_the_detectable_difference_of_its_comparison(seeds: int, size: int) -> None:
    """Also where a variance comes out below 0, as the seeds' does in half of these."""
    below = 0
    for seed in range(40):
        difference = study(seeds, 60, spread=0.0, seed=seed)
        clusters = None if size == 1 else np.repeat(np.arange(60 // size), size)
        comparison = compare_means(difference, clusters)
        parts = Components.of(difference, clusters)
        pair: Any = SimpleNamespace(difference=difference, cluster_index=clusters)
        (found,) = outlooks("a", {"nll": pair}, {}, 0.95)
        assert found.now.detectable == pytest.approx(comparison.mde, rel=1e-9)
        assert found.now.half_width <= (comparison.high - comparison.low) / 2 + 1e-12  # which skewness widens
        assert min(found.shares.values()) >= 0.0
        assert sum(found.shares.values()) == pytest.approx(1.0)
        below += parts.seed < 0.0
    assert 5 < below < 40


def test_the_power_is_how_often_an_equal_system_is_shown_to_be_no_worse() -> None:
    plan = Components(0.09, 0.0004, 0.16, 5, 300, 1.0).plan(5, 300, margin=0.07)
    shown = np.mean([compare_means(study(5, 300, seed=s)).low > -0.07 for s in range(500)])
    assert plan.power is not None
    assert plan.power == pytest.approx(shown, abs=0.08)
    assert 0.3 < plan.power < 0.95


def test_required_items_find_the_effect_and_fewer_do_not() -> None:
    difference = study(5, 300, spread=0.005, seed=4)
    effect = compare_means(difference).mde * 0.8
    items = required_items(difference, effect)
    assert items is not None
    assert 300 < items < 3_000
    assert compare_means(study(5, items, spread=0.005, seed=5)).mde == pytest.approx(effect, rel=0.35)
    assert required_items(study(3, 100, spread=0.5), 0.001) is None  # the seeds hide it
    with pytest.raises(ValueError, match="one seed"):
        required_items(difference[:1], 0.1)
    with pytest.raises(ValueError, match="`effect` = 0"):
        required_items(difference, 0.0)


def test_clusters_need_more_items() -> None:
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(60), 10)
    shared = rng.normal(0, 0.5, 60)[clusters] + study(4, 600)
    alone, together = required_items(shared, 0.05), required_items(shared, 0.05, clusters)
    assert alone is not None
    assert together is not None
    assert together > 3 * alone


def test_more_data_are_never_forecast_to_give_less() -> None:
    """With more items the seeds alone are left in the variance, and their few degrees of freedom once widened it."""
    narrower = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        difference = rng.normal(size=(3, 12)) + 0.3 * rng.normal(size=(3, 1)) + rng.normal(size=(1, 12))
        pair: Any = SimpleNamespace(difference=difference, cluster_index=None)
        (found,) = outlooks("a", {"nll": pair}, {"nll": 0.5}, 0.95)
        for plan in (found.more_items, found.more_seeds):
            assert plan.half_width <= found.now.half_width
            assert plan.detectable <= found.now.detectable
            assert (plan.power or 0.0) >= (found.now.power or 0.0)
            narrower += plan.half_width < found.now.half_width
        assert found.more_items.items == 512
    assert narrower > 40
