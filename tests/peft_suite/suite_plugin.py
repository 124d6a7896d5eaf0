"""pytest plugin that runs PEFT's tests with the configs of bem_peft.

PEFT's test files stay as they are. The plugin replaces the values of their `parametrize` marks, leaves out what
left_out.py names, and lifts what the suite states by class because it cannot know ours:

* merging: a config that does not merge must refuse and leave the model as it was, then the test is skipped;
* Conv1D: the suite lists the methods that support it; ours do;
* mixed batches: the suite lists the methods that support them; ours take the place of the listed class;
* merging without a bias: meant for BEFT, but PEFT 0.21 skips all methods (`isinstance` of a class); ours are run;
* `hub_online_once` goes online; here everything is a local folder.
"""

from __future__ import annotations

import gc
import importlib
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial, partialmethod
from typing import Any

import pytest
import torch
import transformers
from cases import CLASSES, STAND_INS, SUITE, cases_for, is_mergeable
from left_out import expected_skip, reason_left_out
from torch import nn

# test -> names in its module and in testing_common that the suite compares the config class with
ADMITTED = {
    "test_mixed_adapter_batches": ("LoraConfig", "RoadConfig"),
    "test_generate_with_mixed_adapter_batches": ("LoraConfig",),
}
SUMMARY = pytest.StashKey["Summary"]()


def pytest_configure(config: pytest.Config) -> None:
    """Load the suite's shared modules and exchange the four helpers before the test files import them."""
    if importlib.util.find_spec("diffusers") is None:  # used for an isinstance check only
        diffusers = types.ModuleType("diffusers")
        diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = diffusers
    utils = importlib.import_module(f"{SUITE}.testing_utils")
    utils.hub_online_once = _stay_offline  # type: ignore[attr-defined]
    common = importlib.import_module(f"{SUITE}.testing_common")
    common._skip_if_merging_not_supported = partial(  # type: ignore[attr-defined]
        _check_refusal_and_skip, common._skip_if_merging_not_supported
    )
    common._skip_if_conv1d_not_supported = lambda *args: None  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    config.stash[SUMMARY] = Summary()
    if not hasattr(config, "workerinput"):  # set in the workers of xdist
        config.pluginmanager.register(config.stash[SUMMARY])


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported is not looked through at every collection


@contextmanager
def _stay_offline(model_id: str) -> Iterator[None]:
    yield


# the cases


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the values of the marks that choose a method."""
    module, test = _names(metafunc.definition)
    if reason_left_out(module, test) is not None:
        return
    marks = []
    for mark in metafunc.definition.own_markers:
        if mark.name == "parametrize":
            arguments = tuple(name.strip() for name in mark.args[0].split(","))
            owner = "" if metafunc.cls is None else metafunc.cls.__name__
            cases = cases_for(module, owner, test, arguments)
            if cases is not None:
                mark = pytest.mark.parametrize(mark.args[0], cases).mark
        marks.append(mark)
    metafunc.definition.own_markers[:] = marks
    stand_ins = STAND_INS.get(f"{module}::{test}")
    if stand_ins is not None:
        metafunc.parametrize("stand_in", stand_ins, indirect=True)


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LoraConfig` in the test's module is a config of ours, and what it says of `lora_A` holds for our parameters."""
    if not hasattr(request, "param"):
        return
    monkeypatch.setattr(request.module, "LoraConfig", request.param)
    if hasattr(request.module, "PeftType"):
        monkeypatch.setattr(request.module, "PeftType", [request.param().peft_type])
    check = getattr(request.cls, "check_requires_grad", None)
    if check is not None:
        monkeypatch.setattr(request.cls, "check_requires_grad", partialmethod(_check_requires_grad, check))


def _check_requires_grad(test: object, check: Any, model: nn.Module, *expected: str) -> None:
    names: set[str] = set()
    for name in expected:
        layer, found, rest = name.partition(".lora_")
        if not found:
            names.add(name)
            continue
        adapter = rest.split(".")[1]
        ours = [n for n, _ in model.named_parameters() if n.startswith(f"{layer}.bem_") and f".{adapter}." in n]
        assert ours, f"{layer} has no adapter {adapter}"
        names.update(ours)
    check(test, model, *names)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, dropped, unknown = [], [], set()
    for item in items:
        module, test = _names(item)
        reason = reason_left_out(module, test)
        if reason is not None:
            config.stash[SUMMARY].left_out[f"{module}::{test}"] = reason
            dropped.append(item)
        elif _method(item) is None:
            unknown.add(f"{module}::{test}")
        else:
            item.user_properties.append(("method", _method(item)))
            kept.append(item)
    if unknown:
        raise pytest.UsageError(f"neither run with a config of ours nor named in left_out.py: {sorted(unknown)}")
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def _names(node: pytest.Item | Any) -> tuple[str, str]:
    """(file without .py, test without parameters)."""
    return node.path.stem, getattr(node, "originalname", None) or node.name


