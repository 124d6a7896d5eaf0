"""Reports: what they say follows from the results; json fits its schema; the page is whole."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from bem_peft.evaluation.evaluator import ComprehensiveEvaluator
from bem_peft.evaluation.formats.read import read_results
from bem_peft.evaluation.promotion import NO_VERDICT, NOT_PROMOTED, PROMOTED
from bem_peft.evaluation.report.files import write_files
from bem_peft.evaluation.report.report import SCHEMA_FILE
from bem_peft.evaluation.report.text import number
from bem_peft.evaluation.results import SystemResult
from bem_peft_cli.main import main

ITEMS, SEEDS = 90, 4


def write_published(folder: Path, name: str, accuracy: float, parameters: int, status: str = "success") -> Path:
    """A file of the shape of PEFT's method_comparison, made up."""
    run = {
        "run_info": {"experiment_name": name, "train_config": {"seed": 0}, "peft_config": {"peft_type": "LORA"}},
        "train_info": {
            "accelerator_memory_max": 2 * 10**10, "train_time": 600.5, "file_size": 4 * parameters, "status": status,
            "num_trainable_params": parameters, "metrics": [{"step": 1, "test accuracy": accuracy}],
        },
        "meta_info": {"package_info": {"peft-version": "0.19"}, "system_info": {"accelerator": "made up"}},
    }  # fmt: skip
    path = folder / f"{name.replace('/', '--')}.json"
    path.write_text(json.dumps(run))
    return path


