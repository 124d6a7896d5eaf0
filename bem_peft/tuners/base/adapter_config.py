"""The config fields that the methods share, and the section on loading that a saved adapter's card gets."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import PeftType

from bem_peft import field_checks as check
from bem_peft._version import __version__
from bem_peft.sites.find import ATTENTION_OUTPUT, MLP_DOWN
from bem_peft.tuners.base.field_help import unknown_field
from bem_peft.tuners.base.registry import extend_peft_type

MODEL_CARD_HEADING = "## Loading this adapter"
MODEL_CARD_END = "<!-- end of the section written by bem_peft -->"
AUTO_CLASSES = {  # by task type
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
FRONT_MATTER = re.compile(r"\ufeff?---\r?\n.*?\r?\n---\r?\n+", re.S)
TAGS_OF_PEFT = re.compile(r"^tags:\n(?=(?:- .*\n)*?- '?base_model:adapter:)", re.M)


@dataclass
class AdapterConfig(PeftConfig):
    """Fields that every method has. The method's own config adds its sizes."""

    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (suffixes) of the modules to adapt, or a regular expression. None: W_O and W_down are found "
            "from the model's structure; `bem-peft sites MODEL` prints them."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names (suffixes) or a regular expression of modules to leave out."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save with the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt; None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the block list, where `layers_to_transform` cannot tell it."}
    )
    rank_pattern: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Sizes that differ from the defaults, by module name or regular expression: an int for the "
            "method's rank, or a mapping from field to value. A key that fits no adapted module is an error."
        },
    )
    sites: list[str] | None = field(
        default=None,
        metadata={
            "help": "Which of the method's sites to adapt: 'attention_output' (W_O), 'mlp_down' (W_down). Beside "
            "`target_modules`: what all of these must be."
        },
    )
    fused_experts: str = field(
        default="adapt",
        metadata={
            "help": "What to do where W_down of all experts is one parameter that no module owns: 'adapt', adapters at "
            "the tokens that reach an expert (see `expert_sharing`); 'skip', adapt the other sites; 'error'."
        },
    )
    expert_sharing: str = field(
        default="shared",
        metadata={
            "help": "At fused experts: 'shared', one adapter for all experts of a block; 'each', one for each expert, "
            "(experts, ...) in every parameter; 'factors', what reads is shared and what writes (B; PT4's gamma and "
            "beta) is each expert's own."
        },
    )
    scaling: float = field(default=2.0, metadata={"help": "The factor s of the update; not divided by the rank."})
    budget: str | None = field(
        default=None,
        metadata={
            "help": "An adapter in one line, 'lora:r=8': once the model is known, the method's sizes are chosen so "
            "that it costs as much at the same sites, within 5 % of parameters and FLOPs."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: the fresh adapter is the identity. False: random output weights, for tests."},
    )

    method: ClassVar[str] = ""  # lower-case name of the PEFT type
    aliases: ClassVar[tuple[str, ...]] = ()  # further names of the method where one is written
    # fields of LoRA -> what is here in their place
    neighbours: ClassVar[Mapping[str, str]] = {
        "lora_alpha": "`scaling`, which is not divided by the rank: LoRA's is lora_alpha / r",
        "alpha": "`scaling`, which is not divided by the rank: LoRA's is lora_alpha / r",
        "lora_dropout": "`dropout`",
        "alpha_pattern": "no option: `scaling` is the same at every site",
        "use_rslora": "`scaling`, which is not divided by anything",
        "init_lora_weights": "`init_weights`",
        "bias": "no option: biases stay frozen",
    }
    roles: ClassVar[tuple[str, ...]] = (ATTENTION_OUTPUT, MLP_DOWN)
    rank_fields: ClassVar[tuple[str, ...]] = ()  # sizes that `rank_pattern` may set; an int sets the first

    def __new__(cls, *values: Any, **given: Any) -> Any:
        """Raises TypeError for a field that there is not, with the one that may be meant."""
        known = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set(given)
        for name in given:
            if name not in known:
                raise unknown_field(cls, name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.found_modules: frozenset[str] | None = None  # `target_modules` of the last model, where none are named
        # PEFT saves a config with `inference_mode`; adapters that exist load with fields that are refused in new ones
        self.is_from_file = bool(self.inference_mode)
        given = self.__dict__["peft_type"]
        self.peft_type = extend_peft_type(self.method.upper())
        # PEFT's own configs write over whatever is given; the name of another method is a mistake
        if given is not None and given != self.peft_type and given in list(PeftType):
            raise check.field_error("peft_type", given, f"is {self.method.upper()!r} here", "leave it out")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
            elif value is not None and not isinstance(value, (set, str)):
                raise TypeError(f"`{name}` = {value!r}: must be a list of names, a regular expression or None.")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise check.field_error(
                "layers_pattern", self.layers_pattern, "needs `layers_to_transform`", "set both or neither"
            )
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise check.field_error(
                        name, getattr(self, name), "cannot be used when `target_modules` is a str", "pass a list"
                    )
        check.check_choice(self, "fused_experts", ("adapt", "skip", "error"))
        check.check_choice(self, "expert_sharing", ("shared", "each", "factors"))
        check.check_number(self, "scaling", 0.0, exclusive=True)
        check.check_bool(self, "init_weights")
        if not isinstance(self.budget, (str, type(None))):
            raise TypeError(f"`budget` = {self.budget!r}: must be an adapter in one line, as 'lora:r=8', or None.")
        self._check_layers()
        self._check_sites()
        self._check_rank_pattern()
        self._check_inert()

    def inert_fields(self) -> dict[str, str]:
        """Fields that have no effect beside the values of the others -> why. Set to a value of one's own they raise."""
        return {}

    def _check_inert(self) -> None:
        if self.is_from_file:
            return
        for name, why in self.inert_fields().items():
            default = default_of(self, name)
            if getattr(self, name) != default:
                raise check.field_error(name, getattr(self, name), why, f"leave it at {default!r}")

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        indices = [layers] if isinstance(layers, int) else layers
        if indices is None:
            return
        if not isinstance(indices, list) or not indices:
            raise TypeError(f"`layers_to_transform` = {layers!r}: must be an int or a non-empty list of ints.")
        for index in indices:
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                raise check.field_error("layers_to_transform", layers, "must hold block indices of at least 0")

    def _check_sites(self) -> None:
        if self.sites is None:
            return
        if not isinstance(self.sites, list) or not self.sites or not set(self.sites) <= set(self.roles):
            raise check.field_error("sites", self.sites, f"must be a non-empty list out of {list(self.roles)}")

    def _check_rank_pattern(self) -> None:
        if not isinstance(self.rank_pattern, dict):
            raise TypeError(f"`rank_pattern` = {self.rank_pattern!r}: must map module names to sizes.")
        for key in self.rank_pattern:
            self.at(key, exact=True)

    def at(self, module_name: str, exact: bool = False) -> AdapterConfig:
        """This config with the sizes that `rank_pattern` gives to `module_name` (`exact`: a key of it)."""
        if not self.rank_pattern:
            return self
        key = module_name if exact else get_pattern_key(list(self.rank_pattern), module_name)
        if key not in self.rank_pattern:
            return self
        sizes = self.pattern_sizes(self.rank_pattern[key])
        unknown = set(sizes) - set(self.rank_fields)
        if unknown:
            raise check.field_error(
                "rank_pattern", {key: sizes}, f"may set {', '.join(self.rank_fields)}", f"remove {sorted(unknown)}"
            )
        if exact and not self.is_from_file:
            return dataclasses.replace(self, rank_pattern={}, **self.implied(sizes))
        return self._resized({**sizes, "rank_pattern": {}})

    def pattern_sizes(self, sizes: int | dict[str, Any]) -> dict[str, Any]:
        """A value of `rank_pattern` as field -> value."""
        return sizes if isinstance(sizes, dict) else {self.rank_fields[0]: sizes}

    def implied(self, sizes: dict[str, Any]) -> dict[str, Any]:
        """`sizes`, and the fields that giving them sets aside."""
        return sizes

    def _resized(self, changes: dict[str, Any]) -> AdapterConfig:
        """As `dataclasses.replace`, for a config whose other fields have been accepted: they may be without effect."""
        changes = {**changes, "inference_mode": True, "budget": None}
        changed = dataclasses.replace(self, **changes)
        changed.inference_mode, changed.is_from_file = self.inference_mode, self.is_from_file
        changed.found_modules = self.found_modules
        return changed

    def with_sizes(self, **sizes: int) -> AdapterConfig:
        """This config with other values of `size_fields`; sizes that follow them keep their ratio."""
        return self._resized({**sizes})

    def further_sizes(self, widths: Sequence[Sequence[int]]) -> dict[str, list[int]]:
        """Field -> values that a budget search tries where `size_fields` alone do not meet the anchor.

        Args:
            widths: input widths of the sites, a list for each method of a composite.
        """
        return {}

    # what is checked once all adapters of a model are planned

    def check_experts(self, name: str) -> None:
        """Raise ValueError where this method cannot stand at W_down of the fused experts `name`."""
        if MLP_DOWN not in self.roles:
            raise check.field_error("target_modules", name, f"holds experts, and {type(self).__name__} reads heads")

    @property
    def limits_size(self) -> bool:
        """Whether `check_size` is asked, for which the base is counted."""
        return False

    def check_size(self, planned: int, base: int) -> None:
        """Raise ValueError where `planned` parameters are too many beside the `base`'s."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the config; if the folder has a model card, add how to load the adapter to it."""
        super().save_pretrained(save_directory, **kwargs)
        add_loading_section(save_directory, self)


@dataclass
class LowRankConfig(AdapterConfig):
    """Fields of the methods whose update is additive, B K: see `low_rank`."""

    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input, in [0, 1)."})
    max_singular_value: float | None = field(default=None, metadata={"help": "Cap on sigma_1 of each update."})
    fro_budget: float | None = field(default=None, metadata={"help": "Cap on the Frobenius norm of each update."})

    def __post_init__(self) -> None:
        check.check_share(self, "dropout")
        check.check_optional_number(self, "max_singular_value", 0.0, exclusive=True)
        check.check_optional_number(self, "fro_budget", 0.0, exclusive=True)
        super().__post_init__()


def default_of(config: AdapterConfig, name: str) -> Any:
    """The default of a config's field."""
    field_ = next(f for f in dataclasses.fields(config) if f.name == name)
    return field_.default if field_.default_factory is dataclasses.MISSING else field_.default_factory()


def add_loading_section(folder: str, config: AdapterConfig) -> None:
    """Write how to load the adapter into its folder's model card, before all else; no card, nothing to do.

    The Hub's blank template, where PEFT began the card with it and nobody has written into it, goes away.
    """
    from pathlib import Path

    card = Path(folder) / "README.md"
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if MODEL_CARD_HEADING in text:  # of an earlier save to this folder
        before, _, after = text.partition(MODEL_CARD_HEADING)
        text = before + after.partition(MODEL_CARD_END)[2].lstrip("\n")
    metadata = FRONT_MATTER.match(text)
    head, rest = ("", text) if metadata is None else (metadata.group(), text[metadata.end() :])
    tags = [tag for tag in ("bem_peft", config.method.lower()) if f"- {tag}\n" not in head]
    head = TAGS_OF_PEFT.sub(lambda found: found.group() + "".join(f"- {tag}\n" for tag in tags), head)
    base = config.base_model_name_or_path or "the base model it was trained on"
    task = getattr(config.task_type, "value", config.task_type)
    auto_class = AUTO_CLASSES.get(str(task), "AutoModelForCausalLM")
    labels = ", num_labels=NUMBER" if task in ("SEQ_CLS", "TOKEN_CLS") else ""
    section = (
        f"{MODEL_CARD_HEADING}\n\n"
        f"The adapter is of type `{config.method.upper()}`, on top of `{base}`. PEFT knows this type once the package "
        "`bem_peft` is imported; without it, loading ends in `KeyError: "
        f"'{config.method.upper()}'`.\n\n"
        f'```bash\npip install "bem_peft>={__version__}"\n```\n\n'
        "```python\n"
        "import bem_peft  # registers the adapter type with PEFT\n"
        "from peft import PeftModel\n"
        f"from transformers import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("{base}"{labels})\n'
        'model = PeftModel.from_pretrained(model, "PATH_OR_ID_OF_THIS_ADAPTER")\n'
        f"```\n\n{MODEL_CARD_END}\n"
    )
    card.write_text(f"{head}{section}\n{rest.lstrip().removeprefix(_blank_card()).lstrip()}", encoding="utf-8")


@functools.cache
def _blank_card() -> str:
    from huggingface_hub import ModelCard, ModelCardData

    return "\n".join(ModelCard.from_template(ModelCardData()).text.splitlines()).strip()
