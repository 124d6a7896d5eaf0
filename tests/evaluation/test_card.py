"""Cards of others: only our own entry changes, and a card that cannot be kept is refused before anything is
computed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from bem_peft.evaluation.report.card import END, START
from bem_peft_cli.main import main
from tests.evaluation.test_report import write_run

OTHERS = """model-index:
- name: mine
  results:
  - task: {type: text-generation}
    dataset: {type: someone/verses, name: Verses, config: de}   # another configuration
    metrics:
    - {type: nll, value: 1.5, verified: true, verifyToken: abc}
  - task: {type: text-generation}
    dataset: {type: someone/verses, name: Verses, split: validation}
    metrics:
    - {type: nll, value: 2.5}
  - task: {type: text-generation}
    dataset: {type: someone/verses, name: Verses}
    metrics:
    - {type: nll, value: 3.5, name: "theirs"}
    source: {name: leaderboard, url: "https://example.org"}
  - task: {type: text-generation}
    dataset: {type: someone/verses, name: Verses}
    metrics:
    - {type: nll, value: 4.5}
- name: second
  results: []
"""
HEAD = "# a comment\nlicense: apache-2.0  # kept\ntags: [a,   b]\n"
TAIL = "extra_gated_prompt: |\n  some\n\n  text: here\n"


def command(tmp_path: Path) -> list[str]:
    runs = [str(write_run(tmp_path, "anchor", 0.0)), str(write_run(tmp_path, "better", -0.1))]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    out = ["compare", *runs, "--anchor", "anchor", "--held-out", "--out", str(tmp_path / "out")]
    return [*out, "--card", f"better={adapter}", "--dataset", "Verses", "--dataset-id", "someone/verses"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_only_our_own_entry_changes(tmp_path: Path, newline: str, mark: str) -> None:
    given = command(tmp_path)
    path = tmp_path / "adapter/README.md"
    body = "\n# Mine  \n\nkept | words\n"
    path.write_bytes((mark + f"---\n{HEAD}{OTHERS}{TAIL}---\n{body}".replace("\n", newline)).encode())
    for _ in range(3):
        assert main(given) == 0
    text = path.read_bytes().decode()
    assert text.startswith(f"---{newline}" + HEAD.replace("\n", newline))
    assert TAIL.replace("\n", newline) in text
    assert body.rstrip().replace("\n", newline) in text
    assert ("\r" in text) == (newline == "\r\n")
    plain = text.replace("\r\n", "\n")
    metadata = yaml.safe_load(plain.split("---\n")[1])
    before = yaml.safe_load(OTHERS)["model-index"]
    assert metadata["model-index"][0]["results"][:-1] == before[0]["results"]
    assert metadata["model-index"][1:] == before[1:]
    ours = metadata["model-index"][0]["results"][-1]
    assert ours["dataset"] == {"type": "someone/verses", "name": "Verses"}
    assert [metric["type"] for metric in ours["metrics"]] == ["nll"]
    assert plain.count(START) == plain.count(END) == 1
    assert {r.metric_value for r in ModelCard(plain).data.eval_results} >= {1.5, 2.5, 3.5, 4.5}


def test_our_section_stands_where_it_stood(tmp_path: Path) -> None:
    given = command(tmp_path)
    path = tmp_path / "adapter/README.md"
    path.write_text(f"before\n\n{START}\nold\n{END}\n\nafter\n")
    assert main(given) == 0
    text = path.read_text()
    assert text.index("before") < text.index(START) < text.index(END) < text.index("after")
    assert "old" not in text
    assert text.startswith("---\nmodel-index:")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"words\n{START}\nmine, to be kept\n", "must stand once each and in this order"),
        (f"words\n{END}\n{START}\n", "must stand once each and in this order"),
        (f"{START}\n{END}\n{START}\n{END}\n", "must stand once each and in this order"),
        ("---\na: [\n---\n", "its metadata is no YAML"),
        ("---\nmodel-index: 3\n---\n", "its `model-index` must be a list of models"),
    ],
)
def test_a_card_that_cannot_be_kept_is_refused_and_left_alone(
    tmp_path: Path, text: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = command(tmp_path)
    (tmp_path / "adapter/README.md").write_text(text)
    assert main(given) == 2
    assert re.search(re.escape(problem), capsys.readouterr().err)
    assert (tmp_path / "adapter/README.md").read_text() == text
    assert not (tmp_path / "out").exists()
