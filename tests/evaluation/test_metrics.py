"""Metrics of text against published examples, sacrebleu and rouge-score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from bem_peft.evaluation import metrics, words
from bem_peft.evaluation.corpus import corpus_score
from bem_peft.evaluation.intervals import compare_means
from bem_peft.evaluation.metrics import corpus_metric, metric_problem, text_scores
from bem_peft.evaluation.paired import PairedScores
from bem_peft.evaluation.resampling import resampled_means
from bem_peft.evaluation.scores import Scores, corpus_scores, corpus_values

PREDICTED = ["The Denver Broncos!", "a cat sat", "", "1976", "nothing here", "an"]
EXPECTED = ["Denver Broncos", "the cat sat down", "x", "in 1976", "other words", ""]


def test_exact_match_and_f1_are_squads() -> None:
    """By hand from the rules of SQuAD's evaluate-v1.1: lower case, no punctuation, no articles, bag of words."""
    found = text_scores(["exact_match", "f1"], PREDICTED, EXPECTED)
    assert found["exact_match"].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]  # "an" is not ""
    # precision 2/2, recall 2/3; precision 1/1, recall 1/2
    assert found["f1"] == pytest.approx([1.0, 0.8, 0.0, 2 / 3, 0.0, 0.0])
    assert metrics.f1("a b b", "b b b") == pytest.approx(0.8)  # "a" is an article: 2 common of 2 and 3


def test_rouge_and_spaces() -> None:
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = [scorer.score(e, p)["rougeL"].fmeasure for p, e in zip(PREDICTED, EXPECTED, strict=True)]
    padded = [f" {text}\n" for text in PREDICTED]
    assert text_scores(["rouge_l"], padded, EXPECTED)["rouge_l"] == pytest.approx(expected)
    assert text_scores(["exact_match"], ["  yes "], ["yes"])["exact_match"] == [1.0]


def test_json_validity_is_of_rfc_8259() -> None:
    texts = ['{"a": [1, 2.5e3, null]}', "'a'", '{"a": 1,}', "NaN", "[Infinity]", "", '"text"', '{"a": 1} more']
    found = text_scores(["json_validity"], texts, [""] * len(texts))["json_validity"]
    assert found.tolist() == [1, 0, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(("name", "reference"), [("bleu", BLEU), ("chrf", CHRF)])
def test_counts_add_up_to_sacrebleus_score(name: str, reference: type) -> None:
    predicted = ["the cat sat on the mat today", "he went to the house with them", "all of it was good to see there"]
    expected = ["the cat sat on a mat today", "he went into the house with them", "all of this was good to see"]
    counts = text_scores([name], predicted, expected)[name]
    assert corpus_score(corpus_metric(name), counts) == pytest.approx(
        reference().corpus_score(predicted, [expected]).score
    )
    values = corpus_values(name, np.stack([counts, counts[::-1]]))
    assert values.mean(1) == pytest.approx([corpus_score(corpus_metric(name), counts)] * 2)


def test_what_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "must be of nll, exact_match" in (metric_problem("blue") or "")
    assert metric_problem("chrf") is None
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    assert "pip install 'bem_peft[metrics]'" in (metric_problem("rouge_l") or "")
    with pytest.raises(ValueError, match="metric 'rouge_l': needs the package rouge-score"):
        text_scores(["rouge_l"], ["a"], ["b"])
    with pytest.raises(ValueError, match="2 predictions for 1"):
        text_scores(["f1"], ["a", "b"], ["b"])
    with pytest.raises(ValueError, match="'nll': is no metric of text"):
        text_scores(["nll"], ["a"], ["b"])


def system(name: str, shift: float, seeds: int = 3, items: int = 40, clusters: int = 10) -> Scores:
    rng = np.random.default_rng(4)
    ease, noise = rng.normal(0, 1, items), np.random.default_rng(ord(name)).normal(0, 0.2, (seeds, items))
    return Scores(
        name, "accuracy", ease + shift + noise, tuple(range(seeds)), tuple(f"i{i}" for i in range(items)),
        clusters=tuple(f"c{i % clusters}" for i in range(items)),
    )  # fmt: skip


def counted(name: str, errors: float) -> Scores:
    rng = np.random.default_rng(ord(name))
    expected = [" ".join(rng.choice(list("abcdefgh"), 9)) for _ in range(40)]
    per_seed = []
    for _ in range(3):
        spoilt = [" ".join(w if rng.random() > errors else "zz" for w in text.split()) for text in expected]
        per_seed.append(text_scores(["chrf"], spoilt, expected)["chrf"])
    return corpus_scores(system(name, 0.0), "chrf", np.stack(per_seed))


def test_a_slice_of_a_corpus_metric_has_its_own_corpus_score(tmp_path: Path) -> None:
    whole = counted("a", 0.3)
    half = [f"i{i}" for i in range(0, 40, 2)]
    part = whole.restricted_to(half)
    assert part.counts is not None
    own = [corpus_score(corpus_metric("chrf"), rows) for rows in part.counts]
    assert part.values.mean(1) == pytest.approx(own)
    assert part.values.mean() != pytest.approx(whole.values[:, ::2].mean(), abs=1e-6)
    whole.write(tmp_path / "scores.json")
    again = Scores.read(tmp_path / "scores.json")
    assert np.array_equal(again.values, whole.values)
    assert np.array_equal(again.restricted_to(half).values, part.values)
    difference = PairedScores(whole, counted("b", 0.5)).difference
    assert compare_means(difference).low > 0
    with pytest.raises(ValueError, match=r"counts \(2, 40, 3\)"):
        corpus_scores(system("a", 0.0), "chrf", np.zeros((2, 40, 3)))


def test_resampled_means_spread_as_the_two_way_error_says() -> None:
    """With the seeds' own spread widened by K / (K - 1), so that three seeds do not look surer than they are."""
    first, second = system("a", 0.0), system("b", 0.05)
    draws = resampled_means([first, second], resamples=20_000)
    assert draws is not None
    assert draws.mean(1) == pytest.approx([first.values.mean(), second.values.mean()], abs=0.01)
    found = compare_means(PairedScores(second, first).difference, PairedScores(second, first).cluster_index)
    # the crossed bootstrap counts the noise of a cell twice; so it is a little wider, never narrower
    assert 1.0 <= (draws[1] - draws[0]).std() / found.standard_error < 1.5
    assert resampled_means([]) is None
    assert resampled_means([first, system("c", 0.0, seeds=2)]) is None
    assert resampled_means([first, system("c", 0.0, items=39)]) is None


def test_order_of_items_and_seeds_does_not_matter() -> None:
    first, second = system("a", 0.0), system("b", 0.05)
    turned = Scores(
        "b", "accuracy", second.values[::-1, ::-1], second.seeds[::-1], second.items[::-1],
        clusters=None if second.clusters is None else second.clusters[::-1],
    )  # fmt: skip
    one, other = resampled_means([first, second]), resampled_means([first, turned])
    assert one is not None
    assert other is not None
    assert one == pytest.approx(other)
    single = resampled_means([system("a", 0.0, seeds=1), system("b", 0.0, seeds=1)])
    assert single is not None
    assert (single.std(1) > 0).all()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A", ""), ("-5", "5"), ("3.14", "314"), ("A", "B"), ("a", "an"), ("?!", "..."), ("1.5", "15"), ("\u22125",
        "5"), ("B", "-B-C"), ("é", "e"), ("東京", "京都"), ("да", "нет"),
    ],
)  # fmt: skip
def test_other_answers_are_no_match(one: str, other: str) -> None:
    assert metrics.exact_match(one, other) == 0.0
    assert metrics.exact_match(other, one) == 0.0
    assert metrics.f1(one, other) < 1.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000", "1000"), ("5.0", "5"), ("+5", "5"), ("$5", "5"), ("The U.S.", "us"), ("007", "7"), ("-0.0", "0"),
        ("5%", "5"), ("e\u0301", "\u00e9"), ("A", "a"), ("", "  "),
    ],
)  # fmt: skip
def test_the_same_answer_in_another_form_is_a_match(one: str, other: str) -> None:
    assert metrics.exact_match(one, other) == 1.0


