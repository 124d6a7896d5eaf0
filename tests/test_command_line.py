"""What ends a command: a message that names the file, and a code; never a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bem_peft.budget import check, site_cost
from bem_peft.experiments import encoding, experiment, sections
from bem_peft.yaml_text import parse_yaml
from bem_peft_cli import budget as budget_commands
from bem_peft_cli import results as results_commands
from bem_peft_cli.main import main
from bem_peft_cli.results import unescaped

FILES: dict[str, bytes] = {
    "empty": b"", "list": b"- a\n", "broken": b"name: [a\n", "binary": bytes(range(256)),
    "utf-16": "name: a".encode("utf-16"),
    "latin": b"name: caf\xe9\n", "twice": b"name: a\nname: b\n", "octal": b"seeds: [012]\n", "deep": b"[" * 5_000,
    "object": b"!!python/object/apply:os.system [ls]\n", "text": b"hello\n",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", ["validate", "run"])
def test_an_experiment_that_is_none_is_named(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_bytes(FILES[name])
    assert main([command, str(path)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("bem-peft: ")
    assert str(path) in text


@pytest.mark.parametrize("content", [b"", b"[", b"{}", b"[1]", b"\xff\xfe", b'{"name": 3}', b"null"])
@pytest.mark.parametrize(
    "name", ["seed-0/result.json", "x.json", "x.csv", "x.parquet", "x.eval", "samples_t_2026-01-01T00.jsonl"]
)
def test_results_that_are_none_are_named(
    content: bytes, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "given" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (path.parent / "items.jsonl").write_bytes(content)
    for given_path in (path, tmp_path / "given", tmp_path / "nothing"):
        assert main(["compare", str(given_path), "--anchor", "a", "--out", str(tmp_path / "out")]) == 2
        text = capsys.readouterr().err
        assert text.startswith("bem-peft: ")
        assert str(tmp_path) in text


def test_ctrl_c_ends_with_130(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "read_experiment", interrupt)
    (tmp_path / "x.yaml").touch()
    assert main(["validate", str(tmp_path / "x.yaml")]) == 130
    assert capsys.readouterr().err == "bem-peft: interrupted\n"


def test_a_closed_pipe_and_a_terminal_of_another_encoding_are_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "é.yaml").write_text("name: [")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "bem_peft_cli"]
    ended = subprocess.run([*command, "validate", str(tmp_path / "é.yaml")], capture_output=True, env=environment)
    assert ended.returncode == 2
    assert b"\\xe9.yaml" in ended.stderr
    assert b"Traceback" not in ended.stderr
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run([*command, "sites", "llama"], stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert b"Traceback" not in closed.stderr
    assert b"BrokenPipe" not in closed.stderr


HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "safetensors", "bem_peft")


def modules_after(*arguments: str) -> tuple[int, set[str], str]:
    """Exit code, modules that are loaded, and the output, of `bem-peft ARGUMENTS` in a fresh process."""
    script = (
        "import sys\nfrom bem_peft_cli.main import main\ncode = 0\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        "print('\\n' + str(code) + ' ' + ' '.join(sys.modules), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    code, *names = ended.stderr.splitlines()[-1].split()
    return int(code), set(names), ended.stdout + ended.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["compare", "--help"], [], ["run"], ["match", "--match", "time"]]
)
def test_help_and_a_mistyped_option_load_neither_torch_nor_the_package(arguments: list[str]) -> None:
    code, loaded, text = modules_after(*arguments)
    assert code == (0 if "--help" in arguments else 2)
    assert "usage: bem-peft" in text
    assert not loaded & set(HEAVY)
    assert len(loaded) < 150


def test_a_command_says_that_it_loads_before_it_does(tmp_path: Path) -> None:
    (tmp_path / "none.yaml").write_text("- a")
    code, loaded, text = modules_after("validate", str(tmp_path / "none.yaml"))
    assert code == 2
    assert "torch" in loaded
    assert text.startswith("bem-peft validate: loading")


@pytest.mark.parametrize(
    "arguments", [["validate", "FILE"], ["run", "FILE"], ["evaluate", "a", "--experiment", "FILE", "--out", "o"],
                  ["compare", "r", "--anchor", "a", "--out", "o", "--profile", "FILE"]],
)  # fmt: skip
def test_a_file_that_is_not_there_is_told_before_anything_is_loaded(arguments: list[str], tmp_path: Path) -> None:
    file = str(tmp_path / "nothere.yaml")
    code, loaded, text = modules_after(*(file if word == "FILE" else word for word in arguments))
    assert code == 2
    assert text.startswith(f"bem-peft: {file}: there is no such file, seen from /")
    assert not loaded & set(HEAVY)


def test_a_file_that_cannot_be_looked_at_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(tmp_path / ("x" * 300))]) == 2
    assert "File name too long" in capsys.readouterr().err


def test_a_command_says_nothing_but_its_own() -> None:
    """Not what bitsandbytes lacks, nor what transformers will rename: they are no matter of the user's."""
    command = [sys.executable, "-m", "bem_peft_cli", "budget", "llama", "pt3:u_rank=4", "--anchor", "lora:r=4"]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert ended.stderr == "bem-peft budget: loading torch, transformers and PEFT\n"
    assert "params" in ended.stdout


