r"""Sites: the projections W_O and W_down of every block, found from a model's structure.

A site is a projection (a leaf with `in_features` and `out_features`, quantised or not, or a Conv1D) that writes into the
residual stream of a block (an entry of an outermost nn.ModuleList):
W_O      closes a mixer, a module that holds a query or fused qkv projection (attention), or a state or a convolution beside
         its projections (recurrent: state space, linear attention, gated convolution);
W_down   closes an MLP: it leaves at the residual width d and its in_features are what some projection d -> in_features
         (or d -> 2 * in_features, gate and up fused) of the same module writes.
Names decide only what shapes leave open (which projection holds the queries, which of two d -> d projections is the last)
and what must never be touched (routers, gates, norms, adapters, towers of other modalities).
No forward pass: modules, shapes and config are enough, also on the meta device.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

ATTENTION_OUTPUT = "attention_output"
MLP_DOWN = "mlp_down"

Path = tuple[str, ...]

# Outside the blocks: children which are not the text tower; beside a child of _TEXT every sibling is another modality.
_TEXT = {"language_model", "text_model"}
_NOT_TEXT = re.compile(
    r"vision|visual|image|img|video|audio|speech|acoustic|tokenizer|projector|resampler|qformer|patcher|codec|(^|_)heads?$"
)
# Inside a block: modules that are no part of its mixers or MLPs.
_SIDE_MODULE = re.compile(
    r"router|(^|_)gate$|adapter|lora_|altup|laurel|per_layer|indexer|compressor|^parametrizations$|^modules_to_save$"
    r"|^(?!norm_attn_norm$).*norm",
    re.IGNORECASE,
)
_QUERY = re.compile(r"(project_|to_|linear_)?w?(q|query)(_(a|b|gate))?(_(proj|lin|linear|global))?", re.IGNORECASE)
_FUSED_QKV = re.compile(r"(to_|in_proj_)?w?qkv\w*|query_key_value|c_attn|w_pack|kv_proj", re.IGNORECASE)
_KEY_VALUE = re.compile(
    r"(project_|to_|linear_)?w?(k|v|kv|key|value)(_(a|b))?(_(proj|lin|linear|global|with_mqa))*", re.IGNORECASE
)
_OUTPUT = re.compile(
    r"w?o(_b)?(_proj)?|(c|w)_proj|proj|(linear_|w_|attention_)?out(put)?(_(proj|lin|linear|layer))?|dense", re.IGNORECASE
)
_DOWN = re.compile(
    r"w?down(_proj)?|proj_down|(fc|lin|linear|layer|w|dense|ff)_?2|fc_out|c_proj|dense_4h_to_h|w_?o(ut)?|(ffn_)?output(_linear)?",
    re.IGNORECASE,
)
_STATE = re.compile(r"A_log|dt_bias|\w*decay|slope\w*|rg_lru|[if]gate\w*|forget_gate")
_CROSS = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)

_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nheads", "num_v_heads", "num_value_heads")
_HEAD_DIM = ("v_head_dim", "head_v_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "head_size")
_WIDTH = ("hidden_size", "d_model", "n_embd", "emb_dim", "dim")


@dataclass(frozen=True)
class Site:
    """One projection into the residual stream of one block."""

    name: str  # module path, relative to the model passed
    role: str  # ATTENTION_OUTPUT or MLP_DOWN
    block: str  # path of the block, e.g. "model.layers.3"
    block_index: int  # its index in its ModuleList
    mixer: str  # "attention", "cross_attention", "recurrent"; "mlp", "expert"
    num_heads: int | None  # heads side by side in the input of W_O; None where unknown, and for an MLP
    in_features: int
    out_features: int


@dataclass(frozen=True)
class SiteTable:
    """All sites of a model, in module order."""

    sites: tuple[Site, ...]
    blocks: int  # number of blocks that were seen
    fused_experts: tuple[str, ...]  # parameter paths of 3-D expert weights that play W_down

    def names(self, *roles: str) -> list[str]:
        """Names of the sites of these roles, of all roles if none is given."""
        return [site.name for site in self.sites if not roles or site.role in roles]


class SiteError(ValueError):
    """The structure of a model does not show its sites."""


@dataclass(frozen=True)
class _Projection:
    path: Path  # relative to the block
    name: str  # own name; that of its parent where it is called `dense` or `linear` and is the parent's only projection
    holder: Path  # module that holds it under this name
    in_features: int
    out_features: int


@dataclass
class _Block:
    path: Path
    index: int
    modules: dict[Path, nn.Module]  # without side modules, nothing below a projection
    projections: list[_Projection]
    fused_experts: list[Path] = field(default_factory=list)
    width: int | None = None  # d, the width of the residual stream


def find_sites(model: nn.Module) -> SiteTable:
    """Finds W_O and W_down of every block of `model`.

    Args:
        model: any transformer, plain, quantised, on the meta device or already carrying PEFT adapters.

    Returns:
        The sites, named relative to `model`; a module with a `base_layer` stands under its own name.

    Raises:
        SiteError: no block was found, a block has no site, or a block has attention whose W_O cannot be told.
    """
    blocks = [block for block in _blocks(model) if block.projections or block.fused_experts]
    _set_residual_widths(blocks, _width_hints(model))
    sites: list[Site] = []
    problems: Counter[str] = Counter()
    for block in blocks:
        found, complaint = _sites_of_block(block, model)
        sites += found
        if complaint is not None:
            problems[f"{_pattern('.'.join(block.path))} ({type(block.modules[()]).__name__}) {complaint}"] += 1
    fused = [".".join(block.path + path) for block in blocks for path in block.fused_experts]
    advice = "Name the projections with target_modules=[...]"
    if fused:
        advice = f"Fused expert weights, which are parameters and no modules: {_patterns(fused)}. {advice}"
    if problems:
        text = "; ".join(f"{problem} (so in {count} of {len(blocks)} blocks)" for problem, count in problems.items())
        raise SiteError(f"{type(model).__name__}: found {len(sites)} sites, but {text}. {advice}")
    if not sites:
        raise SiteError(f"{type(model).__name__}: found no site in {len(blocks)} blocks of an nn.ModuleList. {advice}")
    return SiteTable(tuple(sites), len(blocks), tuple(fused))


def _patterns(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(_pattern(name) for name in names))


def _pattern(name: str) -> str:
    """`name` with every index replaced by `*`."""
    return re.sub(r"(?<=[._])\d+(?=\.|$)", "*", name)


# -- the tree -----------------------------------------------------------------------------------------------------------


def _base(module: nn.Module) -> nn.Module:
    """The module below any PEFT layers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a projection, None for any other module."""
    base = _base(module)
    if next(base.children(), None) is not None and not isinstance(base, nn.Linear):
        return None
    for names in (("in_features", "out_features"), ("nx", "nf"), ("infeatures", "outfeatures")):
        sizes = tuple(getattr(base, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return sizes
    return None


def _may_be_text(name: str, child: nn.Module) -> bool:
    """False for towers of other modalities, by transformers' `input_modalities` or by name."""
    return name in _TEXT or ("text" in getattr(child, "input_modalities", "text") and not _NOT_TEXT.search(name))


