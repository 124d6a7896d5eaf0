"""Scores: aligned by id, refused where they do not fit, the same after a round trip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bem_peft.evaluation.multiplicity import adjusted_p_values
from bem_peft.evaluation.paired import PairedScores
from bem_peft.evaluation.scores import Scores
from bem_peft.evaluation.slices import check_disjoint, compare_slices, promoting, slice_b_analysis


def scores(system: str, shift: float = 0.0, count: int = 40, prefix: str = "i", **changes: Any) -> Scores:
    rng = np.random.default_rng(len(system))
    ids = tuple(f"{prefix}{i}" for i in range(count))
    options: dict[str, Any] = {
        "seeds": (0, 1, 2), "items": ids, "clusters": tuple(str(i // 4) for i in range(count)),
        "slices": {"short": frozenset(ids[:25]), "tiny": frozenset(ids[:3])}, "sha256": tuple(f"hash {i}" for i in ids),
        **changes,
    }  # fmt: skip
    values = np.random.default_rng(7).normal(size=(1, count)) + shift + rng.normal(0, 0.1, (3, count))
    return Scores(system, "chrF", options.pop("values", values), **options)


def test_items_and_seeds_are_aligned_by_their_names() -> None:
    a, b = scores("candidate", 0.5), scores("anchor")
    order = np.random.default_rng(0).permutation(40)
    shuffled = Scores(
        "anchor", "chrF", b.values[::-1][:, order], b.seeds[::-1], tuple(b.items[i] for i in order),
        sha256=tuple(b.sha256[i] for i in order),
    )  # fmt: skip
    np.testing.assert_array_equal(PairedScores(a, shuffled).difference, a.values - b.values)
    lower = [Scores(s.system, "loss", s.values, s.seeds, s.items, higher_is_better=False) for s in (a, b)]
    np.testing.assert_array_equal(PairedScores(*lower).difference, b.values - a.values)


def test_a_round_trip_changes_nothing(tmp_path: Path) -> None:
    before = scores("candidate", 1 / 3)
    before.write(tmp_path / "scores.json")
    after = Scores.read(tmp_path / "scores.json")
    np.testing.assert_array_equal(after.values, before.values)
    assert {k: v for k, v in vars(after).items() if k != "values"} == {
        k: v for k, v in vars(before).items() if k != "values"
    }
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
    (tmp_path / "scores.json").write_text(before.to_json().replace('"version": 1', '"version": 99'))
    with pytest.raises(ValueError, match="version 99"):
        Scores.read(tmp_path / "scores.json")
    (tmp_path / "scores.json").write_text("[]")
    with pytest.raises(ValueError, match="no document of scores"):
        Scores.read(tmp_path / "scores.json")


def records() -> list[dict[str, Any]]:
    return [
        {"seed": seed, "id": f"i{i}", "value": seed + i, "cluster": i // 2, "slices": ["even"] if i % 2 == 0 else []}
        for seed in (1, 0) for i in range(4)
    ]  # fmt: skip


def test_records_become_a_table() -> None:
    found = Scores.from_records(records(), system="s", metric="m")
    assert found.seeds == (0, 1)
    assert found.values.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert found.clusters == ("0", "0", "1", "1")
    assert found.slices == {"even": frozenset({"i0", "i2"})}
    assert found.sha256 is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r.pop(), "seed 0 has no score for 'i3'"),
        (lambda r: r.append(dict(r[0])), "item 'i0' stands twice for seed 1"),
        (lambda r: r[0].update(cluster=9), "another cluster, hash or slice"),
        (lambda r: r[0].update(value=float("nan")), "nan for item 'i0', seed 1"),
        (lambda r: [x.pop("cluster") for x in r if x["id"] == "i2"], "no `cluster` of 'i2', and one of the others"),
        (lambda r: [x.update(sha256="h") for x in r if x["id"] == "i1"], "no `sha256` of 'i0', 'i2', 'i3', and one"),
    ],
)
def test_wrong_records_are_refused(change: Any, text: str) -> None:
    given = records()
    change(given)
    with pytest.raises(ValueError, match=re.escape(text)):
        Scores.from_records(given, system="s", metric="m")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seeds": (0, 1)}, "values (3, 40) for 2 seeds"),
        ({"seeds": (0, 1, 1)}, "the seed 1 stands twice"),
        ({"items": ("i0",) * 40}, "the item 'i0' stands twice"),
        ({"clusters": ("a",)}, "1 clusters for 40 items"),
        ({"slices": {"x": frozenset({"nobody"})}}, "names ['nobody'], which are no items"),
        ({"slices": {"x": frozenset()}}, "slice 'x' is empty"),
        ({"values": np.full((3, 40), np.inf)}, "must be finite"),
    ],
)
def test_wrong_scores_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        scores("s", **changes)


def test_pairs_that_do_not_fit_are_refused() -> None:
    a = scores("candidate")
    for other, text in (
        (scores("anchor", count=39), "other items: 'i39' of the first alone"),
        (scores("anchor", seeds=(0, 1, 5)), "other seeds: 2 of the first alone, 5 of the second"),
        (scores("anchor", higher_is_better=False), "other directions"),
        (scores("anchor", sha256=tuple("x" * 40)), "the item 'i0' has other content"),
        (scores("anchor", clusters=tuple(str(i // 5) for i in range(40))), "'i4' and 'i5' belong together in one"),
        (scores("anchor", clusters=tuple(str(i // 8) for i in range(40))), "'i0' and 'i4' belong together in one"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            PairedScores(a, other)


def test_the_anchors_clusters_and_slices_count_too() -> None:
    a, b = scores("candidate", clusters=None, slices={}), scores("anchor")
    order = np.random.default_rng(1).permutation(40)
    turned = Scores(
        "anchor", "chrF", b.values[:, order], b.seeds, tuple(b.items[i] for i in order),
        clusters=tuple(f"book {b.clusters[i]}" for i in order), slices=b.slices,
    )  # fmt: skip
    for first, second in ((a, turned), (turned, a), (b, turned)):
        pair = PairedScores(first, second)
        groups = {frozenset(np.array(first.items)[pair.cluster_index == c]) for c in range(10)}
        assert groups == {frozenset(f"i{i}" for i in range(k, k + 4)) for k in range(0, 40, 4)}
        assert pair.slices == b.slices
    other = scores("anchor", slices={"short": frozenset({"i1"})})
    with pytest.raises(ValueError, match="the slice 'short' holds other items in each, as 'i0', 'i10'"):
        _ = PairedScores(scores("candidate"), other).slices


def test_what_differs_by_rounding_alone_is_no_difference() -> None:
    tenths = np.full((3, 40), 0.1) + 0.2
    a, b = scores("candidate", values=tenths), scores("anchor", values=np.full((3, 40), 0.3))
    assert (a.values != b.values).all()
    assert not PairedScores(a, b).difference.any()
    small = scores("anchor", values=np.full((3, 40), 0.3) - 1e-9)
    assert PairedScores(b, small).difference == pytest.approx(np.full((3, 40), 1e-9), rel=1e-6)


def test_a_part_is_what_restricting_both_gives() -> None:
    pair = PairedScores(scores("candidate", 0.2), scores("anchor"))
    difference, clusters = pair.part(pair.slices["short"])
    whole = pair.restricted_to(pair.slices["short"])
    np.testing.assert_array_equal(difference, whole.difference)
    np.testing.assert_array_equal(clusters, whole.cluster_index)


def test_holm_is_the_step_down_and_the_others_are_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    p = dict(zip("abcdef", [0.001, 0.04, 0.03, 0.2, 0.011, 0.04], strict=True))
    for ours, theirs in (("holm", "holm"), ("bh", "fdr_bh"), ("by", "fdr_by")):
        expected = multipletests(list(p.values()), method=theirs)[1]
        assert list(adjusted_p_values(p, ours).values()) == pytest.approx(list(expected), rel=1e-12)
    assert adjusted_p_values({}) == {}
    with pytest.raises(ValueError, match="`method` = 'none'"):
        adjusted_p_values(p, "none")
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        adjusted_p_values({"a": 1.5})


def pairs(shift: float, prefix: str) -> dict[str, PairedScores]:
    return {"chrF": PairedScores(scores("candidate", shift, prefix=prefix), scores("anchor", prefix=prefix))}


@pytest.mark.filterwarnings("ignore:chrF on 'tiny' is left out")
def test_only_slice_b_promotes_and_every_result_says_where_it_stands() -> None:
    results = slice_b_analysis(pairs(0.5, "a"), pairs(0.5, "b"))
    assert {(r.stands_on, r.slice) for r in results} == {
        (where, name) for where in ("slice_a", "slice_b") for name in ("all", "short")
    }  # "tiny" has too few items
    assert all(r.is_better and not r.is_worse and not r.is_inferior for r in results)
    assert {r.stands_on for r in promoting(results)} == {"slice_b"}
    worse = compare_slices(pairs(-0.5, "b"), stands_on="slice_b", margin=0.1)
    assert all(r.is_worse and r.is_inferior for r in worse)
    assert all(not r.is_inferior for r in compare_slices(pairs(-0.02, "b"), stands_on="slice_b", margin=0.3))
    assert promoting(worse) == []


def test_one_seed_claims_nothing() -> None:
    single = {
        "chrF": PairedScores(
            *[
                Scores(s.system, s.metric, s.values[:1], (0,), s.items)
                for s in (scores("candidate", 9.0), scores("anchor"))
            ]
        )
    }
    (result,) = compare_slices(single, stands_on="slice_b")
    assert result.comparison.low > 8.0
    assert not result.is_better


@pytest.mark.filterwarnings("ignore:chrF on 'tiny' is left out")
def test_an_item_in_both_slices_is_refused() -> None:
    with pytest.raises(ValueError, match="'a0' stands in the development slice too"):
        slice_b_analysis(pairs(0.1, "a"), pairs(0.1, "a"))
    with pytest.raises(ValueError, match=re.escape("'copy' stands in the development slice too (as 'original')")):
        check_disjoint({"original": "h"}, {"copy": "h"})
    check_disjoint({"0": "one text"}, {"0": "another"})  # ids are numbers by default, and two files count from 0
    bare = {"chrF": PairedScores(scores("candidate", sha256=None), scores("anchor", sha256=None))}
    with pytest.raises(ValueError, match="no `sha256`"):
        slice_b_analysis(bare, pairs(0.1, "b"))
    with pytest.raises(ValueError, match="`stands_on` = 'slice_c'"):
        compare_slices(bare, stands_on="slice_c")
    with pytest.raises(ValueError, match="`margin` = -1"):
        compare_slices(bare, stands_on="slice_a", margin=-1)


@pytest.mark.filterwarnings("ignore:chrF on 'tiny' is left out")
def test_the_validator_gives_what_its_parts_give() -> None:
    from bem_peft.evaluation.exact_tests import mcnemar_p_value
    from bem_peft.evaluation.intervals import compare_means
    from bem_peft.evaluation.validator import StatisticalValidator

    a, b = scores("candidate", 0.5), scores("anchor")
    pair = PairedScores(a, b)
    validator = StatisticalValidator(confidence=0.9, correction="holm", margin=0.1)
    assert validator.compare(a, b) == compare_means(pair.difference, pair.cluster_index, confidence=0.9)
    results = validator.slice_b_analysis(pairs(0.5, "a"), pairs(0.5, "b"))
    assert {r.comparison.confidence for r in results} == {0.9}
    assert {r.margin for r in results} == {0.1}
    assert [r.slice for r in validator.compare_on_slices(pairs(0.5, "a"))] == ["all", "short"]
    assert validator.required_items(a, b, 0.5) is not None
    with pytest.raises(ValueError, match="3 seeds: McNemar"):
        validator.mcnemar(a, b)
    rng = np.random.default_rng(0)
    binary = [Scores(s, "right", rng.integers(0, 2, (1, 30)), (0,), tuple(map(str, range(30)))) for s in ("x", "y")]
    expected = mcnemar_p_value(binary[0].values[0], binary[1].values[0])
    assert validator.mcnemar(*binary) == expected
    turned = Scores("y", "right", binary[1].values[:, ::-1], (0,), binary[1].items[::-1])
    assert validator.mcnemar(binary[0], turned) == expected