def _method(item: pytest.Item) -> str | None:
    """The method that an item tests."""
    parameters = getattr(item, "callspec", None)
    for name in ("config_cls", "config_class", "config0", "config", "stand_in"):
        value = None if parameters is None else parameters.params.get(name)
        while isinstance(value, partial):
            value = value.func
        for config_class in CLASSES:
            if value is config_class or type(value) is config_class:
                return str(config_class.method)
    return None


# what the suite states by class


@pytest.fixture(autouse=True)
def _admit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let our class stand for the one that a test of mixed batches compares with; the same seed for every test."""
    torch.manual_seed(0)
    if hasattr(request.module, "check_beft_config"):
        monkeypatch.setattr(request.module, "check_beft_config", lambda *args: None)
    names = ADMITTED.get(_names(request.node)[1], ())
    if names:
        config_class = request.node.callspec.params["config_cls"]
        for module in (request.module, sys.modules[f"{SUITE}.testing_common"]):
            for name in names:
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, config_class)


def _check_refusal_and_skip(original: Any, model_id: str, config_class: type, fields: dict[str, Any]) -> None:
    """In the place of `_skip_if_merging_not_supported`."""
    if config_class not in CLASSES:
        original(model_id, config_class, fields)
        return
    if is_mergeable(config_class, fields):
        return
    _check_refusal(model_id, config_class, _Fields(fields))
    pytest.skip(f"{config_class.method} refuses to merge with these fields (checked)")


class _Fields(dict[str, Any]):
    """Fields of a config, hashable by what they print."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(self))


@cache
def _check_refusal(model_id: str, config_class: type, fields: _Fields) -> None:
    """Every way to merge raises ValueError or NotImplementedError, and leaves the model as it was."""
    from peft import get_peft_model

    config = config_class(**fields)
    model = get_peft_model(_load(model_id), config)
    modules = [(name, id(module)) for name, module in model.named_modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload, partial(model.merge_adapter, safe_merge=True)):
        with pytest.raises((ValueError, NotImplementedError)):
            merge()
        assert modules == [(name, id(module)) for name, module in model.named_modules()], "half unloaded"
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()), "half merged"


def _load(model_id: str) -> nn.Module:
    """The model that the suite means: a folder, a custom model, or (where it passes a test's name) its MLP."""
    custom = sys.modules.get(f"{SUITE}.test_custom_models")
    if "/" in model_id:
        config = transformers.AutoConfig.from_pretrained(model_id)
        return getattr(transformers, config.architectures[0]).from_pretrained(model_id)  # type: ignore[no-any-return]
    assert custom is not None
    return custom.MockTransformerWrapper.from_pretrained("MLP")  # type: ignore[no-any-return]


# the summary


class Summary:
    """Counts outcomes in the process that reports them (with xdist: the controller)."""

    def __init__(self) -> None:
        self.counts = Counter[tuple[str, str, str]]()
        self.left_out: dict[str, str] = {}
        self.skips = Counter[str]()
        self.unexplained = Counter[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        module = report.nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py")
        method = str(dict(report.user_properties)["method"])
        if report.failed:
            self.counts[module, method, "failed"] += 1
        elif report.skipped:
            self.counts[module, method, "skipped"] += 1
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reason = expected_skip(text)
            if reason is None:
                self.unexplained[f"{report.nodeid.partition('[')[0]}: {text}"] += 1
            else:
                self.skips[reason] += 1
        elif report.when == "call":
            self.counts[module, method, "passed"] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A skip that left_out.py does not explain fails the run."""
        if self.unexplained and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        write = terminalreporter.write_line
        terminalreporter.section("PEFT's test suite with the methods of bem_peft")
        write(f"{'file':34}{'method':20}{'passed':>8}{'failed':>8}{'skipped':>8}")
        rows = sorted({(module, method) for module, method, _ in self.counts})
        for module, method in [*rows, ("all", "")]:
            keys = rows if module == "all" else [(module, method)]
            numbers = [sum(self.counts[m, k, what] for m, k in keys) for what in ("passed", "failed", "skipped")]
            write(f"{module:34}{method:20}" + "".join(f"{number:8}" for number in numbers))
        for reason, count in self.skips.most_common():
            write(f"skipped {count:5}  {reason}")
        for reason, count in Counter(self.left_out.values()).most_common():
            write(f"left out {count:4}  test functions: {reason}")
        for skip, count in self.unexplained.most_common():
            write(f"UNEXPLAINED SKIP {count} x {skip}", red=True)
