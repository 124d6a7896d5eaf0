"""What bem_peft takes from peft and transformers: all there, named when it is not, and known to one module."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.integrations import peft as integration

from bem_peft import KroneckerConfig, upstream
from bem_peft.evaluation.profiler import PerformanceProfiler, Workload
from bem_peft.tuners.base import registry
from tests.contract.invariants import logits
from tests.contract.methods import CONFIGS, METHODS, adapted, randomize
from tests.tiny_models import build, llama, tokens

PACKAGE = Path(upstream.__file__).parent


def test_the_installed_versions_have_all_that_is_needed() -> None:
    assert upstream.check_upstream() == []


def test_nothing_else_compares_versions() -> None:
    """`provenance` and the sites table write versions down; only `upstream` may act on one."""
    compares = re.compile(r"__version__\s*(<|>|==|!=)|Version\(|packaging|version_info|is_\w+_greater_or_equal")
    found = [f.name for f in PACKAGE.rglob("*.py") if compares.search(f.read_text(encoding="utf-8"))]
    assert found == ["upstream.py"]


@pytest.mark.parametrize(
    ("package", "module", "old"), [("peft", peft, "0.17.1"), ("transformers", transformers, "4.55.4")]
)
def test_a_version_that_is_too_old_is_refused_with_the_remedy(
    package: str, module: Any, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "__version__", old)
    with pytest.raises(ImportError, match=rf"needs {package} >= .*found {old}.*pip install -U"):
        registry.extend_peft_type("BEM_NEW")


@pytest.mark.parametrize("version", ["5.0.0.dev0", "4.56.0rc1", "6.1"])
def test_development_versions_count_as_what_they_lead_to(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    upstream.require_supported()


# a future version that renames one more thing


@dataclass
class FutureOutput(dict):  # type: ignore[type-arg]
    """As an output of a transformers that calls the cache something new."""

    logits: Any = None
    memory: Any = None


class FutureModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = build("llama")
        self.config = self.inner.config  # type: ignore[assignment]

    def forward(self, input_ids: torch.Tensor, memory: Any = None, use_cache: bool = False) -> FutureOutput:
        return FutureOutput(logits=self.inner(input_ids=input_ids).logits, memory=object())


def test_a_cache_by_another_name_is_told_by_the_one_module() -> None:
    with pytest.raises(upstream.UpstreamError, match=r"FutureModel knows none of \('cache', 'past_key_values'\)"):
        upstream.cache_argument(FutureModel())
    with pytest.raises(upstream.UpstreamError, match=r"FutureOutput knows none of .*upstream\.py.*docs/upgrading\.md"):
        upstream.cache_of(FutureOutput())
    tool = PerformanceProfiler(FutureModel(), FutureModel(), {"x": FutureModel()}, rounds=5, warm_up=0)
    with pytest.raises(upstream.UpstreamError, match=r"CACHE_NAMES in bem_peft/upstream\.py"):
        tool.profile([Workload("decode", 1, 4)])


def test_one_line_is_enough_for_the_new_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CACHE_NAMES", ("memory", *upstream.CACHE_NAMES))
    assert upstream.cache_argument(FutureModel()) == "memory"
    assert upstream.cache_of(FutureOutput(memory=3)) == 3
    assert upstream.cache_argument(adapted("film", "llama")) in ("cache", "past_key_values")


def test_a_renamed_argument_or_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def inject_adapter(self: Any, model: Any, name: str, **options: int) -> None: ...

    def _replace_module(parent: Any, child_name: str, replacement: Any, child: Any) -> None: ...

    monkeypatch.setattr(BaseTuner, "_replace_module", _replace_module)
    monkeypatch.setattr(BaseTuner, "inject_adapter", inject_adapter)  # takes anything by name: nothing to tell
    monkeypatch.delattr("transformers.trainer.DEFAULT_CALLBACKS")
    problems = upstream.check_upstream()
    assert len(problems) == 2
    assert problems[0] == "peft.tuners.tuners_utils:BaseTuner._replace_module takes no new_module"
    assert "transformers.trainer:DEFAULT_CALLBACKS" in problems[1]


def test_a_future_output_is_among_what_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CausalLMOutputWithPast", FutureOutput)
    assert any("CACHE_NAMES" in problem for problem in upstream.check_upstream())


# transformers' own add_adapter and load_adapter


def test_what_transformers_refuses_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As transformers 5.24, which asks for a peft that is not released; every method meets it, LoRA too."""
    for name in ("add_adapter", "load_adapter"):  # so that what is wrapped here is undone after the test
        monkeypatch.setattr(integration.PeftAdapterMixin, name, getattr(integration.PeftAdapterMixin, name))
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "99.0", raising=False)
    upstream.explain_refused_adapters()
    for config in (LoraConfig(task_type="CAUSAL_LM"), KroneckerConfig(task_type="CAUSAL_LM")):
        with pytest.raises(ValueError, match=r"asks for peft >= 99\.0.*get_peft_model\(model, config\)"):
            llama().add_adapter(config)
    with pytest.raises(upstream.RefusedByTransformersError, match=r"PeftModel\.from_pretrained\(model, folder\)"):
        llama().load_adapter(tmp_path)
    assert isinstance(get_peft_model(llama(), CONFIGS["kronecker"](task_type="CAUSAL_LM")), PeftModel)


# saving: the same file from every version of peft


@pytest.mark.parametrize("method", METHODS)
def test_a_file_holds_one_adapter_whatever_else_the_model_has(method: str, tmp_path: Path) -> None:
    alone = adapted(method, "llama")
    alone.save_pretrained(tmp_path / "alone")
    both = PeftModel.from_pretrained(build("llama"), tmp_path / "alone")
    both.add_adapter("second", CONFIGS[method](task_type="CAUSAL_LM"))
    both.save_pretrained(tmp_path / "both")
    from safetensors.torch import load_file

    expected = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    found = load_file(tmp_path / "both" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    second = load_file(tmp_path / "both" / "second" / "adapter_model.safetensors")
    assert second.keys() == expected.keys()
    randomize(both, seed=5)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "both").eval()
    assert torch.equal(logits(loaded, input_ids=tokens()), logits(alone.eval(), input_ids=tokens()))