def _blocks(model: nn.Module) -> Iterator[_Block]:
    """Entries of the outermost ModuleLists of the text tower, each module once."""
    seen: set[int] = set()

    def visit(module: nn.Module, path: Path) -> Iterator[_Block]:
        children = dict(module.named_children())
        for name in [name for name in children if name in _TEXT] or children:
            child = children[name]
            if id(child) in seen or hasattr(child, "base_layer") or not _may_be_text(name, child):
                continue
            seen.add(id(child))
            if not isinstance(child, nn.ModuleList):
                yield from visit(child, (*path, name))
                continue
            for index, entry in enumerate(child):
                if id(entry) not in seen and _features(entry) is None:
                    seen.add(id(entry))
                    yield _read_block(entry, (*path, name, str(index)), index)

    yield from visit(model, ())


def _read_block(entry: nn.Module, path: Path, index: int) -> _Block:
    """Modules, projections and fused experts of one block."""
    modules: dict[Path, nn.Module] = {}
    sizes: dict[Path, tuple[int, int]] = {}
    fused: list[Path] = []
    seen: set[int] = set()

    def visit(module: nn.Module, at: Path) -> None:
        seen.add(id(module))
        modules[at] = module
        features = _features(module) if at else None
        if features is not None:
            sizes[at] = features
            return
        fused.extend(_fused_down_weights(_base(module), at))
        if hasattr(module, "base_layer"):
            return
        for name, child in module.named_children():
            if id(child) not in seen and not _SIDE_MODULE.search(name):
                visit(child, (*at, name))

    visit(entry, ())
    inside = Counter(at[:depth] for at in sizes for depth in range(len(at)))
    projections = []
    for at, (in_features, out_features) in sizes.items():
        own = at
        if at[-1] in ("dense", "linear") and len(at) > 1 and inside[at[:-1]] == 1:
            own = at[:-1]
        projections.append(_Projection(at, own[-1], own[:-1], in_features, out_features))
    return _Block(path, index, modules, projections, fused)


