"""Blocks of a model and what they hold: modules, projections, fused expert weights, the residual width d.

A block is an entry of an outermost nn.ModuleList of the text tower. Read from structure alone, on any device.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

Path = tuple[str, ...]

# Outside the blocks: beside a child of _TEXT every sibling is another modality; names of towers, heads, frozen helpers.
_TEXT = ("language_model", "text_model")
_NOT_TEXT = re.compile(
    r"vision|visual|image|img|video|audio|speech|acoustic|tokenizer|projector|resampler|qformer|patcher|codec|(^|_)heads?$"
)
# Inside a block: modules that belong to no mixer and no MLP (DBRX holds its attention in `norm_attn_norm`).
_SIDE_MODULE = re.compile(
    r"router|(^|_)gate$|adapter|lora_|altup|laurel|per_layer|ple$|hyper_connection|bottleneck|latent|(pre|post)_expert"
    r"|indexer|compressor|^parametrizations$|^modules_to_save$|^(?!norm_attn_norm$).*norm",
    re.IGNORECASE,
)
DOWN = re.compile(
    r"w?down(_proj)?|proj_down|(fc|lin|linear|layer|w|dense|ff)_?2|fc_out|c_proj|dense_4h_to_h|w_?o(ut)?"
    r"|(ffn_)?output(_linear)?",
    re.IGNORECASE,
)
_WIDTH = ("hidden_size", "d_model", "n_embd", "emb_dim", "dim")


@dataclass(frozen=True)
class Projection:
    """A leaf with in_features and out_features, or a PEFT layer around one."""

    path: Path  # relative to the block
    name: str  # its own name; its parent's where it is called `dense` or `linear` and is the parent's only projection
    holder: Path  # the module that holds it under this name
    in_features: int
    out_features: int


@dataclass
class Block:
    """One block; paths are relative to it."""

    path: Path
    index: int
    modules: dict[Path, nn.Module]  # without side modules and what lies below a projection
    projections: list[Projection]
    fused_experts: list[Path]
    width: int | None = None  # d

    def inside(self, unit: Path) -> Iterator[tuple[Path, nn.Module]]:
        """The modules at and below `unit`."""
        return ((path, module) for path, module in self.modules.items() if path[: len(unit)] == unit)


def read_blocks(model: nn.Module) -> list[Block]:
    """All blocks of `model` with a projection or fused experts, each module once, in module order."""
    blocks = [block for block in _walk(model, (), set()) if block.projections or block.fused_experts]
    _set_residual_widths(blocks, _width_hints(model))
    return blocks


def attribute(source: object, name: str) -> object:
    """`source.name`, None where it is missing or (heterogeneous configs raise RuntimeError) differs between layers."""
    try:
        return getattr(source, name, None)
    except RuntimeError:
        return None


def configs(modules: Iterable[nn.Module]) -> list[object]:
    """The configs that hang on `modules`, each followed by its text config where it has one."""
    found: list[object] = []
    for module in modules:
        config = getattr(module, "config", None)
        if config is not None:
            found.append(config)
            try:
                found.append(config.get_text_config())
            except (AttributeError, ValueError):  # no config of transformers, or one with several text configs
                continue
    return found


def base_module(module: nn.Module) -> nn.Module:
    """The module below any PEFT layers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def projection_features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a projection, None for any other module."""
    base = base_module(module)
    if next(base.children(), None) is not None and not isinstance(base, nn.Linear):
        return None
    weight = getattr(base, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.dim() > 2:  # of all experts: Aria's until transformers 5.22
        return None
    for names in (("in_features", "out_features"), ("nx", "nf"), ("infeatures", "outfeatures")):
        first, second = (getattr(base, name, None) for name in names)
        if isinstance(first, int) and isinstance(second, int):
            return first, second
    return None


def _may_be_text(name: str, child: nn.Module) -> bool:
    """False for towers of other modalities, by transformers' `input_modalities` or by name."""
    return name in _TEXT or ("text" in getattr(child, "input_modalities", "text") and not _NOT_TEXT.search(name))


