"""Records against the csv module, json and pyarrow; any bytes give records or an error that names the file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from bem_peft.experiments.records import Template, columns_of, read_records

NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name.strip() and "\x00" not in name and "\r" not in name)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6,
)  # fmt: skip
quickly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def records_of(path: Path) -> list[dict[str, Any]]:
    return [dict(record) for _, record in read_records(str(path))]


def filled(path: Path, column: str) -> list[str]:
    template = Template(f"{{{column}}}", "data.prompt")
    return [template.fill(where, record) for where, record in read_records(str(path))]


@quickly
@given(st.lists(st.dictionaries(TEXTS, VALUES, min_size=1, max_size=3), min_size=1, max_size=4), st.booleans())
def test_json_is_read_as_it_was_written(tmp_path: Path, given_: list[dict[str, Any]], is_ascii: bool) -> None:
    for name, text in (
        ("a.jsonl", "".join(json.dumps(r, ensure_ascii=is_ascii) + "\n" for r in given_)),
        ("a.json", json.dumps(given_, ensure_ascii=is_ascii, indent=1)),
    ):
        (tmp_path / name).write_bytes(text.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
        for found in (records_of(tmp_path / name), records_of(tmp_path / f"{name}.gz")):
            # numbers are kept as they are spelled: as JSON they are the same
            for record, expected in zip(found, given_, strict=True):
                assert list(record) == list(expected)
                for key, value in expected.items():
                    if value is not None and "{" not in key and "}" not in key and key:
                        shown = Template(f"{{{key}}}", "x").fill("here", record)
                        assert shown == value if isinstance(value, str) else json.loads(shown) == value


@quickly
@given(st.data(), st.sampled_from([("csv", ","), ("tsv", "\t")]))
def test_csv_cells_are_text_as_they_stand(tmp_path: Path, data: st.DataObject, kind: tuple[str, str]) -> None:
    head = data.draw(st.lists(NAMES, min_size=2, max_size=4, unique=True))
    cells = TEXTS.map(lambda text: text.replace("\r", ""))
    rows = data.draw(st.lists(st.lists(cells, min_size=len(head), max_size=len(head)), min_size=1, max_size=4))
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=kind[1], quoting=csv.QUOTE_ALL).writerows([head, *rows])
    path = tmp_path / f"a.{kind[0]}"
    path.write_bytes(text.getvalue().encode())
    assert records_of(path) == [dict(zip(head, row, strict=True)) for row in rows]
    assert columns_of(str(path)) == head


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_tables_are_read_as_pyarrow_wrote_them(name: str, tmp_path: Path) -> None:
    table = pyarrow.table({"Question Text": ["a\u2028b", "007", None], "n": [1, 2, 3], "list": [[1.5], [], [2.0]]})
    path = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(table, path, row_group_size=2)
    else:
        new = ipc.new_file if name == "file.arrow" else ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    assert records_of(path) == table.to_pylist()
    assert filled(path, "list") == ["[1.5]", "[]", "[2.0]"]
    with pytest.raises(ValueError, match=re.escape(f"{path}: row 3: 'Question Text' is null, and data.prompt")):
        filled(path, "Question Text")


def test_values_are_kept_as_the_file_spells_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"v": 3.50}\n{"v": 1e400}\n{"v": 123456789012345678901234567890}\n{"v": true}\n{"v": [1.0, null, "x"]}\n'
        '{"v": {"a": 2.50}}\n{"v": "NA"}\n{"v": "2020-01-01"}\n{"v": ""}\n{"v": "\\u2028\\u0085"}\n',
        encoding="utf-8",
    )
    assert filled(path, "v") == [
        "3.50", "1e400", "123456789012345678901234567890", "true", '[1.0, null, "x"]', '{"a": 2.50}', "NA",
        "2020-01-01", "", "\u2028\x85",
    ]  # fmt: skip
    path = tmp_path / "a.csv"
    path.write_text("v,w\nNA,x\n007,\n3.50,42.0\nnull,2020-01-01\n")
    assert filled(path, "v") == ["NA", "007", "3.50", "null"]
    assert filled(path, "w") == ["x", "", "42.0", "2020-01-01"]


@pytest.mark.parametrize(
    ("name", "raw", "text"),
    [
        ("a.jsonl", b'{"v": 1}\n{"v": \n', "a.jsonl:2: no JSON"),
        ("a.jsonl", b'{"v": 1}\n[1]\n', "a.jsonl:2: '[1]' is no JSON object"),
        ("a.jsonl", b'{"v": NaN}\n', "a.jsonl:1: NaN is no JSON"),
        ("a.jsonl", b'{"v": 1, "v": 2}\n', "a.jsonl:1: the key 'v' stands twice"),
        ("a.jsonl", b'{"v": "\xe9"}\n', "a.jsonl:1: byte 0xe9 is no UTF-8"),
        ("a.jsonl", '{"v": 1}\n'.encode("utf-16"), "a.jsonl:1: byte 0xff is no UTF-8"),
        ("a.jsonl", b'{"v": "\\ud800"}\n', "a.jsonl:1: 'v' holds half of a surrogate pair"),
        ("a.jsonl", b'{"w": 1}\n', "a.jsonl:1: 'v' is missing"),
        ("a.jsonl", b'{"v": null}\n', "a.jsonl:1: 'v' is null"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: nests too deep"),
        ("a.json", b'[{"v": 1}, 2]', "a.json: entry 2 is no JSON object"),
        ("a.json", b'{\n "v": 1\n}', "a.json:1: no JSON"),
        ("a.csv", b"", "a.csv: is empty"),
        ("a.csv", b"v,v\n1,2\n", "a.csv:1: two columns are called 'v'"),
        ("a.csv", b"v,w\n1,2\n1\n", "a.csv:3: 1 cells for 2 columns"),
        ("a.csv", b'v\n"a', "a.csv:2: unexpected end of data"),
        ("a.jsonl.gz", gzip.compress(b'{"v": 1}\n', mtime=0)[:-6], "a.jsonl.gz: no whole gzip file"),
        ("a.parquet", b"PAR1", "a.parquet: no Parquet file"),
        ("a.arrow", b"ARROW1", "a.arrow: no Arrow file"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_file_and_line(name: str, raw: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=re.escape(text)):
        filled(tmp_path / name, "v")


def test_the_file_that_was_named_is_read_as_it_is_now(tmp_path: Path) -> None:
    import os

    for name in ("data1.jsonl", "data2.jsonl", "data[12].jsonl", "data*.jsonl"):
        (tmp_path / name).write_text(json.dumps({"v": name}))
    assert filled(tmp_path / "data[12].jsonl", "v") == ["data[12].jsonl"]
    assert filled(tmp_path / "data*.jsonl", "v") == ["data*.jsonl"]
    stamp = (tmp_path / "data1.jsonl").stat()
    (tmp_path / "data1.jsonl").write_text(json.dumps({"v": "new"}))
    os.utime(tmp_path / "data1.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert filled(tmp_path / "data1.jsonl", "v") == ["new"]
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("folder.jsonl", "data3.jsonl"):
        with pytest.raises(OSError, match=re.escape(name)):
            filled(tmp_path / name, "v")


@quickly
@given(st.binary(max_size=200), st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet", "arrow", "jsonl.gz"]))
def test_any_bytes_give_records_or_an_error_that_names_the_file(tmp_path: Path, raw: bytes, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    packed = gzip.compress(raw) if kind.endswith("gz") else raw
    for content in (raw, packed, b"ARROW1\0\0" + raw, b"PAR1" + raw + b"PAR1"):
        path.write_bytes(content)
        told = ""
        try:
            for where, record in read_records(str(path)):
                assert str(path) in where
                assert isinstance(record, dict)
        except ValueError as error:
            told = str(error)
        assert told == "" or str(path) in told


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{Question Text}", "Q"), ("{a-b} {a.b}", "1 2"), ('{{"answer": "{ö}"}}', '{"answer": "3"}'), ("{{}}", "{}"),
        ("{{{ö}}}", "{3}"), ("plain", "plain"),
    ],
)  # fmt: skip
def test_a_template_names_any_column_and_can_write_braces(template: str, expected: str) -> None:
    record = {"Question Text": "Q", "a-b": "1", "a.b": "2", "ö": "3"}
    assert Template(template, "data.prompt").fill("here", record) == expected
    assert Template(template, "data.prompt").missing(record) == []


@pytest.mark.parametrize("template", ["{", "}", "{a", "a}", "{}", '{"a": {b}}'])
def test_a_lone_brace_is_an_error_that_says_how_to_write_one(template: str) -> None:
    with pytest.raises(ValueError, match=re.escape("names no column; write {column}, and {{ or }} for a brace")):
        Template(template, "data.prompt")
