r"""Fused experts as a site: W_down of all experts is one parameter (E, out, in) that products read expert by expert.

The module that owns it stays as it is and computes as it does (eager, batched_mm, grouped_mm, a loop of its own). Only
what it reads as its W_down changes: in a forward pass of the layer around it, while an adapter is on, the attribute
gives an `ExpertWeight`, which knows which experts were picked from it, and whose products are  y = base(x), then
y <- adapter(x, y)  on the rows x of the tokens. So the cost is that of the tokens that reach an expert, nothing of size
E x out x in is built, and what a router decides is not touched. An operator that is not known as a product, a pick or a
look at the shape is refused by name: no way of computing goes past the adapter without a word.

The attribute is a property of a class of the module's own, as torch.nn.utils.parametrize makes it; the parameter
stays where it is and is what everybody else sees (`state_dict`, FSDP2, `.to`); calls of several threads share nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

PLACE = "_bem_peft_site"  # in the __dict__ of an experts module: (name of its W_down, the layer whose adapters act)


class ExpertWeight:
    """W_down of the experts, or of those that `picked` says, read by a product. Torch's functions take it for a tensor.

    Not a subclass of Tensor: it stands for a parameter of any kind, and neither fake tensors nor a compiler know two
    kinds in one.

    Args:
        layer: an `AdapterExperts`.
        picked: None for all experts in order, else their ids, one a row of the weight, or a single id.
    """

    def __init__(self, weight: torch.Tensor, layer: Any, picked: Any = None) -> None:
        self.weight, self.layer, self.picked = weight, layer, picked

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        product = PRODUCTS.get(func) or (_grouped(func) if name in GROUPED else None)
        if product is None:
            weight = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, ExpertWeight))
            raise weight.unknown(name)
        return product(*args, **(kwargs or {}))

    def unknown(self, name: str) -> NotImplementedError:
        return NotImplementedError(
            f"{self.layer.site_name}: its experts read their W_down by `{name}`, which bem_peft does not know as a "
            "product with it; set fused_experts='skip' to leave the experts as they are, or choose another "
            "`experts_implementation`."
        )

    def __getattr__(self, name: str) -> Any:
        if name in SEEN:
            return getattr(self.__dict__["weight"], name)
        if hasattr(torch.Tensor, name):
            raise self.unknown(name)
        raise AttributeError(f"a tensor has no {name!r}.")

    def __len__(self) -> int:
        return self.weight.shape[0]

    def __getitem__(self, index: Any) -> ExpertWeight:
        if self.picked is not None or isinstance(index, (tuple, slice)) or index is None:
            raise NotImplementedError(f"{self.layer.site_name}: its experts read their W_down at {index!r}.")
        return ExpertWeight(self.weight[index], self.layer, index)

    def transpose(self, *axes: int) -> ExpertWeight:
        if {axis % self.weight.dim() for axis in axes} != {self.weight.dim() - 2, self.weight.dim() - 1}:
            raise NotImplementedError(f"{self.layer.site_name}: its experts transpose their W_down by {axes}.")
        return self.t()

    def t(self) -> ExpertWeight:
        return ExpertWeight(self.weight.transpose(-2, -1), self.layer, self.picked)

    T = mT = property(t)  # noqa: N815

    def matmul(self, right: torch.Tensor) -> torch.Tensor:
        """W x: columns are tokens."""
        y = torch.matmul(self.weight, right).transpose(-2, -1)
        return self._adapted(right.transpose(-2, -1), y).transpose(-2, -1)

    __matmul__ = bmm = mm = matmul

    def __rmatmul__(self, left: torch.Tensor) -> torch.Tensor:
        """x W^T: rows are tokens."""
        return self._adapted(left, torch.matmul(left, self.weight))

    def _adapted(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rows = self.picked
        if rows is None and self.weight.dim() == 3:  # all experts in order
            rows = torch.arange(self.weight.shape[0], device=x.device)
        adapted: torch.Tensor = self.layer.adapt(x, y, rows)
        return adapted


def _linear(x: torch.Tensor, weight: ExpertWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = nn.functional.linear(x, weight.weight, bias)
    adapted: torch.Tensor = weight.layer.adapt(x, y, weight.picked, has_bias=bias is not None)
    return adapted


def _product(left: torch.Tensor | ExpertWeight, right: torch.Tensor | ExpertWeight) -> torch.Tensor:
    """left @ right, of matrices or of stacks of them; x stands on either side."""
    if isinstance(left, ExpertWeight):
        assert isinstance(right, torch.Tensor)
        return left.matmul(right)
    assert isinstance(right, ExpertWeight)
    return right.__rmatmul__(left)


def _grouped(func: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    def product(x: torch.Tensor, weight: ExpertWeight, offs: torch.Tensor, **options: Any) -> torch.Tensor:
        """Rows of x sorted by expert; `offs` (E,) are the ends of the experts' rows."""
        y = func(x, weight.weight, offs=offs, **options)
        ids = torch.searchsorted(offs, torch.arange(x.shape[0], device=x.device, dtype=offs.dtype), right=True)
        adapted: torch.Tensor = weight.layer.adapt(x, y, ids.clamp_(max=offs.shape[0] - 1))
        return adapted

    return product


GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback", "transformers.grouped_mm_fallback.default"}
PRODUCTS: dict[Any, Callable[..., Any]] = {
    nn.functional.linear: _linear,
    torch.matmul: _product,
    torch.Tensor.matmul: _product,
    torch.Tensor.__matmul__: _product,
    torch.mm: _product,
    torch.Tensor.mm: _product,
    torch.bmm: _product,
    torch.Tensor.bmm: _product,
    torch.transpose: ExpertWeight.transpose,
}
SEEN = {  # what only looks
    "shape", "dtype", "device", "is_cuda", "requires_grad", "layout", "ndim", "is_meta", "is_quantized", "dim", "size",
    "data_ptr", "numel", "stride", "is_contiguous", "element_size", "is_floating_point", "storage_offset", "is_complex",
}  # fmt: skip


# the module that owns the weight


def _read(name: str, module: nn.Module) -> ExpertWeight | nn.Parameter:
    parameter = module._parameters[name]
    assert parameter is not None
    place = module.__dict__.get(PLACE)
    if place is None or not place[1].passes or not place[1].changes_output():
        return parameter
    layer = place[1]
    return ExpertWeight(parameter, layer)


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
