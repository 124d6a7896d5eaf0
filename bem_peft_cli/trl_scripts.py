"""bem-peft trl: a training script of TRL with a config of --adapter in place of its LoraConfig."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig

SCRIPTS = ("sft", "dpo", "grpo", "rloo", "kto", "reward")
TASKS = {"reward": "SEQ_CLS"}  # of the model that a script trains, where that is no CAUSAL_LM
ASKED = "get_peft_config"  # where a script of TRL gets its config
_GIVES_A_LORA = ("use_peft", "use_rslora", "use_dora")
_NOT_GIVEN = object()


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `trl`."""
    command = commands.add_parser(
        "trl", help="train with a script of TRL", allow_abbrev=False,
        usage="bem-peft trl {sft,dpo,grpo,rloo,kto,reward} --adapter SPEC [an argument of the script ...]",
        epilog="Every other argument goes to the script as it is, --config FILE too; `trl sft --help` lists them.",
    )  # fmt: skip
    command.add_argument("script", choices=SCRIPTS, metavar="{sft,dpo,grpo,rloo,kto,reward}", help="script of TRL")
    command.add_argument(
        "--adapter", required=True, metavar="SPEC",
        help="METHOD:field=value,... (kronecker:u_rank=8) or the folder of an adapter, whose config is taken",
    )  # fmt: skip
    command.set_defaults(run=_trl, takes_more=True)


def _trl(arguments: argparse.Namespace) -> int:
    from bem_peft.tuners.adapter_spec import parse_adapter

    config = parse_adapter(arguments.adapter)
    config.inference_mode = False  # a saved config says True
    config.task_type = config.task_type or TASKS.get(arguments.script, "CAUSAL_LM")
    script = _script(arguments.script)
    sections = parsed_sections(script, arguments.script, arguments.more)
    _say_of_the_default_rate(sections)
    with config_in_place(script, config):
        script.main(*sections)
    return 0


def _script(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"trl.scripts.{name}")
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ValueError("`bem-peft trl` needs the package trl: pip install trl") from None


def of_lora(name: str) -> bool:
    """Whether a field of TRL's ModelConfig tells of a LoRA."""
    return name.startswith("lora_") or name in _GIVES_A_LORA


def parsed_sections(script: ModuleType, name: str, given: list[str]) -> list[Any]:
    """What the script's own parser makes of the command line and of --config.

    Raises:
        ValueError: an argument that the script has not, or one of LoRA, which would do nothing.
    """
    parser = script.make_parser()
    parser.prog = f"bem-peft trl {name}"
    for action in parser._actions:
        if of_lora(action.dest):
            action.default = _NOT_GIVEN
    *sections, unknown = parser.parse_args_and_config(given, return_remaining_strings=True)
    if unknown:
        raise ValueError(
            f"{' '.join(unknown)}: TRL's {name} has no such argument (of the command line or of --config)."
        )
    for section in sections:
        for field in dataclasses.fields(section):
            if of_lora(field.name):
                if getattr(section, field.name) is not _NOT_GIVEN:
                    raise ValueError(f"--{field.name} tells of a LoRA and would do nothing: --adapter is the config.")
                setattr(section, field.name, field.default)
    return sections


def _say_of_the_default_rate(sections: list[Any]) -> None:
    for section in sections:
        for field in dataclasses.fields(section):
            if field.name == "learning_rate" and section.learning_rate == field.default:
                print(
                    f"bem-peft trl: learning_rate is {field.default:g}, TRL's default, far below the 8e-3 that was "
                    "best for these methods in supervised training: see docs/learning_rates.md",
                    file=sys.stderr, flush=True,
                )  # fmt: skip


@contextlib.contextmanager
def config_in_place(script: ModuleType, config: PeftConfig) -> Iterator[None]:
    """While it is open, the script gets `config` where it asks for its PEFT config.

    Raises:
        ValueError: the script of this TRL does not ask, and would train the whole model.
    """
    import trl

    if ASKED not in script.main.__code__.co_names:
        raise ValueError(f"{script.__name__} of trl {trl.__version__} does not call {ASKED}: no config can be given.")
    holder = script if hasattr(script, ASKED) else trl  # the scripts import it from trl when they run
    before = getattr(holder, ASKED)
    setattr(holder, ASKED, lambda model_args: config)
    try:
        yield
    finally:
        setattr(holder, ASKED, before)
