r"""Fused experts as a site: W_down of all experts is one parameter (E, out, in) that products read expert by expert.

The module that owns it stays as it is and computes as it does (eager, batched_mm, grouped_mm, a loop of its own). Only
what it reads as its W_down changes: while an adapter is on, the attribute gives an `ExpertWeight`, a tensor that knows
which experts were picked from it, and whose products are  y = base(x), y <- adapter(x, y)  on the rows x of the tokens.
So the cost is that of the tokens that reach an expert, nothing of size E x out x in is built, and what a router decides
is not touched. An operator that is not known as a product, a pick or a look at the shape is refused by name: no way of
computing goes past the adapter without a word.

The attribute is a property of a class of the module's own, as torch.nn.utils.parametrize makes it; the parameter
stays where it is (`state_dict`, FSDP, `.to`), and calls of several threads share nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

PLACE = "_bem_peft_site"  # in the __dict__ of an experts module: (name of its W_down, the layer whose adapters act)


class ExpertWeight(torch.Tensor):
    """W_down of the experts, or of those that `picked` says, read by a product.

    layer: an `AdapterExperts`. picked: None for all experts in order, else their ids, one a row of the weight, or a
    single id.
    """

    layer: Any
    picked: Any

    @classmethod
    def of(cls, weight: torch.Tensor, layer: Any, picked: Any) -> ExpertWeight:
        made = weight.as_subclass(cls)
        made.layer, made.picked = layer, picked
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in SEEN:
                return func(*args, **kwargs)
            if func in ALTERED:
                return ALTERED[func](*args, **kwargs)
            name = getattr(func, "__name__", str(func))
            if name in GROUPED:
                return _grouped(func, *args, **kwargs)
        site = next(a for a in (*args, *kwargs.values()) if isinstance(a, ExpertWeight)).layer.site_name
        raise NotImplementedError(
            f"{site}: its experts read their W_down by `{name}`, which bem_peft does not know as a product with it; "
            "set fused_experts='skip' to leave the experts as they are, or choose another `experts_implementation`."
        )


def plain(weight: torch.Tensor) -> torch.Tensor:
    return weight.as_subclass(torch.Tensor) if isinstance(weight, ExpertWeight) else weight


def _pick(weight: ExpertWeight, index: Any) -> ExpertWeight:
    if weight.picked is not None or isinstance(index, (tuple, slice)) or index is None:
        raise NotImplementedError(f"{weight.layer.site_name}: its experts read their W_down at {index!r}.")
    return ExpertWeight.of(plain(weight)[index], weight.layer, index)


def _turn(weight: ExpertWeight, *axes: int) -> ExpertWeight:
    if axes and {axis % weight.dim() for axis in axes} != {weight.dim() - 2, weight.dim() - 1}:
        raise NotImplementedError(f"{weight.layer.site_name}: its experts transpose their W_down by {axes}.")
    return ExpertWeight.of(plain(weight).transpose(-2, -1), weight.layer, weight.picked)


def _linear(x: torch.Tensor, weight: ExpertWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = nn.functional.linear(x, plain(weight), bias)
    return weight.layer.adapt(x, y, weight.picked, has_bias=bias is not None)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, of matrices or of stacks of them; x stands on either side."""
    y = torch.matmul(plain(left), plain(right))
    weight, is_left = (left, True) if isinstance(left, ExpertWeight) else (right, False)
    assert isinstance(weight, ExpertWeight)
    x = right if is_left else left
    if is_left:  # W x: columns are tokens
        return weight.layer.adapt(x.transpose(-2, -1), y.transpose(-2, -1), _rows(weight, x)).transpose(-2, -1)
    return weight.layer.adapt(x, y, _rows(weight, x))


def _rows(weight: ExpertWeight, x: torch.Tensor) -> Any:
    """The expert of each entry of the first axis of x: of all experts in order, or of those that were picked."""
    if weight.picked is None and weight.dim() == 3:
        return torch.arange(weight.shape[0], device=x.device)
    return weight.picked


def _grouped(
    func: Callable[..., Any], x: torch.Tensor, weight: ExpertWeight, offs: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Rows of x sorted by expert; `offs` (E,) are the ends of the experts' rows."""
    y = func(x, plain(weight), offs=offs, **options)
    ids = torch.searchsorted(offs, torch.arange(x.shape[0], device=x.device, dtype=offs.dtype), right=True)
    return weight.layer.adapt(x, y, ids.clamp_(max=offs.shape[0] - 1))


GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback", "transformers.grouped_mm_fallback.default"}
ALTERED: dict[Any, Callable[..., Any]] = {
    torch.Tensor.__getitem__: _pick,
    torch.Tensor.transpose: _turn,
    torch.transpose: _turn,
    torch.Tensor.t: _turn,
    torch.Tensor.T.__get__: _turn,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__: _turn,  # type: ignore[attr-defined]
    nn.functional.linear: _linear,
    torch.matmul: _product,
    torch.Tensor.matmul: _product,
    torch.Tensor.__matmul__: _product,
    torch.mm: _product,
    torch.bmm: _product,
}
SEEN = {  # what only looks
    *(getattr(torch.Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "is_cuda", "requires_grad", "layout", "ndim", "is_meta", "is_quantized",
    )),
    torch.Tensor.dim, torch.Tensor.size, torch.Tensor.data_ptr, torch.Tensor.numel, torch.Tensor.stride,
    torch.Tensor.is_contiguous, torch.Tensor.element_size, torch.Tensor.is_floating_point, torch.Tensor.__len__,
    torch.Tensor.storage_offset, torch.Tensor.is_complex, torch.Tensor.__repr__,
}  # fmt: skip


# the module that owns the weight


def _read(name: str, module: nn.Module) -> torch.Tensor | nn.Parameter:
    parameter = module._parameters[name]
    assert parameter is not None
    place = module.__dict__.get(PLACE)
    layer = None if place is None else place[1]
    if layer is None or not layer.changes_output():
        return parameter
    return ExpertWeight.of(parameter, layer, None)


@functools.cache
def reading_class(cls: Any, name: str) -> type[nn.Module]:
    """`cls` whose W_down, called `name`, is read through `_read`."""

    def reduce(self: nn.Module, protocol: Any) -> Any:  # copies and pickles name the class that can be imported
        return _rebuild, (cls, name), self.__dict__

    return type(
        cls.__name__, (cls,),
        {
            name: property(functools.partial(_read, name)), "__module__": cls.__module__,
            "__qualname__": cls.__qualname__, "__reduce_ex__": reduce,
        },
    )  # fmt: skip


def _rebuild(cls: type[nn.Module], name: str) -> nn.Module:
    made: Any = reading_class(cls, name)  # type: ignore[arg-type]
    found: nn.Module = made.__new__(made)
    return found


def attach(module: nn.Module, name: str, layer: Any) -> None:
    """Let the experts `module` read its W_down `name` through the adapters of `layer`."""
    module.__class__ = reading_class(type(module), name)  # type: ignore[arg-type]
    module.__dict__[PLACE] = (name, layer)


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    if module.__dict__.pop(PLACE, None) is not None:
        module.__class__ = type(module).__mro__[1]
