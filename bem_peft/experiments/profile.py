"""Time the adapters of results beside their base model and the anchor, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel

from bem_peft.budget.copies import copy_around_weights
from bem_peft.evaluation.profile_document import ProfileDocument
from bem_peft.evaluation.profiler import ANCHOR, PerformanceProfiler, Workload
from bem_peft.experiments.loading import load_model
from bem_peft.experiments.provenance import provenance
from bem_peft.experiments.sections import ModelSection
from bem_peft.json_text import read_json


class Scored(NamedTuple):
    """A system of a folder of results. base, precision: None where its result does not say."""

    name: str
    adapter: str
    base: str | None
    precision: str | None


def adapter_of(folder: Path) -> Scored:
    """The system of the first seed in a folder of `run` or `evaluate`.

    Raises:
        ValueError: the folder holds no result, or its adapter is not there any more.
    """
    found = sorted(folder.glob("seed-*/result.json"))
    if not found:
        raise ValueError(f"{folder}: no seed-*/result.json; give a folder of `bem-peft run` or `bem-peft evaluate`.")
    result = read_json(found[0])
    try:
        name, settings = str(result["name"]), dict(result["provenance"]["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{found[0]}: no result of `bem-peft run`: {error!r}.") from error
    if result.get("adapter") == {}:
        raise ValueError(f"{found[0]} is of the base model alone, which is timed beside every adapter: leave it out.")
    beside = found[0].with_name("adapter")
    # `evaluate` keeps where the adapter stood; `run` saved it beside the result
    path = str(beside) if beside.is_dir() else settings.get("adapter")
    if not isinstance(path, str):
        raise ValueError(f"{beside} is not there: what `run` saved must stand beside its result.")
    return Scored(name, path, settings.get("model", {}).get("path"), result.get("precision"))


def profile_results(
    folders: Sequence[Path],
    anchor: str,
    *,
    base: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    batch: int = 1,
    kinds: Sequence[str] = ("prefill", "decode"),
    rounds: int = 50,
    tolerance_ratio: float = 0.05,
    progress: Callable[..., Iterable[int]] | None = None,
) -> ProfileDocument:
    """Times of the systems in `folders`, of which one is called `anchor`; all adapt one base model.

    Args:
        base: of the base model; None: the one that the anchor's result names. device: None: a GPU where there is one.
        dtype: of the base model; None: that in which the results were scored.
        prompt_tokens, new_tokens, batch: decoding is timed with a cache of prompt_tokens + new_tokens / 2.
        progress: wraps the rounds of a workload, as tqdm does; None: nothing is shown.

    Raises:
        ValueError: no result of that name, two of one name, adapters of several base models or precisions, or sizes
            below 1.
    """
    if new_tokens < 1:
        raise ValueError(f"`new_tokens` = {new_tokens}: must be at least 1.")
    lengths = {"prefill": prompt_tokens, "decode": prompt_tokens + new_tokens // 2, "train_step": prompt_tokens}
    unknown = [kind for kind in kinds if kind not in lengths]
    if unknown or not kinds:
        raise ValueError(f"`kinds` = {list(kinds)}: must be of {', '.join(lengths)}.")
    found = [adapter_of(folder) for folder in folders]
    names = [one.name for one in found]
    if anchor not in names or len(set(names)) != len(names):
        raise ValueError(f"`anchor` = {anchor!r}: must be one of {', '.join(names)}, which must all be different.")
    if len(names) < 2:
        raise ValueError(f"only {anchor!r} is given: give the folder of another system too.")
    bases = {one.base for one in found}
    if base is None and (len(bases) != 1 or None in bases):
        raise ValueError(f"the adapters stand on {sorted(map(str, bases))}: give `base`, one model for all of them.")
    base = base if base is not None else next(path for path in bases if path is not None)
    precisions = sorted({one.precision for one in found if one.precision is not None})
    if dtype is None and len(precisions) > 1:
        raise ValueError(f"the adapters were scored in {', '.join(precisions)}: give `dtype`, one for all of them.")
    model = load_model(ModelSection(base, dtype or next(iter(precisions), "auto")))
    place = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    model = model.to(place)
    adapted = {
        one.name: PeftModel.from_pretrained(copy_around_weights(model), one.adapter, is_trainable=True) for one in found
    }
    settings = {
        "base": base, "dtype": str(model.dtype), "device": place, "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens, "batch": batch, "rounds": rounds,
        "tolerance_ratio": tolerance_ratio,
        "adapters": {one.name: one.adapter for one in found},
    }  # fmt: skip
    profiler = PerformanceProfiler(
        model, adapted[anchor], {name: m for name, m in adapted.items() if name != anchor}, rounds=rounds,
        tolerance_ratio=tolerance_ratio, progress=progress,
    )  # fmt: skip
    profiles = profiler.profile([Workload(kind, batch, lengths[kind]) for kind in kinds])
    return ProfileDocument(
        anchor,
        tuple(replace(p, system=anchor) if p.system == ANCHOR else p for p in profiles),
        provenance(settings, 0),
        (prompt_tokens, new_tokens),
    )
