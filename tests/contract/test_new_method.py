"""The section "A new method, step by step" of CONTRIBUTING.md, run: its code is a method that passes the contract."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft.mapping
import pytest
import torch
from peft import PeftModel, get_peft_model

import bem_peft
from bem_peft.tuners import methods as package_methods
from bem_peft.tuners.base import registry
from tests.contract import invariants, methods
from tests.tiny_models import build, tokens

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"
NAME = "pt5_rank_one"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The guide's file, as a module that bem_peft does not know; PEFT forgets the method afterwards."""
    section = GUIDE.read_text(encoding="utf-8").split("## A new method, step by step")[1].split("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(code) == 1
    (tmp_path / f"{NAME}.py").write_text(code[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.import_module(NAME)
    method = found.RankOneConfig.method
    monkeypatch.setitem(methods.EVERY, NAME, found.RankOneConfig)
    yield found
    registry._own.remove(method)
    for table in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"):
        del getattr(peft.mapping, table)[method.upper()]
    del sys.modules[NAME]


CHECKS = [getattr(invariants, name) for name in dir(invariants) if re.match(r"i\d+_", name)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_method_of_the_guide_passes_the_contract(
    check: Any, dtype: torch.dtype, module: Any, tmp_path: Path
) -> None:
    check(NAME, "llama", dtype, *((tmp_path,) if check is invariants.i6_saved_and_loaded else ()))


def test_the_method_of_the_guide_is_named_in_two_files_beside_its_own(module: Any, tmp_path: Path) -> None:
    package = Path(bem_peft.__file__).parent
    # what names PT3, whose maths is as simple, and has no form of its own there
    named = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if re.search(r"Kronecker(Config|Adapter|Model)", file.read_text(encoding="utf-8"))
    }
    allowed = {"__init__.py", "tuners/methods.py", "tuners/pt3_kronecker.py"}
    examples = {"tuners/composite.py", "budget/check.py", "tuners/cpp_proof.py"}  # default, docstring, cases
    assert named <= allowed | examples, named - allowed
    assert module.RankOneModel not in package_methods.METHODS


def test_the_method_of_the_guide_is_saved_and_loaded_by_peft(module: Any, tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), module.RankOneConfig(spread=2.0, init_weights=False)).eval()
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        found = PeftModel.from_pretrained(build("llama"), tmp_path).eval()(input_ids=tokens()).logits
    assert torch.equal(found, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"`spread` = 0"):
        module.RankOneConfig(spread=0)
