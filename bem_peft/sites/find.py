r"""Sites: the projections W_O and W_down of every block, found from a model's structure.

A site is a projection (a leaf with in_features and out_features, quantised or not, or a Conv1D) that writes into the
residual stream, of width d, of a block:
W_O      closes a mixer: a module with a query or fused qkv projection (attention), or with a state or a convolution
         beside its projections (recurrent: state space, linear attention, gated convolution);
W_down   closes an MLP: it writes d, and reads what a projection d -> in_features of the same module writes
         (or d -> 2 * in_features, gate and up fused).
Names decide only what shapes leave open: which projection holds the queries, which of two d -> d projections closes.
No forward pass: modules, shapes and config are enough, also on the meta device.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from bem_peft.sites.blocks import DOWN, Block, Path, Projection, attribute, base_module, configs, read_blocks
from bem_peft.sites.experts import ExpertSite, expert_site
from bem_peft.sites.models import ModelBuildError, build_meta, language_model_types

__all__ = [
    "ATTENTION_OUTPUT", "MLP_DOWN", "ExpertSite", "ModelBuildError", "Site", "SiteError", "SiteTable", "build_meta",
    "find_sites", "name_pattern", "pattern_counts", "site_table_row", "site_table_rows",
]  # fmt: skip

ATTENTION_OUTPUT = "attention_output"
MLP_DOWN = "mlp_down"

_QUERY = re.compile(
    r"((project_|to_|linear_)?w?q|(\w+_)?query)(_(a|b|gate))?(_(proj|lin|linear|global))?", re.IGNORECASE
)
_FUSED_QKV = re.compile(r"(to_|in_proj_)?w?qkv\w*|query_key(_value)?|c_attn|w_pack|kv_proj", re.IGNORECASE)
_KEY_VALUE = re.compile(
    r"((project_|to_|linear_)?w?(k|v|kv)|(\w+_)?(key|value))(_(a|b))?(_(proj|lin|linear|global|with_mqa))*",
    re.IGNORECASE,
)
_OUTPUT = re.compile(
    r"w?o(_b)?(_proj)?|(c|w)_proj|proj|(linear_|w_|attention_)?out(put)?(_(proj|lin|linear|layer))?|dense",
    re.IGNORECASE,
)
_STATE = re.compile(r"A_log|dt_bias|\w*decay|slope\w*|rg_lru|[if]gate\w*|forget_gate")
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_CROSS = re.compile(r"cross|enc(oder)?_?dec|encoder_attn", re.IGNORECASE)
_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nheads", "num_v_heads", "num_value_heads")
_HEAD_DIM = (
    "v_head_dim", "head_v_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "head_size",
)  # fmt: skip


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
    fused_experts: tuple[str, ...]  # parameter paths of expert weights in one parameter that play W_down
    experts: tuple[ExpertSite, ...] = ()  # those of them whose products can be adapted
    obstacles: Mapping[str, str] = field(default_factory=dict)  # the others: what stands in the way

    def names(self, *roles: str) -> list[str]:
        """Names of the sites of these roles, of all roles if none is given."""
        return [site.name for site in self.sites if not roles or site.role in roles]


class SiteError(ValueError):
    """The structure of a model does not show its sites."""


def find_sites(model: nn.Module) -> SiteTable:
    """Finds W_O and W_down of every block of `model`.

    Args:
        model: any transformer, plain, quantised, on the meta device or already carrying PEFT adapters.

    Returns:
        The sites, named relative to `model`; a module with a `base_layer` stands under its own name.

    Raises:
        SiteError: no block, a block without a site, attention whose W_O cannot be told, a stray module that writes d.
    """
    blocks = read_blocks(model)
    sites: list[Site] = []
    problems: Counter[str] = Counter()
    for block in blocks:
        try:
            sites += _sites_of_block(block, model)
        except SiteError as error:
            problems[f"{name_pattern('.'.join(block.path))} ({type(block.modules[()]).__name__}) {error}"] += 1
    fused = [".".join(block.path + path) for block in blocks for path in block.fused_experts]
    advice = "Please specify `target_modules`, the names of the projections to adapt"
    if fused:
        advice = f"Expert weights fused in one parameter are no site: {', '.join(pattern_counts(fused))}. {advice}"
    if problems:
        text = "; ".join(f"{problem} [{count} of {len(blocks)} blocks]" for problem, count in problems.items())
        raise SiteError(f"{type(model).__name__}: found {len(sites)} sites, but {text}. {advice}")
    found = {
        ".".join(block.path + path): expert_site(model, block, path, _role_of_experts(path))
        for block in blocks
        for path in block.fused_experts
    }
    experts = tuple(site for site in found.values() if isinstance(site, ExpertSite))
    obstacles = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    if not sites and not experts:
        raise SiteError(f"{type(model).__name__}: found no site in {len(blocks)} blocks of an nn.ModuleList. {advice}")
    return SiteTable(tuple(sites), len(blocks), tuple(fused), experts, obstacles)


def site_table_row(table: SiteTable) -> dict[str, object]:
    """`table` with every index replaced by `*`: name patterns with their counts per role, their mixers and heads."""
    heads: dict[str, set[int]] = {}
    for site in table.sites:
        heads.setdefault(name_pattern(site.name), set()).update(() if site.num_heads is None else (site.num_heads,))
    return {
        "blocks": table.blocks,
        ATTENTION_OUTPUT: pattern_counts(table.names(ATTENTION_OUTPUT)),
        MLP_DOWN: pattern_counts(table.names(MLP_DOWN)),
        "mixers": {name_pattern(site.name): site.mixer for site in table.sites},
        "num_heads": {pattern: sorted(counts) for pattern, counts in heads.items() if counts},
        "fused_experts": pattern_counts(table.fused_experts),
    }


def site_table_rows(model_types: Iterable[str] | None = None) -> Iterator[tuple[str, dict[str, object]]]:
    """(model type, row) of each type, by default of all causal and seq2seq LMs; {"error": why} where there is none."""
    for model_type in language_model_types() if model_types is None else model_types:
        try:
            row = site_table_row(find_sites(build_meta(model_type)))
        except (SiteError, ModelBuildError) as error:
            row = {"error": str(error)}
        yield model_type, row


def name_pattern(name: str) -> str:
    """`name` with every index replaced by `*`."""
    return re.sub(r"(?<=[._])\d+(?=\.|$)", "*", name)


def pattern_counts(names: Iterable[str]) -> dict[str, int]:
    """How many of `names` share each pattern."""
    return dict(Counter(name_pattern(name) for name in names))


def _sites_of_block(block: Block, model: nn.Module) -> list[Site]:
    """The sites of one block in module order; raises SiteError where something could not be placed."""
    units = _mixers(block)
    mixers = {output.path: unit for unit, output in units.items()}
    free = [p for p in block.projections if not any(_is_below(p.path, unit) for unit in units)]
    downs = {p.path for p in _down_projections(block, free)}
    if free and not downs and not block.fused_experts:
        raise SiteError(f"has no W_down among {_shapes(free)}")
    homes = {p.path[:depth] for p in free if p.path in downs for depth in range(len(p.path))}
    stray = [p for p in free if p.holder and p.holder not in homes and p.out_features == block.width]
    if stray := [p for p in stray if not _is_mixer_input(p.name)]:
        raise SiteError(
            f"has projections to width {block.width} in modules that are no mixer and no MLP: {_shapes(stray)}"
        )
    sites = []
    for p in block.projections:
        if p.path in mixers:
            mixer = _mixer_kind(block, mixers[p.path])
            heads = _num_heads(block, mixers[p.path], p.in_features, [] if mixer == "recurrent" else [model])
            role = ATTENTION_OUTPUT
        elif p.path in downs:
            role, mixer, heads = MLP_DOWN, _mlp_kind(block, p.path), None
        else:
            continue
        name, path = ".".join(block.path + p.path), ".".join(block.path)
        sites.append(Site(name, role, path, block.index, mixer, heads, p.in_features, p.out_features))
    return sites


def _role_of_experts(path: Path) -> str:
    return ATTENTION_OUTPUT if any(_ATTENTION.search(part) for part in path) else MLP_DOWN


def _shapes(projections: list[Projection]) -> str:
    shown = [f"{name_pattern('.'.join(p.path))} ({p.in_features} -> {p.out_features})" for p in projections]
    return ", ".join([*shown[:6], *(["..."] if len(shown) > 6 else [])])


def _is_below(path: Path, ancestor: Path) -> bool:
    return path[: len(ancestor)] == ancestor


def _mixers(block: Block) -> dict[Path, Projection]:
    """Path of each mixer of the block, and its W_O."""
    mixers: dict[Path, Projection] = {}
    for holder, is_attention in _mixer_holders(block):
        if any(_is_below(holder, unit) or _is_below(unit, holder) for unit in mixers):
            continue
        unit, candidates = _mixer_candidates(block, holder)
        if len(candidates) > 1:
            candidates = [p for p in candidates if _OUTPUT.fullmatch(p.name)] or candidates
        if len(candidates) == 1:
            mixers[unit] = candidates[0]
        elif not candidates and any(_is_below(path, unit) for path in block.fused_experts):
            continue  # its W_O are experts (JetMoe)
        elif candidates or is_attention:
            where = ".".join(unit) or "itself"
            what = f"several, {_shapes(candidates)}" if candidates else f"none to width {block.width}"
            raise SiteError(f"has a mixer in {where} without one projection that can be W_O: {what}")
    return mixers


def _mixer_holders(block: Block) -> list[tuple[Path, bool]]:
    """(path, is attention) of the modules that hold queries, or a state or a convolution beside projections.

    A module that is called attention and holds other projections comes last.
    """
    holders = {p.holder for p in block.projections}
    queries = [p.holder for p in block.projections if _QUERY.fullmatch(p.name) or _FUSED_QKV.fullmatch(p.name)]
    recurrent, named = [], []
    for path, module in block.modules.items():
        names = {name for name, _ in base_module(module).named_parameters(recurse=False)}
        if {"q", "k", "v"} <= names:
            queries.append(path)
        has_convolution = any(isinstance(child, nn.Conv1d) for child in module.children())
        if (has_convolution and path in holders) or any(_STATE.fullmatch(name) for name in names):
            recurrent.append(path)
        if path and _ATTENTION.search(path[-1]) and any(_is_below(holder, path) for holder in holders):
            named.append(path)
    unique = dict.fromkeys(queries)
    return [
        *((path, True) for path in unique),
        *((path, False) for path in recurrent),
        *((path, True) for path in named),
    ]


def _mixer_candidates(block: Block, holder: Path) -> tuple[Path, list[Projection]]:
    """The lowest module at or around `holder` (below the block, if it is) with candidates for W_O, and these."""
    outputs = [p for p in block.projections if p.out_features == block.width and not _is_mixer_input(p.name)]
    for depth in range(len(holder), 0 if holder else -1, -1):
        candidates = [p for p in outputs if _is_below(p.path, holder[:depth])]
        if candidates:
            return holder[:depth], candidates
    return holder, []


def _is_mixer_input(name: str) -> bool:
    return "gate" in name or any(regex.fullmatch(name) for regex in (_QUERY, _FUSED_QKV, _KEY_VALUE))


def _mixer_kind(block: Block, unit: Path) -> str:
    """Recurrent where it holds a state, or neither queries nor the name of attention."""
    labels = {p.name for p in block.projections if _is_below(p.path, unit)}
    names = {path[-1] for path, _ in block.inside(unit) if path}
    for _, module in block.inside(unit):
        names |= {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    is_attention = any(_QUERY.fullmatch(name) or _FUSED_QKV.fullmatch(name) for name in labels | names)
    if any(map(_STATE.fullmatch, names)) or not (is_attention or any(map(_ATTENTION.search, unit))):
        return "recurrent"
    return "cross_attention" if any(map(_CROSS.search, (*block.path, *unit))) else "attention"


def _mlp_kind(block: Block, path: Path) -> str:
    """Expert in a container of routed experts, else MLP."""
    for depth in range(1, len(path)):
        name, container = path[depth - 1].lower(), block.modules[path[:depth]]
        if isinstance(container, nn.ModuleList | nn.ModuleDict) and "expert" in name and "shared" not in name:
            return "expert"
    return "mlp"


def _down_projections(block: Block, free: list[Projection]) -> list[Projection]:
    """One of `free` per MLP: what writes d and reads the width of an up projection.

    The MLP is the lowest module that holds both; of several candidates the one named so, else the last.
    """
    readers = [p for p in free if p.in_features == block.width]
    units: dict[Path, list[Projection]] = {}
    for p in free:
        if p.out_features != block.width or "gate" in p.name:
            continue
        ups = [r for r in readers if r is not p and r.out_features in (p.in_features, 2 * p.in_features)]
        around = (p.path[:depth] for depth in range(len(p.path) - 1, -1, -1))
        unit = next((unit for unit in around if any(_is_below(r.path, unit) for r in ups)), None)
        if unit is not None:
            units.setdefault(unit, []).append(p)
    return [next((p for p in found if DOWN.fullmatch(p.name)), found[-1]) for found in units.values()]


def _num_heads(block: Block, unit: Path, in_features: int, config_owners: list[nn.Module]) -> int | None:
    """Heads side by side in `in_features`: a number of heads times a head's width; None where none agrees."""
    modules = [module for _, module in block.inside(unit)]
    modules += [child for child in block.modules[unit].children() if child not in modules]
    sources = [*modules, *(configs([*modules, *config_owners]) if config_owners else ())]
    heads: list[int] = []
    dims: set[int] = set()
    for source in sources:
        for name in _NUM_HEADS:
            value = attribute(source, name)
            if isinstance(value, list | tuple) and block.index < len(value):
                value = value[block.index]
            if isinstance(value, int) and value > 0:
                heads.append(value)
        dims |= {value for name in _HEAD_DIM if isinstance(value := attribute(source, name), int)}
    fitting = (count for count in heads if in_features % count == 0 and (not dims or in_features // count in dims))
    return next(fitting, None)