def write_run(
    folder: Path, name: str, shift: float, budget: str = "PASS", seeds: int = SEEDS, prefix: str = "i"
) -> Path:
    """Results as `bem-peft run` leaves them; `shift` of the negative log likelihood: below 0 is better."""
    ease = np.random.default_rng(5).normal(2.0, 0.5, ITEMS)
    rng = np.random.default_rng(sum(map(ord, name)))
    for seed in range(seeds):
        out = folder / name / f"seed-{seed}"
        out.mkdir(parents=True)
        noise = rng.normal(0, 0.05, ITEMS) + rng.normal(0, 0.005)
        lines = [
            {
                "id": f"{prefix}{i}", "group": f"{prefix}{i // 3}", "sha256": f"{prefix} {i}", "tokens": 10 + i,
                "nll": (ease[i] + shift + noise[i]) * (10 + i),
            }
            for i in range(ITEMS)
        ]  # fmt: skip
        (out / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
        line = {
            "quantity": "params", "unit": "", "measured": 100.0, "anchor": 100.0, "deviation_ratio": 0.0,
            "lower": 95.0, "upper": 105.0, "verdict": budget, "how": "exact",
        }  # fmt: skip
        result = {
            "version": 1, "name": name, "seed": seed, "adapter": {"peft_type": "BEM_FILM"}, "budget": [line],
            "parameters": {"trainable": 100, "stored_bytes": 400}, "training_seconds": 1.0 + seed,
            "metrics": {"loss": 2.0},
            "provenance": {"settings_sha256": "s", "git": None, "versions": {"torch": "2.13"}, "hardware": {}},
        }  # fmt: skip
        (out / "result.json").write_text(json.dumps(result))
    return folder / name


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    return {
        "anchor": write_run(tmp_path, "anchor", 0.0),
        "better": write_run(tmp_path, "better", -0.1),
        "worse": write_run(tmp_path, "worse", 0.1),
        "costly": write_run(tmp_path, "costly", -0.1, budget="FAIL"),
    }


def evaluator(runs: dict[str, Path], **options: Any) -> ComprehensiveEvaluator:
    return ComprehensiveEvaluator(read_results(list(runs.values())), "anchor", **options)


def test_the_rule_promotes_who_keeps_the_budget_and_is_surely_better(runs: dict[str, Path]) -> None:
    report = evaluator(runs, stands_on="slice_b").report()
    verdicts = {p.system: (p.verdict, p.reasons) for p in report.promotions}
    assert verdicts["better"][0] == PROMOTED
    assert any("better on nll, all: +0." in reason for reason in verdicts["better"][1])
    assert verdicts["worse"][0] == NOT_PROMOTED
    assert any("may be worse by more than the margin on nll, all" in reason for reason in verdicts["worse"][1])
    assert verdicts["costly"] == (NOT_PROMOTED, verdicts["costly"][1])
    assert "the budget is not kept" in verdicts["costly"][1]
    slices = {found.slice for found in report.comparisons["better"]}
    assert slices == {"all", "shortest third", "longest third"}


def test_development_items_one_seed_and_no_budget_earn_no_verdict(runs: dict[str, Path], tmp_path: Path) -> None:
    developed = evaluator(runs).report()
    assert {p.verdict for p in developed.promotions} == {NO_VERDICT}
    assert all("only that promotes" in p.reasons[0] for p in developed.promotions)
    single = {
        name: write_run(tmp_path / "one", name, shift, seeds=1) for name, shift in (("anchor", 0.0), ("lucky", -1.0))
    }
    (lucky,) = evaluator(single, stands_on="slice_b").report().promotions
    assert lucky.verdict == NO_VERDICT
    assert "one seed" in lucky.reasons[0]
    unmeasured = read_results([runs["anchor"], runs["better"]])
    unmeasured[1].budget = None
    (found,) = ComprehensiveEvaluator(unmeasured, "anchor", stands_on="slice_b").report().promotions
    assert (found.verdict, found.reasons[0]) == (NO_VERDICT, "the budget was not measured")


def test_items_that_were_developed_on_cannot_promote(runs: dict[str, Path], tmp_path: Path) -> None:
    seen = read_results([write_run(tmp_path / "dev", "anchor", 0.0)])
    with pytest.raises(ValueError, match="stands in the development slice too"):
        evaluator(runs, stands_on="slice_b", development=seen)
    other = read_results([write_run(tmp_path / "other", "anchor", 0.0, prefix="d")])
    evaluator(runs, stands_on="slice_b", development=other)
    with pytest.raises(ValueError, match="go with stands_on='slice_b'"):
        evaluator(runs, development=other)
    with pytest.raises(ValueError, match="`anchor` = 'nobody'"):
        ComprehensiveEvaluator(seen, "nobody")


def test_json_fits_its_schema_and_repeats_the_comparison(runs: dict[str, Path], tmp_path: Path) -> None:
    report = evaluator(runs, stands_on="slice_b").report()
    write_files(report, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    jsonschema.validate(document, json.loads(SCHEMA_FILE.read_text()))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.md"]
    first = document["comparisons"]["better"][0]["comparison"]
    assert first["estimate"] == pytest.approx(0.1, abs=0.03)
    assert first["seeds"] == SEEDS
    assert first["clusters"] == ITEMS // 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "extra": 1}, json.loads(SCHEMA_FILE.read_text()))


def test_pareto_has_probabilities_from_the_seeds(runs: dict[str, Path]) -> None:
    points = {point.name: point for point in evaluator(runs).pareto()}
    assert points["worse"].probability == 0.0
    assert set(points["worse"].dominated_by) >= {"anchor"}
    assert points["better"].probability is not None


def test_published_results_render_with_their_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"lora/rank32": (0.478, 9_175_040), "ia3/default": (0.311, 286_720), "none/much": (0.3, 9_999_999)}
    published = tmp_path / "published"
    published.mkdir()
    for name, (accuracy, parameters) in given.items():
        write_published(published, name, accuracy, parameters)
    assert main(["compare", str(published), "--anchor", "lora/rank32", "--out", str(tmp_path / "out")]) == 0
    assert "NO VERDICT" in capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    jsonschema.validate(document, json.loads(SCHEMA_FILE.read_text()))
    values = {system["name"]: system["values"] for system in document["systems"]}
    assert {name: (v["accuracy"], v["parameters"]) for name, v in values.items()} == given
    assert {p["verdict"] for p in document["promotions"]} == {"NO VERDICT"}
    front = {point["name"] for point in document["pareto"] if point["is_on_frontier"]}
    assert front == {"lora/rank32", "ia3/default"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "one seed (0) and no item scores were published" in text


class Page(HTMLParser):
    """Open tags, links, and the text of headings."""

    VOID = {"meta", "br", "circle", "line", "rect", "polyline"}

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["better"], tmp_path / "evil" / "x")
    for path in (tmp_path / "evil" / "x").glob("seed-*/result.json"):
        path.write_text(path.read_text().replace('"better"', json.dumps("<script>alert('1')</script> & \"more\"")))
    report = evaluator({**runs, "evil": tmp_path / "evil" / "x"}, stands_on="slice_b").report()
    write_files(report, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.stack == []
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe")]
    assert not re.findall(r"https?://", text)
    assert all("aria-label" in attributes for tag, attributes in page.tags if tag == "svg")
    assert sum(tag == "h1" for tag, _ in page.tags) == 1
    for word in ("Verdicts", "Differences from the anchor", "Pareto frontiers", "Budgets", "PROMOTED", "NOT PROMOTED"):
        assert word in text


# texts of the plots that reach beyond their picture, whose rest nobody sees
CUT_TEXTS = """[...document.querySelectorAll("svg")].flatMap(picture => [...picture.querySelectorAll("text")].filter(
    text => { const box = text.getBoundingClientRect(), whole = picture.getBoundingClientRect();
              return box.left < whole.left || box.right > whole.right || box.bottom > whole.bottom }
    ).map(text => text.textContent))"""


@pytest.mark.skipif(
    find_spec("playwright") is None or find_spec("axe_playwright_python") is None or not shutil.which("chromium"),
    reason="needs chromium, and pip install playwright axe-playwright-python",
)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_nothing_and_nothing_overflows(
    runs: dict[str, Path], tmp_path: Path, width: int, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    report = evaluator(runs, stands_on="slice_b").report()
    for found in report.comparisons["better"]:  # numbers of many digits
        long = replace(found.comparison, estimate=-1.23e-05, low=-0.000269, high=+0.000179)
        object.__setattr__(found, "comparison", long)
    write_files(report, tmp_path / "out")
    with sync_playwright() as tool:
        browser = tool.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
        )
        page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
        page.goto((tmp_path / "out" / "report.html").as_uri())
        found = Axe().run(page).response["violations"]
        assert [(v["id"], v["impact"]) for v in found] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT_TEXTS) == []
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        browser.close()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{}", "no result of PEFT's method_comparison"),
        ("[]", "no result of PEFT's method_comparison"),
        ("[", "x.json:1: no JSON"),
        ('{"run_info": {}, "train_info": {"metrics": []}}', "no result of PEFT's method_comparison"),
    ],
)
def test_what_is_no_result_is_refused(content: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=text):
        read_results([tmp_path / "x.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: holds no results\. What is read: a folder"):
        read_results([tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"nothing: there is no such file or folder, seen from /"):
        read_results([tmp_path / "nothing"])


def test_a_seeds_folder_is_told_from_a_run(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    told = f"is one seed of a run; give {re.escape(str(runs['better']))}"
    with pytest.raises(ValueError, match=told):
        read_results([runs["better"] / "seed-0"])
    monkeypatch.chdir(runs["better"])
    with pytest.raises(ValueError, match=told):
        read_results(["seed-0"])


def test_one_system_alone_is_no_comparison(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--anchor", "anchor", "--held-out", "--out", str(tmp_path / "out")]
    assert main(["compare", str(runs["anchor"]), *command]) == 2
    assert "'anchor' is the only system: give another one too" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.json").exists()
    assert main(["compare", str(runs["anchor"]), str(runs["worse"]), *command]) == 0
    said = capsys.readouterr().out
    compared = json.loads((tmp_path / "out" / "report.json").read_text())["comparisons"]["worse"][0]["comparison"]
    ends = [f"{compared[name]:+.3g}" for name in ("estimate", "low", "high")]
    assert f"worse nll {ends[0]} [{ends[1]}, {ends[2]}]; above 0 is better than anchor\nworse: NOT PROMOTED" in said


def test_names_that_stand_twice_and_failed_runs_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two systems are called 'anchor'"):
        read_results([runs["anchor"], runs["anchor"]])
    failed = write_published(tmp_path, "x", 0.1, 10, status="failed")
    with pytest.raises(ValueError, match="ended with 'failed'"):
        read_results([failed])


def test_numbers_are_short_and_exact_counts_are_whole() -> None:
    assert [number(v) for v in (783_360.0, 0.96512, 1.2e-05, 123456.7)] == ["783,360", "0.9651", "1.2e-05", "123,457"]
    assert SystemResult("a", "m", {}).budget_is_met is None


def test_margins_are_a_metrics_own(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", *map(str, runs.values()), "--anchor", "anchor", "--held-out", "--out", str(tmp_path / "out")]
    assert main([*command, "--margin", "nll=0.5"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert not any(found["is_inferior"] for found in report["comparisons"]["worse"])
    assert {found["margin"] for found in report["comparisons"]["worse"]} == {0.5}
    for given, text in (
        ("0.5", "write METRIC=VALUE"),
        ("chrf=1", "`margin` of 'chrf': the systems were scored by nll"),
    ):
        assert main([*command, "--margin", given]) == 2
        assert text in capsys.readouterr().err


def test_a_metric_that_gives_everybody_nothing_ranks_nobody(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = ["system,seed,item,metric,value"]
    for system in ("a", "b"):
        for seed in range(3):
            for item in range(30):
                rows.append(f"{system},{seed},i{item},a_zero,0")
                rows.append(f"{system},{seed},i{item},score,{rng.normal():.6f}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    report = ComprehensiveEvaluator(read_results([tmp_path / "t.csv"]), "a").report()
    assert report.ranking is not None
    assert report.objectives[0].name == "score"
    asked = ComprehensiveEvaluator(read_results([tmp_path / "t.csv"]), "a", quality="a_zero").quality_objective()
    assert asked is not None
    assert asked.name == "a_zero", "who asks for it gets it"


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (lambda seed: {"seeds": [seed], "output_dir": f"runs/{seed}"}, None),  # each seed by a file of its own
        (lambda seed: {"adapter": f"runs/seed-{seed}/adapter"}, None),  # of `evaluate`
        (lambda seed: {"training": {"learning_rate": 0.1 * (1 + seed)}}, "training.learning_rate"),
        (lambda seed: {"adapter": {"method": "lora", **({"r": 4} if seed else {})}}, "adapter.r"),
        (lambda seed: {"data": {"chat": bool(seed)}, "model": {"dtype": "float32"}}, "data.chat"),
    ],
)
def test_settings_that_differ_between_seeds_are_named(changes: Any, warning: str | None, tmp_path: Path) -> None:
    folder = write_run(tmp_path, "system", 0.0)
    for path in folder.glob("seed-*/result.json"):
        result = json.loads(path.read_text())
        settings = {"name": "system", "seeds": [0, 1, 2], "training": {"learning_rate": 0.1}} | changes(result["seed"])
        result["provenance"]["settings"] = settings
        path.write_text(json.dumps(result))
    (system,) = read_results([folder])
    expected = [] if warning is None else [f"the seeds were run with different settings: {warning}"]
    assert [line for line in system.warnings if "settings" in line] == expected