TEXTS = {
    "Chinese": "今天天气很好我们去公园",
    "Hindi": "मैं घर जा रहा हूँ",
    "Arabic": "ذهبت إلى المدرسة اليوم",
    "Russian": "я иду домой сегодня",
    "Thai": "วันนี้อากาศดีมาก",
    "Japanese": "今日はとても良い天気です",
    "Korean": "오늘은 날씨가 정말 좋습니다",
    "signs": "?!",
    "English": "the cat sat on it",
}


@pytest.mark.parametrize("script", TEXTS)
def test_the_same_text_scores_full_in_every_script_and_another_one_less(script: str) -> None:
    text = TEXTS[script]
    names = ["exact_match", "f1", "rouge_l", "chrf"] + ([] if script == "signs" else ["bleu"])
    same = text_scores(names, [text], [text])
    other = text_scores(names, [text[: len(text) // 2]], [text])
    for name in names:
        full, part = (
            corpus_score(corpus_metric(name), found[name]) if name in metrics.CORPUS else 100 * found[name][0]
            for found in (same, other)
        )
        assert full == pytest.approx(100.0), name
        assert part < 100.0, name
    if script not in ("signs", "English"):
        assert text_scores(["rouge_l", "f1"], [text[: len(text) // 2]], [text])["rouge_l"][0] > 0.3


def test_words_of_ascii_are_those_of_rouge_score() -> None:
    from rouge_score.tokenize import tokenize

    for text in ("The cat's 3.14 e-mails, (sat)!", "snake_case A1 b-2", ""):
        assert words.word_tokens(text) == tokenize(text, None)


def test_bleu_says_what_it_cannot_judge_and_deep_nests_are_no_json() -> None:
    with pytest.raises(ValueError, match="no reference has four words"):
        text_scores(["bleu"], ["Paris", "Rome"], ["Paris", "Rome"])
    found = text_scores(["json_validity"], ["[" * 2_000, "[" * 200_000, "{}"], [""] * 3)
    assert found["json_validity"].tolist() == [0, 0, 1]
