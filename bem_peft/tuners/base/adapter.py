"""What the methods share: the maths of one adapter at one site.

An `Adapter` maps what enters a site, x (..., in), and what the base layer returned, y (..., out), to y' (..., out).
A fresh adapter returns y. Its parameters are direct attributes, so that a saved key reads
`<site>.<prefix>_<container>.<parameter>`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from bem_peft.kept import Kept, kept_of
from bem_peft.kernels import backend, cpp
from bem_peft.kernels.plain_call import is_plain_call, is_plain_thread
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.calls.penalty import carry
from bem_peft.tuners.calls.penalty_call import Sequences, sequences_of
from bem_peft.tuners.steps.optimizer_hooks import watch
from bem_peft.tuners.steps.sharded import is_distributed


@dataclass(frozen=True)
class SiteShape:
    """What an adapter may know of its site. `weight()` gives W (out, in), dequantised, and is called at most once."""

    name: str
    in_features: int
    out_features: int
    num_heads: int | None = None
    weight: Callable[[], torch.Tensor] | None = None


FEW_ROWS = 8
HALF = (torch.bfloat16, torch.float16)
grad_enabled, is_compiling = torch.is_grad_enabled, torch.compiler.is_compiling
MANY, FEW, PACKED = "many rows", "few rows", "packed"  # how derived weights are laid out
SITE = "site"  # what else a scope keeps: the operator of `kernels.cpp` for these weights, called past the dispatcher


def transposed(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """B (out, r) -> (r, out) in `dtype`; laid out anew where it is kept (no gradient), a view where it is not.

    For the wide side only: a product with A^T is faster from A's own layout.
    """
    turned = weight.to(dtype).t()
    return turned if torch.is_grad_enabled() else turned.contiguous()


def widened(weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The weights, those in half precision as float32."""
    return tuple(weight.float() if weight.dtype in HALF else weight for weight in weights)