def _fused_down_weights(module: nn.Module, at: Path) -> Iterator[Path]:
    """Path of the parameter of `module` that holds W_down of all experts, (E, d, width), (E, width, d) or (E * width, d)."""
    if not any("expert" in part.lower() for part in (*at, type(module).__name__)):
        return
    weights = [name for name, p in module.named_parameters(recurse=False) if p.dim() >= 2]
    if weights == ["weight"]:  # one parameter in a module of its own: the module bears the name
        weights = ["weight"] if _DOWN.fullmatch(at[-1]) else []
    else:
        named = [name for name in weights if _DOWN.fullmatch(name.removesuffix("_blocks").removesuffix("_weight"))]
        weights = named or [name for name in weights if not re.search("bias|scale", name)][-1:]
    yield from ((*at, name) for name in weights)


def _width_hints(model: nn.Module) -> list[int]:
    """Widths that config or embeddings give for a residual stream."""
    widths = {module.embedding_dim for module in model.modules() if isinstance(module, nn.Embedding)}
    sizes = (_attribute(config, name) for config in _configs([model]) for name in _WIDTH)
    return sorted(widths | {size for size in sizes if isinstance(size, int)})


def _set_residual_widths(blocks: list[_Block], hints: list[int]) -> None:
    """Sets d of every block: a width that some projection reads and some writes.

    Norms (outermost first), then `hints`, decide among several; then the majority of the blocks of one ModuleList.
    """
    stacks: dict[Path, Counter[int]] = {}
    both = [{p.in_features for p in b.projections} & {p.out_features for p in b.projections} for b in blocks]
    for block, widths in zip(blocks, both, strict=True):
        known = [*_norm_widths(block), *hints] if len(widths) != 1 else widths
        block.width = next((width for width in known if width in widths or not widths), None)
        if block.width is not None:
            stacks.setdefault(block.path[:-1], Counter())[block.width] += 1
    for block, widths in zip(blocks, both, strict=True):
        for width, _ in stacks.get(block.path[:-1], Counter()).most_common(1):
            if width in widths:
                block.width = width


def _norm_widths(block: _Block) -> Iterator[int]:
    """Widths of the block's norms, outermost first."""
    for path in sorted(block.modules, key=len):
        for child in block.modules[path].children():
            weight, shape = getattr(_base(child), "weight", None), getattr(child, "normalized_shape", None)
            if _features(child) is None and getattr(weight, "ndim", 0) == 1:
                yield weight.shape[0]
            elif isinstance(shape, tuple | list) and len(shape) == 1:
                yield shape[0]


# -- one block ----------------------------------------------------------------------------------------------------------


def _sites_of_block(block: _Block, model: nn.Module) -> tuple[list[Site], str | None]:
    """The sites of one block in module order, and what could not be placed."""
    placed: dict[Path, tuple[str, str, int | None]] = {}
    claimed: list[Path] = []
    for holder, is_attention in _mixer_holders(block):
        if any(_is_below(holder, unit) for unit in claimed):
            continue
        unit, candidates = _mixer_unit(block, holder)
        if not candidates:
            if is_attention:
                return [], f"has attention in {_name(holder)} without a projection to width {block.width} that may be W_O"
            continue
        if len(candidates) > 1:
            candidates = [p for p in candidates if _OUTPUT.fullmatch(p.name)]
        if len(candidates) != 1:
            return [], f"has {len(candidates)} projections in {_name(unit)} that may be W_O"
        claimed.append(unit)
        mixer = _mixer_kind(block, unit, is_attention)
        heads = _num_heads(block, unit, candidates[0].in_features, mixer, model)
        placed[candidates[0].path] = (ATTENTION_OUTPUT, mixer, heads)
    downs, left = _down_projections(block, claimed)
    for projection in downs:
        routed = any(
            isinstance(block.modules[projection.path[:depth]], nn.ModuleList | nn.ModuleDict)
            and "expert" in projection.path[depth - 1]
            and "shared" not in projection.path[depth - 1]
            for depth in range(1, len(projection.path))
        )
        placed[projection.path] = (MLP_DOWN, "expert" if routed else "mlp", None)
    if left and not downs and not block.fused_experts:
        shapes = ", ".join(f"{_name(p.path)} ({p.in_features} -> {p.out_features})" for p in left[:6])
        return [], f"has no W_down among {shapes}"
    sites = []
    for p in block.projections:
        if p.path in placed:
            role, mixer, heads = placed[p.path]
            name = ".".join(block.path + p.path)
            sites.append(Site(name, role, ".".join(block.path), block.index, mixer, heads, p.in_features, p.out_features))
    return sites, None