def test_what_the_options_may_be_is_what_the_package_takes() -> None:
    """The command line repeats these, since it does not load the package for them."""
    assert results_commands.DTYPES == sections.DTYPES
    assert results_commands.TOO_LONG == encoding.TOO_LONG
    assert check.QUANTITIES[:-1] == budget_commands.COUNTED
    assert budget_commands.MATCHED == site_cost.MATCHED


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30", "1:30"), ("yes", "yes"), ("off", "off"), ("2020-01-01", "2020-01-01"), ("1_000", "1_000"),
        ("1e-3", 0.001), ("true", True), ("0o17", 15), ("0x1F", 31), ("-3", -3), ("1.50", 1.5), ("null", None),
        ("~", None), ("'012'", "012"), ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}), (".inf", float("inf")), ("0", 0),
        ("1.", 1.0), ("+7", 7),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "text", ["012", "-007", "00", "a: 1\na: 2", "? [a]\n: b", "!!python/object:os.x {}", "[" * 5_000]
)
def test_what_could_be_read_in_two_ways_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | st.text("[]{}:,-#&*!|>'\"%@`?\n 0x1eya~<.", max_size=40))
def test_any_text_is_yaml_or_a_yaml_error(text: str) -> None:
    try:
        parse_yaml(text)
    except yaml.YAMLError:
        return


WORDS = st.text(st.characters(categories=["L", "N", "P", "S"], include_characters=" "), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
)


@settings(max_examples=80, deadline=None)
@given(DOCUMENTS)
def test_what_another_writer_quotes_is_read_equal(value: Any) -> None:
    assert parse_yaml(json.dumps(value, ensure_ascii=False)) == value  # JSON is YAML 1.2; PyYAML's writer is of 1.1


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [(r"{q}\n", "{q}\n"), (r"\t\\n", "\t\\n"), (r"\u00e9\x41", "éA"), ("plain\n", "plain\n"), (r"\"a\'", "\"a'")],
)
def test_escapes_of_the_command_line_are_those_of_yaml(given_text: str, expected: str) -> None:
    assert unescaped(given_text) == expected


@pytest.mark.parametrize("options", [["--prompt", r"\q"], ["--stop", "a\\"], ["--completion", r"\u12"]])
def test_an_escape_that_is_none_is_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given_options = {"--prompt": "{a}", "--completion": "{b}", "--stop": "c", **dict([options])}
    flat = [part for pair in given_options.items() for part in pair]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "adapter", "--data", "d.jsonl", "--name", "n", "--out", "o", *flat])
    assert ended.value.code == 2
    assert "is no escape" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--items", "-2"], "eval_items = -2: must be at least 1"),
        (["--items", "0"], "eval_items = 0: must be at least 1"),
        (["--batch", "0"], "batch = 0: must be at least 1"),
        (["--max-tokens", "0"], "max_tokens = 0: must be at least 1"),
    ],
)  # fmt: skip
def test_counts_below_one_are_refused(
    options: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "adapter", "--data", "d.jsonl", "--prompt", "{a}", "--completion", "{b}", "--name", "n"]
    assert main([*command, "--out", str(tmp_path / "o"), *options]) == 2
    assert re.search(re.escape(text), capsys.readouterr().err)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("training.learning_rate=-1", "training.learning_rate = -1: must be at least 0"),
        ("training.learning_rate=.inf", "training.learning_rate = inf: must be finite"),
        ("training.weight_decay=.nan", "training.weight_decay = nan: must be finite"),
        ("training.per_device_train_batch_size=0", "training.per_device_train_batch_size = 0: must be at least 1"),
        ("data.too_long=cut", "data.too_long = 'cut': must be one of error, drop"),
    ],
)
def test_numbers_out_of_range_do_not_validate(setting: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))[0]
    assert main(["validate", str(path), "--set", setting]) == 2
    assert text in capsys.readouterr().err


def test_importing_the_package_adds_little_to_importing_peft() -> None:
    """The evaluation, which loads scipy, and the Trainer come when they are asked for."""
    script = (
        "import sys, peft\nbefore = set(sys.modules)\nimport bem_peft\n"
        "new = {m for m in set(sys.modules) - before if m.split('.')[0] != 'bem_peft'}\nprint(*sorted(new))\n"
        "for name in bem_peft.__all__: getattr(bem_peft, name)\nassert set(bem_peft.__all__) <= set(dir(bem_peft))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    new = ended.stdout.split()
    assert len(new) < 12, new
    assert not [name for name in new if name.startswith(("scipy", "datasets", "transformers.trainer_seq"))]
