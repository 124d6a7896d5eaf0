"""bem_peft/integrations against the packages that they are written for: the installed one, else a stand-in made of its
recorded interface (`record.py`), which says the version."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from bem_peft.tuners.adapter_spec import AdapterSpecError, own_method_names
from tests.integrations import record
from tests.tiny_models import llama

PLUGINS = {"axolotl": "bem_peft.integrations.axolotl", "swift": "bem_peft.integrations.ms_swift"}
# what other packages say when they are imported
pytestmark = pytest.mark.filterwarnings("ignore", "error:::bem_peft")


def recorded(package: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / f"{package}.json").read_text(encoding="utf-8"))


def stand_in(interface: dict[str, Any]) -> dict[str, ModuleType]:
    """Modules with the recorded classes; their methods return nothing."""
    modules: dict[str, ModuleType] = {}

    def put(place: str, made: type) -> None:
        module, _, name = place.partition(":")
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        setattr(modules[module], name, made)

    for place, methods in interface["methods"].items():
        members: dict[str, Any] = {}
        for name, told in methods.items():
            texts = [entry[0] if len(entry) == 1 else f"{entry[0]}={entry[1]!r}" for entry in told["parameters"]]
            scope: dict[str, Any] = {}
            exec(f"def {name}({', '.join(texts)}): pass", scope)
            members[name] = staticmethod(scope[name]) if told["kind"] == "staticmethod" else scope[name]
        put(place, type(place.partition(":")[2], (), members))
    for place, fields in interface["dataclasses"].items():
        made = [
            (name, Any, dataclasses.field(default_factory=lambda value=default[0]: value)) if default else (name, Any)
            for name, default in fields.items()
        ]
        put(place, dataclasses.make_dataclass(place.partition(":")[2], made))
    return modules


@pytest.fixture(params=PLUGINS)
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The package, importable; each test in which it stands imports its plugin anew."""
    name: str = request.param
    if importlib.util.find_spec(name) is None:
        for module, made in stand_in(recorded(name)).items():
            monkeypatch.setitem(sys.modules, module, made)
        if name == "swift":
            sys.modules["swift.tuner_plugin"].tuners_map = {}
    monkeypatch.delitem(sys.modules, PLUGINS[name], raising=False)
    return name


only = {name: pytest.mark.parametrize("package", [name], indirect=True) for name in PLUGINS}


def plugin_of(package: str) -> Any:
    return importlib.import_module(PLUGINS[package])


def test_the_interface_is_the_recorded_one(package: str) -> None:
    """Of the installed package; of the stand-in, that it is what it stands for."""
    told, (_, classes, data) = recorded(package), record.TAKEN[package]
    for place in classes:
        for name, method in told["methods"][place].items():
            assert record.parameters(getattr(record.load(place), name)) == method["parameters"], (name, told["version"])
    for place in data:
        assert record.defaults(record.load(place)) == told["dataclasses"][place], told["version"]


def test_a_method_of_the_plugin_takes_what_the_package_gives_it(package: str) -> None:
    plugin, told = plugin_of(package), recorded(package)
    ours = plugin.BemPlugin if package == "axolotl" else plugin.BemTuner
    ((_, methods),) = told["methods"].items()
    overridden = [name for name in methods if name in vars(ours)]
    assert len(overridden) > 1
    for name in overridden:
        takes = record.parameters(getattr(ours, name))
        assert takes == methods[name]["parameters"], name
    assert told["version"] in plugin.__doc__


class Answers(dict[str, Any]):
    """As Axolotl's DictDefault: None where a key is missing, mappings within are such mappings too."""

    def __getattr__(self, name: str) -> Any:
        value = self.get(name)
        return Answers(value) if isinstance(value, dict) else value


# what Axolotl's schema sets by itself
SET = {"lora_dropout": 0.0, "loraplus_lr_embedding": 1e-6, "relora_prune_method": "magnitude", "load_in_4bit": False}


def axolotl_config(adapter: str, **keys: Any) -> Answers:
    return Answers({"adapter": adapter, **SET, **keys})


@only["axolotl"]
def test_axolotl_gets_the_adapter_that_its_yaml_names(package: str) -> None:
    plugin = plugin_of(package).BemPlugin()
    assert [capability.name for capability in plugin.get_adapter_capabilities()] == list(own_method_names())
    assert not any(capability.lora_like for capability in plugin.get_adapter_capabilities())
    cfg = axolotl_config("kronecker", bem_peft={"u_rank": 3, "v_rank": 2, "target_modules": ["down_proj"]})
    model, config = plugin.load_adapter(llama(), cfg)
    assert isinstance(model, PeftModel)
    assert (config.u_rank, config.v_rank, config.task_type) == (3, 2, "CAUSAL_LM")
    assert {name.split(".")[-1] for name in model.base_model.targeted_module_names} == {"down_proj"}
    assert any(parameter.requires_grad for parameter in model.parameters())
    nothing, alone = plugin.load_adapter(llama(), cfg, config_only=True)
    assert nothing is None
    assert alone.u_rank == 3
    parts = [{"method": "head_gating", "rank_per_group": 2}, {"method": "kronecker", "u_rank": 2, "v_rank": 2}]
    _, both = plugin.load_adapter(llama(), axolotl_config("composite", bem_peft={"methods": parts}), config_only=True)
    assert [type(part).__name__ for part in both.methods] == ["HeadGroupGatingConfig", "KroneckerConfig"]
    assert plugin.load_adapter(llama(), axolotl_config("mora", lora_r=8)) is None