def _name(path: Path) -> str:
    return _pattern(".".join(path)) or "itself"


def _is_below(path: Path, ancestor: Path) -> bool:
    return path[: len(ancestor)] == ancestor


def _mixer_holders(block: _Block) -> list[tuple[Path, bool]]:
    """(path, is attention) of the modules that hold queries, or a state or a convolution beside projections."""
    attention = [p.holder for p in block.projections if _QUERY.fullmatch(p.name) or _FUSED_QKV.fullmatch(p.name)]
    recurrent = []
    for path, module in block.modules.items():
        own = dict(_base(module).named_parameters(recurse=False))
        if path not in attention and len(own) > 2 and {"q", "k", "v"} <= own.keys():
            attention.append(path)
        beside = any(isinstance(child, nn.Conv1d) for child in module.children()) and any(
            p.holder == path for p in block.projections
        )
        if beside or any(_STATE.fullmatch(name) for name in own):
            recurrent.append(path)
    return [(path, True) for path in dict.fromkeys(attention)] + [(path, False) for path in recurrent]


def _mixer_unit(block: _Block, holder: Path) -> tuple[Path, list[_Projection]]:
    """The lowest module around `holder`, below the block, with projections that may be W_O; and these."""
    for depth in range(len(holder), min(len(holder), 1) - 1, -1):
        unit = holder[:depth]
        candidates = [
            p
            for p in block.projections
            if _is_below(p.path, unit) and p.out_features == block.width and not _is_mixer_input(p.name)
        ]
        if candidates:
            return unit, candidates
    return holder, []


def _is_mixer_input(name: str) -> bool:
    return "gate" in name or any(regex.fullmatch(name) for regex in (_QUERY, _FUSED_QKV, _KEY_VALUE))


def _mixer_kind(block: _Block, unit: Path, is_attention: bool) -> str:
    """ "attention", "cross_attention" or "recurrent"."""
    for path, module in block.modules.items():
        if _is_below(path, unit):
            names = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
            if not is_attention or any(_STATE.fullmatch(name) for name in (*names, *path[-1:])):
                return "recurrent"
    return "cross_attention" if any(_CROSS.search(part) for part in (*block.path, *unit)) else "attention"


def _down_projections(block: _Block, claimed: list[Path]) -> tuple[list[_Projection], list[_Projection]]:
    """One projection per MLP: the candidate of its module that is named so, else the last one; and all outside mixers."""
    free = [p for p in block.projections if not any(_is_below(p.path, unit) for unit in claimed)]
    readers = [p for p in free if p.in_features == block.width]
    units: dict[Path, list[_Projection]] = {}
    for p in free:
        if p.out_features != block.width or "gate" in p.name:
            continue
        feeders = [r for r in readers if r is not p and r.out_features in (p.in_features, 2 * p.in_features)]
        for depth in range(len(p.path) - 1, -1, -1):
            if any(_is_below(r.path, p.path[:depth]) for r in feeders):
                units.setdefault(p.path[:depth], []).append(p)
                break
    chosen = []
    for candidates in units.values():
        chosen.append(next((p for p in candidates if _DOWN.fullmatch(p.name)), candidates[-1]))
    return chosen, free


# -- heads --------------------------------------------------------------------------------------------------------------


def _attribute(source: object, name: str) -> object:
    """`source.name`, None where it is missing or (heterogeneous configs raise RuntimeError) differs between layers."""
    try:
        return getattr(source, name, None)
    except RuntimeError:
        return None


def _configs(modules: Iterable[nn.Module]) -> list[object]:
    """The configs that hang on `modules`, each followed by its text config."""
    configs = [config for module in modules if (config := getattr(module, "config", None)) is not None]
    return [part for c in configs for part in (c, c.get_text_config() if hasattr(c, "get_text_config") else c)]


def _num_heads(block: _Block, unit: Path, in_features: int, mixer: str, model: nn.Module) -> int | None:
    """Heads side by side in `in_features`: a number of heads times a head's width; None where none agrees."""
    modules = list(block.modules[unit].modules())
    sources = [*modules, *(_configs([*modules, model]) if mixer != "recurrent" else ())]
    heads: list[int] = []
    dims: set[int] = set()
    for source in sources:
        for name in _NUM_HEADS:
            value = _attribute(source, name)
            if isinstance(value, list | tuple) and block.index < len(value):
                value = value[block.index]
            if isinstance(value, int) and value > 0:
                heads.append(value)
        dims |= {value for name in _HEAD_DIM if isinstance(value := _attribute(source, name), int)}
    fitting = [count for count in heads if in_features % count == 0 and (not dims or in_features // count in dims)]
    return fitting[0] if fitting else None