def is_few_rows(x: torch.Tensor) -> bool:
    """Whether x (N, in) is a decoding step, whose time on a CPU goes into the number of operations."""
    return x.shape[0] <= FEW_ROWS and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Adapter(nn.Module):
    """The maths of one method at one site; see the module docstring.

    A subclass defines `reset_parameters`, `derive` (what the forward reads: the parameters, folded, in its dtype)
    and `transform` (the formula, on rows).
    """

    variant: ClassVar[str] = ""  # PT1 to PT4
    lr_groups: ClassVar[dict[str, str]] = {}  # parameter -> group of the optimizer
    is_mergeable: bool = False
    has_operator: bool = False  # one of `kernels.cpp` computes it as it is configured
    masters: tuple[str, ...] = ()  # the parameters that its training operator takes, in that order
    traced_rows: Any = None  # exact rows of the attention that runs now, in a compiled region: see call_frame
    watch_order: int = 0
    observer: Any = None  # a list that takes PT2's masks
    is_watched: bool = False  # has something to do around an optimizer step
    reads_call = False  # reads values of the call: retrieval quality, which tokens are real
    token_penalties: tuple[str, ...] = ()  # penalties that are on and read tokens, by field name
    is_penalised = False
    merge_refusal: str = (
        "its update depends on the token, so no weight equals it; use `export_lora` for an approximation"
    )

    def __init__(self, config: Any, site: SiteShape, call: CallState) -> None:
        super().__init__()
        if backend.chosen.is_cpp:
            cpp.build()  # before anything counts its products
        self.site_name = site.name
        self.in_features, self.out_features = site.in_features, site.out_features
        self.scaling = float(config.scaling)
        self.call = call

    def reset_parameters(self, init_weights: bool, site: SiteShape) -> None:
        """Fill the parameters; with `init_weights` the adapter is the identity."""
        raise NotImplementedError

    def derive(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """What `transform` reads, in `dtype`, as a function of the parameters."""
        raise NotImplementedError

    def transform(self, x: torch.Tensor, y: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        """y' (N, out) from x (N, in) and y (N, out); all of one dtype."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, y: torch.Tensor, may_overwrite: bool = False) -> torch.Tensor:
        """x (..., in), y (..., out) -> y' (..., out) in the dtype of y.

        The dtype of y is the compute dtype; autocast would choose another one behind the formula's back. A few rows
        on a CPU (a decoding step) read the weights as `derive_few_rows` lays them out, and bfloat16 or float16 rows
        are computed in float32, with the rounded weights that longer inputs are computed with: setting up a product
        in half precision costs ten times the product there. float16 rows are so however many they are, as what stands
        between two products may not fit in float16. `may_overwrite`: nobody else holds y.
        """
        if self.is_watched and not is_compiling():
            self.before_forward()
        kept = None if is_compiling() else kept_of(self)
        if kept and SITE in kept and backend.chosen.is_cpp and not self.training and self.observer is None:
            out: torch.Tensor | None = cpp.run_site(kept[SITE], self._parameters, x, y, may_overwrite)
            if out is not None:
                return out
        if self.has_operator and backend.chosen.is_cpp and self.is_plain_call(x, y):
            if self.fits_operator(y):
                packed = self.weights(y.dtype, PACKED)
                if kept is not None and (y.dtype, PACKED) in kept:
                    name, options = self.operator_call()
                    kept[SITE] = cpp.make_site(name, self._parameters, packed, options)
                return self.operator(x, y, *packed, overwrite=may_overwrite and y.is_contiguous())
            if self.fits_training(y):
                cpp.name_caller(self)
                return self.training_operator(x.to(y.dtype).contiguous(), y.contiguous())
        kind = y.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return Adapter.forward(self, x, y)
        dtype = y.dtype
        if self.reads_call:
            self.call.lead = x.shape[:-1]
        inputs, rows = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
        few_rows = kind == "cpu" and is_few_rows(inputs)
        weights = self.weights(dtype, FEW if few_rows else MANY)
        if dtype in HALF and (few_rows or (kind == "cpu" and dtype is torch.float16)):
            if not few_rows:
                weights = widened(weights)
            out = self.transform(inputs.float(), rows.float(), *weights).to(dtype)
        else:
            if inputs.dtype is not dtype:
                inputs = inputs.to(dtype)
            out = self.transform(inputs, rows, *weights)
        if self.training:
            self.watch_output(out)
        return out.view(y.shape)

    def watch_output(self, out: torch.Tensor) -> None:
        """What a method has to see of its output (N, out), in the dtype of y, in training."""

    def is_plain_call(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether a C++ operator sees all that there is to this call; a parametrised adapter is a module of modules."""
        return not self._modules and is_plain_call(x, y, *self.held_masters())

    def held_masters(self) -> list[torch.Tensor | None]:
        """The `masters`, None where the config leaves one out; a replica of DataParallel holds them as attributes."""
        return [getattr(self, name, None) for name in self.masters]

    def fits_operator(self, y: torch.Tensor) -> bool:
        """Whether the C++ operator of `kernels.cpp` can take this call: inference on a CPU."""
        if grad_enabled() or self.training or not y.is_cpu or y.dtype not in cpp.DTYPES:
            return False
        return not torch.compiler.is_compiling()

    def pack(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """What `operator` reads: wide weights in `dtype`, small ones in float32 of their values rounded to it."""
        raise NotImplementedError

    def operator_call(self) -> tuple[str, tuple[Any, ...]]:
        """The operator's name, and its arguments after the packed weights."""
        raise NotImplementedError

    def operator(
        self, x: torch.Tensor, y: torch.Tensor, *packed: torch.Tensor, overwrite: bool = False
    ) -> torch.Tensor:
        """`transform` by one operator, on x (..., in) and y (..., out); the result may stand in y."""
        name, options = self.operator_call()
        run = getattr(cpp.build(), f"{name}_" if overwrite else name)
        out: torch.Tensor = run(x, y, *packed, *options)
        return out

    def fits_training(self, y: torch.Tensor) -> bool:
        """Whether the C++ operator with a backward can take this call: gradients on a CPU, float32 masters."""
        if not (grad_enabled() and y.is_cpu and y.dtype in cpp.DTYPES):
            return False
        if torch.compiler.is_compiling() or self.carries_penalties(y):
            return False
        return all(p.dtype is torch.float32 and p.is_contiguous() for p in self.held_masters() if p is not None)

    def training_operator(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`transform` by an operator that autograd knows; x (..., in) and y (..., out) contiguous, of one dtype."""
        raise NotImplementedError

    def torch_gradients(
        self, is_training: bool, inputs: list[torch.Tensor | None], gradient: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """Gradients of `inputs`, what a training operator was given (x, y and the `masters`), by the torch form.

        None where an input has none. With gradients enabled they can be differentiated again.
        """
        is_differentiated = torch.is_grad_enabled()
        twin = object.__new__(type(self))  # this adapter's formula on the operator's own masters, without its state
        twin.__dict__.update(self.__dict__)
        twin.__dict__.update(training=is_training, dropout=0.0, observer=None, is_guarded=False, is_penalised=False)
        with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
            given = [
                None if t is None else t.view_as(t) if is_differentiated else t.detach().requires_grad_(t.requires_grad)
                for t in inputs
            ]
            x, y, *masters = given
            assert x is not None
            assert y is not None
            twin.__dict__.update(zip(self.masters, masters, strict=True))
            rows, weights = y.reshape(-1, self.out_features), twin.derive(y.dtype)
            out = twin.transform(x.reshape(-1, self.in_features), rows, *weights).view_as(y)
            wanted = [t for t in given if t is not None and t.requires_grad]
            found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=is_differentiated, allow_unused=True))
        return [next(found) if t is not None and t.requires_grad else None for t in given]

    def derive_few_rows(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """`derive(dtype)` for a decoding step on a CPU; a subclass may lay the weights out for fewer operations."""
        return self.derive(dtype)

    def weights(self, dtype: torch.dtype, layout: str = MANY) -> tuple[torch.Tensor, ...]:
        """The derived weights as `layout` wants them: derived anew, unless a scope of `bem_peft.kept` is open."""
        kept = None if is_compiling() else kept_of(self)
        if kept is not None and not is_plain_thread():
            kept = None  # what a tracer, a transform or a mode saw being derived is theirs
        found = None if kept is None else kept.get((dtype, layout))
        if kept is None or found is None or grad_enabled():
            return self._derive_anew(dtype, layout, kept)
        current: Any = self._parameters
        for name, parameter, version, address, _ in found[0]:
            if current[name] is not parameter or parameter._version != version or parameter.data_ptr() != address:
                kept.clear()
                return self._derive_anew(dtype, layout, kept)
        weights: tuple[torch.Tensor, ...] = found[1]
        return weights

    def _derive_anew(self, dtype: torch.dtype, layout: str, kept: Kept | None) -> tuple[torch.Tensor, ...]:
        form = {MANY: self.derive, FEW: self.derive_few_rows, PACKED: self.pack}[layout]
        derived = form(dtype)
        if layout == FEW:
            derived = widened(derived)
        parameters = [(name, p) for name, p in self._parameters.items() if p is not None]
        if kept is None or torch.is_grad_enabled():
            return derived
        if is_distributed() or any(type(p) is not nn.Parameter or p.is_inference() for _, p in parameters):
            return derived  # sharding moves storages unseen; a fake or functional tensor has no version to watch
        # the aliases keep the old storages alive, so that no new one can stand at the same address
        seen = [(name, p, p._version, p.data_ptr(), p.detach()) for name, p in parameters]
        kept[dtype, layout] = (seen, derived)
        return derived

    def merge_obstacle(self, has_bias: bool) -> str | None:
        """Why the adapter cannot be merged into a layer with or without a bias; None: it can."""
        return None if self.is_mergeable else self.merge_refusal

    def refuse_merge(self, has_bias: bool) -> None:
        """Raise ValueError where there is an obstacle to merging."""
        obstacle = self.merge_obstacle(has_bias)
        if obstacle is not None:
            raise ValueError(f"{type(self).__name__} at {self.site_name} cannot be merged: {obstacle}.")

    def merge_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W (out, in) and bias with the adapter in them. Raises ValueError where the update is not linear in x."""
        self.refuse_merge(bias is not None)
        raise NotImplementedError

    def unmerge_from(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The inverse of `merge_into`."""
        self.refuse_merge(bias is not None)
        raise NotImplementedError

    # penalties

    def carries_penalties(self, y: torch.Tensor) -> bool:
        """Whether this call carries them: in training alone, and not where a budget is counted on fake tensors."""
        is_training = self.is_penalised and self.training and torch.is_grad_enabled()
        return is_training and not isinstance(y, FakeTensor)

    def penalise(
        self, y: torch.Tensor, name: str, strength: float | torch.Tensor, value: torch.Tensor, *, once: bool = False
    ) -> torch.Tensor:
        """y, carrying `strength * value` to the gradient; `once`: the value is of parameters alone.

        Raises:
            RuntimeError: the call did not go through the model, or is being compiled.
        """
        call = self.call.values.penalty
        if torch.compiler.is_compiling():
            raise RuntimeError(f"a penalty ({name}) cannot be compiled: train without torch.compile, or set it to 0.")
        if call is None:
            raise RuntimeError(
                f"{self.site_name} has a penalty ({name}) and was called without its model: call the whole model."
            )
        weighted = strength * value
        self.call.log.record(name, self.site_name, value, weighted)
        return carry(y, weighted, call, (self.site_name, id(self), name) if once else None)

    def sequences(self, tokens: int) -> Sequences:
        """The sequences that the site's rows belong to. Raises RuntimeError where the call does not tell them."""
        call = self.call.values.penalty
        found: Sequences | str | None = "the call did not go through the model"
        if call is not None:
            stack = "" if "" in call.stacks else "decoder" if "decoder" in self.site_name.split(".") else "encoder"
            found = call.stacks[stack]
        if found is None:
            lead = self.call.lead if len(self.call.lead) > 1 else torch.Size((1, tokens))
            found = sequences_of(
                torch.Size((lead[0], tokens // lead[0])), next(self.parameters()).device, None, None, None
            )
        if isinstance(found, Sequences) and found.index.shape[0] != tokens:
            found = f"it sees {tuple(self.call.lead)} rows, the call has {found.index.shape[0]} tokens"
        if isinstance(found, str):
            raise RuntimeError(
                f"the penalty at {self.site_name} counts real tokens only, and cannot tell them: {found}."
            )
        return found

    def on_added(self) -> None:
        """Called when the adapter has been added to a model, whose `call` is known then."""

    def before_forward(self) -> None:
        """Called before each forward pass that is not compiled, if `is_watched`."""

    # around an optimizer step, if `is_watched`; see `optimizer_hooks`

    def judge(self, adapters: Sequence[Adapter], starting: Set[Adapter]) -> bool:
        """Asked of one of `adapters`, all of its class, before each use of their gradients: is there an emergency?

        `starting`: those of all adapters whose training step begins now.
        """
        return False

    def before_optimizer_step(self) -> None:
        """Called before each step of an optimizer that holds one of the parameters."""

    def after_optimizer_step(self, is_first: bool) -> None:
        """Called after each such step; `is_first`: the first one of a training step."""

    def training_state(self) -> dict[str, dict[str, Any]]:
        """What is remembered between steps, tensors like the parameter or numbers: parameter -> name -> value."""
        return {}

    def restore_training_state(self, name: str, state: dict[str, Any]) -> None:
        """Remember again what `training_state` gave for the parameter `name`."""

    obsolete_keys: ClassVar[tuple[str, ...]] = ()  # beginnings of keys that older files hold and nothing reads

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for key in [key for key in state_dict if key.startswith(tuple(prefix + old for old in self.obsolete_keys))]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.is_watched:
            watch(self)

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters())
        return f"in_features={self.in_features}, out_features={self.out_features}, scaling={self.scaling}, {sizes}"