@only["axolotl"]
def test_axolotls_keys_are_those_of_the_plugin(package: str) -> None:
    module, _, name = plugin_of(package).BemPlugin().get_input_args().rpartition(".")
    keys = getattr(importlib.import_module(module), name)
    assert keys(bem_peft={"u_rank": 3}).model_dump() == {"bem_peft": {"u_rank": 3}}
    assert keys().bem_peft is None


@only["axolotl"]
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lora_r": 8}, "lora_r = 8: tells of a LoRA and would do nothing"),
        ({"lora_target_linear": True}, "lora_target_linear = True: tells of a LoRA"),
        ({"lora_dropout": 0.1}, "lora_dropout = 0.1: tells of a LoRA"),
        ({"peft_use_dora": True}, "peft_use_dora = True: tells of a LoRA"),
        ({"loraplus_lr_ratio": 16.0}, "loraplus_lr_ratio = 16.0: tells of a LoRA"),
        ({"bem_peft": {"u_rak": 4}}, "'u_rak': write field=value with a field of KroneckerConfig"),
        ({"bem_peft": {"u_rank": 0}}, "adapter: kronecker': "),
    ],
)
def test_axolotl_is_told_of_keys_that_would_do_nothing(package: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.split(" = ")[0]) as refused:
        plugin_of(package).BemPlugin().load_adapter(llama(), axolotl_config("kronecker", **keys))
    assert said in str(refused.value)


def changed(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights after they were set to random ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    return {name: weight.clone() for name, weight in get_peft_model_state_dict(model).items()}


@only["axolotl"]
@pytest.mark.parametrize("inference", [False, True])
def test_axolotl_loads_what_was_saved(package: str, inference: bool, tmp_path: Path) -> None:
    plugin = plugin_of(package).BemPlugin()
    model, _ = plugin.load_adapter(llama(), axolotl_config("film"))
    weights = changed(model)
    model.save_pretrained(tmp_path)
    loaded, config = plugin.load_adapter(llama(), axolotl_config("film", lora_model_dir=str(tmp_path)), inference)
    assert config.peft_type == "BEM_FILM"
    again = get_peft_model_state_dict(loaded)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert any(parameter.requires_grad for parameter in loaded.parameters()) is not inference


def swift_arguments(plugin: Any, **changes: Any) -> SimpleNamespace:
    """As after ms-swift's own `__post_init__`."""
    values = {field.name: record.defaults(plugin.TunerArguments)[field.name][0]
              for field in dataclasses.fields(plugin.TunerArguments)}  # fmt: skip
    return SimpleNamespace(**values | {"init_weights": True, "tuner_type": "pt3", "task_type": "causal_lm"} | changes)


@only["swift"]
def test_swift_has_the_tuner_that_a_file_registers(package: str, tmp_path: Path) -> None:
    plugin = plugin_of(package)
    plugin.register_tuner("pt3", "kronecker:u_rank=3,v_rank=2")
    plugin.register_tuner("pt4", "film")
    tuner = plugin.tuners_map["pt3"]
    assert issubclass(tuner, plugin.PeftTuner)
    model = tuner.prepare_model(swift_arguments(plugin), llama())
    assert isinstance(model, PeftModel)
    assert (model.active_peft_config.u_rank, model.active_peft_config.task_type) == (3, "CAUSAL_LM")
    film = plugin.tuners_map["pt4"].prepare_model(swift_arguments(plugin), llama())
    assert film.active_peft_config.peft_type == "BEM_FILM"
    weights = changed(model)
    tuner.save_pretrained(model, str(tmp_path / "own"))
    gathered = {name: torch.full_like(weight, 2.0) for name, weight in model.state_dict().items()}
    tuner.save_pretrained(model, str(tmp_path / "gathered"), state_dict=gathered)
    for name, of in (("own", weights), ("gathered", {key: torch.full_like(w, 2.0) for key, w in weights.items()})):
        again = get_peft_model_state_dict(PeftModel.from_pretrained(llama(), str(tmp_path / name)))
        assert again.keys() == of.keys()
        assert all(torch.equal(again[key], of[key]) for key in of)


@only["swift"]
@pytest.mark.parametrize(
    "given", [{"lora_rank": 4}, {"target_modules": ["q_proj"]}, {"use_dora": True}, {"init_weights": "pissa"}]
)
def test_swift_is_told_of_arguments_that_would_do_nothing(package: str, given: dict[str, Any]) -> None:
    plugin = plugin_of(package)
    plugin.register_tuner("pt3", "kronecker")
    with pytest.raises(
        ValueError, match=f"--{next(iter(given))} .*: would do nothing with --tuner_type pt3; remove it"
    ):
        plugin.tuners_map["pt3"].prepare_model(swift_arguments(plugin, **given), llama())
    with pytest.raises(AdapterSpecError, match="did you mean 'kronecker'"):
        plugin.register_tuner("pt5", "kroneker")
