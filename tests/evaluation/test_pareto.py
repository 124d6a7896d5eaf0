"""Pareto frontiers against brute force and moocore, ties included."""

from __future__ import annotations

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bem_peft.evaluation.pareto import Objective, ParetoAnalyzer, hypervolume, non_dominated

TABLES = arrays(np.int8, st.tuples(st.integers(1, 25), st.integers(1, 4)), elements=st.integers(0, 4))


@given(TABLES)
@settings(max_examples=200, deadline=None)
def test_frontier_is_that_of_brute_force(table: np.ndarray) -> None:
    points = table.astype(float)
    expected = [not any((q <= p).all() and (q < p).any() for q in points) for p in points]
    assert non_dominated(points).tolist() == expected
    assert non_dominated(points, block=3).tolist() == expected


@pytest.mark.parametrize("objectives", [2, 3, 5])
def test_frontier_is_moocores(objectives: int) -> None:
    points = np.random.default_rng(objectives).integers(0, 30, (400, objectives)).astype(float)
    np.testing.assert_array_equal(non_dominated(points), moocore.is_nondominated(points, keep_weakly=True))


@given(TABLES.filter(lambda t: t.shape[1] > 1))
@settings(max_examples=80, deadline=None)
def test_hypervolume_is_moocores(table: np.ndarray) -> None:
    points = table.astype(float)
    reference = np.full(points.shape[1], 3.5)
    assert hypervolume(points, reference) == pytest.approx(moocore.hypervolume(points, ref=reference), abs=1e-9)


def test_a_hundred_thousand_points_are_no_matter() -> None:
    """On a sphere's surface nothing is dominated: the largest frontier there is."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(100_000, 2))
    np.testing.assert_array_equal(non_dominated(points), moocore.is_nondominated(points, keep_weakly=True))
    angle = np.linspace(0.0, np.pi / 2, 5_000)
    circle = np.stack((1 - np.sin(angle), 1 - np.cos(angle)), axis=1)
    assert non_dominated(circle).all()


def analyzer() -> ParetoAnalyzer:
    found = ParetoAnalyzer(
        [Objective("chrF", True), Objective("latency", False, "ms"), Objective("memory", False, "MB")]
    )
    found.add_result("lora", {"chrF": 68.8, "latency": 10.0, "memory": 5.0})
    found.add_result("better", {"chrF": 71.0, "latency": 10.0, "memory": 5.0})
    found.add_result("cheap", {"chrF": 60.0, "latency": 8.0, "memory": 5.0})
    found.add_result("twin", {"chrF": 60.0, "latency": 8.0, "memory": 5.0})
    return found


def test_directions_count_and_equal_points_stay() -> None:
    points = {point.name: point for point in analyzer().analyze()}
    assert {name: point.is_on_frontier for name, point in points.items()} == {
        "lora": False, "better": True, "cheap": True, "twin": True,
    }  # fmt: skip
    assert points["lora"].dominated_by == ("better",)
    assert points["better"].frontiers == (("chrF", "latency"), ("chrF", "memory"))
    assert points["better"].probability is None
    volume = analyzer().hypervolume({"chrF": 50.0, "latency": 12.0, "memory": 6.0})
    assert volume == pytest.approx(21 * 2 + 10 * 2)


def test_probability_is_the_share_of_draws_on_the_frontier() -> None:
    found = ParetoAnalyzer([Objective("accuracy", True), Objective("params", False)])
    found.add_result("a", {"accuracy": 0.5, "params": 10}, {"accuracy": [0.5, 0.6, 0.4, 0.5]})
    found.add_result("b", {"accuracy": 0.5, "params": 11}, {"accuracy": [0.6, 0.5, 0.5, 0.5]})
    points = found.analyze()
    assert [point.probability for point in points] == [1.0, 0.5]
    found.add_result("c", {"accuracy": 0.1, "params": 1})
    with pytest.raises(ValueError, match="all must have the same draws"):
        found.analyze()


def test_wrong_results_are_refused() -> None:
    found = analyzer()
    for name, values, text in (
        ("lora", {"chrF": 1.0, "latency": 1.0, "memory": 1.0}, "added before"),
        ("x", {"chrF": 1.0}, "has values of"),
        ("x", {"chrF": float("nan"), "latency": 1.0, "memory": 1.0}, "must be finite"),
    ):
        with pytest.raises(ValueError, match=text):
            found.add_result(name, values)
    with pytest.raises(ValueError, match="two or more"):
        ParetoAnalyzer([Objective("a", True)])
    with pytest.raises(ValueError, match="no system"):
        ParetoAnalyzer([Objective("a", True), Objective("b", True)]).analyze()
    with pytest.raises(ValueError, match="must be of one length"):
        found.add_result("y", {"chrF": 1.0, "latency": 1.0, "memory": 1.0}, {"chrF": [1.0], "memory": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        non_dominated(np.zeros(3))
    with pytest.raises(ValueError, match="`costs`"):
        hypervolume(np.zeros((2, 2)), [1.0])