def _walk(module: nn.Module, path: Path, seen: set[int]) -> Iterator[Block]:
    children = dict(module.named_children())
    for name in [name for name in children if name in _TEXT] or children:
        child = children[name]
        if id(child) in seen or hasattr(child, "base_layer") or not _may_be_text(name, child):
            continue
        seen.add(id(child))
        if not isinstance(child, nn.ModuleList):
            yield from _walk(child, (*path, name), seen)
            continue
        for index, entry in enumerate(child):
            if id(entry) not in seen and projection_features(entry) is None:
                seen.add(id(entry))
                yield _read_block(entry, (*path, name, str(index)), index)


def _read_block(entry: nn.Module, path: Path, index: int) -> Block:
    modules: dict[Path, nn.Module] = {}
    sizes: dict[Path, tuple[int, int]] = {}
    fused: list[Path] = []
    seen: set[int] = set()

    def visit(module: nn.Module, at: Path) -> None:
        seen.add(id(module))
        modules[at] = module
        features = projection_features(module) if at else None
        if features is not None:
            sizes[at] = features
            return
        fused.extend(_fused_down_weights(base_module(module), at))
        if not hasattr(module, "base_layer"):
            for name, child in module.named_children():
                if id(child) not in seen and not _SIDE_MODULE.search(name):
                    visit(child, (*at, name))

    visit(entry, ())
    below = Counter(at[:depth] for at in sizes for depth in range(len(at)))
    projections = []
    for at, (in_features, out_features) in sizes.items():
        own = at[:-1] if at[-1] in ("dense", "linear") and len(at) > 1 and below[at[:-1]] == 1 else at
        projections.append(Projection(at, own[-1], own[:-1], in_features, out_features))
    return Block(path, index, modules, projections, fused)


def _fused_down_weights(module: nn.Module, at: Path) -> Iterator[Path]:
    """Path of the parameter with W_down of all experts: (E, d, width), (E, width, d) or (E * width, d)."""
    if not any("expert" in part.lower() for part in (*at, type(module).__name__)):
        return
    weights = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() >= 2]
    if weights == ["weight"]:  # a module of its own bears the name
        weights = weights if DOWN.fullmatch(at[-1]) else []
    else:
        named = [name for name in weights if DOWN.fullmatch(name.removesuffix("_blocks").removesuffix("_weight"))]
        weights = named or [name for name in weights if not re.search("bias|scale", name)][-1:]
    yield from ((*at, name) for name in weights)


def _width_hints(model: nn.Module) -> list[int]:
    """Widths that config or embeddings give for a residual stream."""
    widths = {module.embedding_dim for module in model.modules() if isinstance(module, nn.Embedding)}
    sizes = (attribute(config, name) for config in configs([model]) for name in _WIDTH)
    return sorted(widths | {size for size in sizes if isinstance(size, int)})


def _set_residual_widths(blocks: list[Block], hints: list[int]) -> None:
    """Sets d of every block: a width that some projection reads and some writes.

    Among several, norms (outermost first, those in `hints` before all) and then `hints` decide; at last the majority of
    the blocks of one ModuleList.
    """
    stacks: dict[Path, Counter[int]] = {}
    both = [{p.in_features for p in b.projections} & {p.out_features for p in b.projections} for b in blocks]
    for block, widths in zip(blocks, both, strict=True):
        norms = list(_norm_widths(block)) if len(widths) != 1 else []
        known = [*(width for width in norms if width in hints), *norms, *hints, *widths]
        block.width = next((width for width in known if width in widths or not widths), None)
        if block.width is not None:
            stacks.setdefault(block.path[:-1], Counter())[block.width] += 1
    for block, widths in zip(blocks, both, strict=True):
        for width, _ in stacks.get(block.path[:-1], Counter()).most_common(1):
            if width in widths:
                block.width = width


def _norm_widths(block: Block) -> Iterator[int]:
    """Widths of the block's norms, outermost first."""
    named = ((name.count("."), module) for name, module in block.modules[()].named_modules())
    for _, module in sorted(named, key=lambda pair: pair[0]):
        weight, shape = getattr(module, "weight", None), getattr(module, "normalized_shape", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 1:
            yield weight.shape[0]
        elif isinstance(shape, tuple | list) and len(shape) == 1:
            yield shape[0]
