"""Which form computes a call of an adapter: its formula in torch, or one C++ operator that is held to it.

The formula is `transform`, on rows, with the weights that `derive` folds. A kernel that stands for a part of a formula
(Triton's) is the matter of that part, in `kernels`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bem_peft.kept import Kept, kept_of
from bem_peft.kernels import backend, cpp, cpp_operators
from bem_peft.kernels.plain_call import is_plain_call, is_plain_thread
from bem_peft.tuners.base.cpp_forms import CPP_FORMS
from bem_peft.tuners.base.expert_products import ExpertRows, of_each
from bem_peft.tuners.calls.attention_stats import AttentionRows
from bem_peft.tuners.calls.penalised import Penalised
from bem_peft.tuners.steps.optimizer_hooks import Watched
from bem_peft.tuners.steps.sharded import is_distributed

FEW_ROWS = 8
HALF = (torch.bfloat16, torch.float16)
grad_enabled, is_compiling = torch.is_grad_enabled, torch.compiler.is_compiling
MANY, FEW, PACKED = "many rows", "few rows", "packed"  # how derived weights are laid out
SITE = "site"  # what else a scope keeps: the operator of `kernels.cpp` for these weights, called past the dispatcher


def transposed(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """B (..., out, r) -> (..., r, out) in `dtype`; laid out anew where it is kept (no gradient), else a view.

    For the wide side only: a product with A^T is faster from A's own layout. A stack, of each expert's, stays a view.
    """
    turned = weight.to(dtype).mT
    return turned if torch.is_grad_enabled() or turned.dim() == 3 else turned.contiguous()


def widened(weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The weights, those in half precision as float32."""
    return tuple(weight.float() if weight.dtype in HALF else weight for weight in weights)


def is_few_rows(x: torch.Tensor) -> bool:
    """Whether x (N, in) is a decoding step, whose time on a CPU goes into the number of operations."""
    return x.shape[0] <= FEW_ROWS and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Formula(Penalised, Watched):
    """One method's formula at one site. A subclass defines `derive` and `transform`, and may name its `kernel`."""

    in_features: int
    out_features: int
    kernel: str = ""  # the name of its C++ operator; "": it has none
    has_operator: bool = False  # that operator computes it as it is configured
    dropout: float = 0.0  # on the input
    reads_call = False  # reads values of the call: retrieval quality, which tokens are real
    traced_rows: AttentionRows | None = None  # of the attention that runs now, in a compiled region: see call_frame
    observer: list[torch.Tensor] | None = None  # takes PT2's masks
    twin_of: Formula | None = None  # whose parameters, of one `expert`, these are: see `expert_twins`
    expert: int | None = None
    rows: ExpertRows | None = None  # or of each row's own expert

    def derive(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """What `transform` reads, in `dtype`, as a function of the parameters: matrices, of parameters of each expert
        (E, ...) stacks of them."""
        raise NotImplementedError

    def transform(self, x: torch.Tensor, y: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        """y' (N, out) from x (N, in) and y (N, out); all of one dtype."""
        raise NotImplementedError

    def derive_few_rows(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """`derive(dtype)` for a decoding step on a CPU; a subclass may lay the weights out for fewer operations."""
        return self.derive(dtype)

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout on the adapter's input, while training."""
        if self.dropout > 0.0 and self.training:
            return torch.nn.functional.dropout(x, self.dropout)
        return x

    def before_forward(self) -> None:
        """Called before each forward pass that is not compiled, if `is_watched`."""

    def watch_output(self, out: torch.Tensor) -> None:
        """What a method has to see of its output (N, out), in the dtype of y, in training."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, may_overwrite: bool = False) -> torch.Tensor:
        """x (..., in), y (..., out) -> y' (..., out) in the dtype of y. `may_overwrite`: nobody else holds y.

        The dtype of y is the compute dtype; autocast would choose another one behind the formula's back.
        """
        if self.is_watched and not is_compiling():
            self.before_forward()
        kept = None if is_compiling() else kept_of(self)
        if kept and SITE in kept and backend.chosen.is_cpp and not self.training and self.observer is None:
            out: torch.Tensor | None = cpp.run_site(kept[SITE], self._parameters, x, y, may_overwrite)
            if out is not None:
                return out
        if self.has_operator and backend.chosen.is_cpp and y.is_cpu and self.is_plain_call(x, y):
            if self.fits_operator(y):
                packed = self.weights(y.dtype, PACKED)
                if kept is not None and (y.dtype, PACKED, None) in kept:
                    sizes = CPP_FORMS[self.kernel].sizes(self)
                    cpp.build()
                    kept[SITE] = cpp.make_site(self.kernel, self._parameters, packed, sizes, y.dtype)
                return self.operator(x, y, *packed, overwrite=may_overwrite and y.is_contiguous())
            if self.fits_training(y):
                if self.carries_penalties(y):
                    y = self.carry_parameter_penalties(y)
                return self.training_operator(x.to(y.dtype).contiguous(), y.contiguous())
        if not is_compiling() and backend.chosen.untold is not None and self.has_operator and y.is_cpu:
            backend.tell()
        if y.device.type != "meta" and torch.is_autocast_enabled(y.device.type):  # meta knows no autocast
            with torch.autocast(y.device.type, enabled=False):
                return self.in_torch(x, y)
        return self.in_torch(x, y)

    def in_torch(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`forward` by the formula.

        A few rows on a CPU (a decoding step) read the weights as `derive_few_rows` lays them out, and bfloat16 or
        float16 rows are computed in float32, with the rounded weights that longer inputs are computed with: setting up
        a product in half precision costs ten times the product there. float16 rows are so however many they are, as
        what stands between two products may not fit in float16.
        """
        dtype, is_cpu = y.dtype, y.device.type == "cpu"
        if self.reads_call:
            self.call.lead = x.shape[:-1]
        inputs, rows = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
        few_rows = is_cpu and is_few_rows(inputs)
        weights = self.weights(dtype, FEW if few_rows else MANY)
        if self.rows is not None:
            weights = of_each(weights, self.rows)
        if dtype in HALF and (few_rows or (is_cpu and dtype is torch.float16)):
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

    # the C++ operator

    def is_plain_call(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether a C++ operator sees all that there is to this call; a parametrised adapter is a module of modules."""
        return not self._modules and is_plain_call(x, y, *self.held_masters())

    def held_masters(self) -> list[torch.Tensor | None]:
        """The form's masters, None where the config leaves one out; in a replica of DataParallel attributes."""
        return [getattr(self, name, None) for name in CPP_FORMS[self.kernel].masters]

    def fits_operator(self, y: torch.Tensor) -> bool:
        """Whether the C++ operator can take this call: inference on a CPU."""
        if grad_enabled() or self.training or not y.is_cpu or y.dtype not in cpp.DTYPES:
            return False
        return self.observer is None and not torch.compiler.is_compiling()

    def fits_training(self, y: torch.Tensor) -> bool:
        """Whether the C++ operator with a backward can take this call: gradients on a CPU, float32 masters.

        In training without gradients too: a reentrant checkpoint's first pass is what its second one recomputes.
        """
        if not ((grad_enabled() or self.training) and y.is_cpu and y.dtype in cpp.DTYPES and self.observer is None):
            return False
        if torch.compiler.is_compiling() or not CPP_FORMS[self.kernel].fits_training(self):
            return False
        if self.is_penalised and self.training and not self.has_parameter_penalties:
            return False
        return all(p.dtype is torch.float32 and p.is_contiguous() for p in self.held_masters() if p is not None)

    def operator(
        self, x: torch.Tensor, y: torch.Tensor, *packed: torch.Tensor, overwrite: bool = False
    ) -> torch.Tensor:
        """`transform` by one operator, on x (..., in) and y (..., out); the result may stand in y."""
        cpp.build()
        name = f"{self.kernel}_" if overwrite else self.kernel
        out: torch.Tensor = cpp_operators.call(name, x, y, *packed, *CPP_FORMS[self.kernel].sizes(self))
        return out

    def training_operator(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`transform` by an operator that autograd knows; x (..., in) and y (..., out) contiguous, of one dtype."""
        return CPP_FORMS[self.kernel].train(self, x, y)

    def torch_gradients(
        self, is_training: bool, inputs: list[torch.Tensor | None], gradient: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """Gradients of `inputs`, what a training operator was given (x, y and the masters), by the torch form.

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
            twin.__dict__.update(zip(CPP_FORMS[self.kernel].masters, masters, strict=True))
            rows, weights = y.reshape(-1, self.out_features), twin.derive(y.dtype)
            out = twin.transform(x.reshape(-1, self.in_features), rows, *weights).view_as(y)
            wanted = [t for t in given if t is not None and t.requires_grad]
            found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=is_differentiated, allow_unused=True))
        return [next(found) if t is not None and t.requires_grad else None for t in given]

    # derived weights, and when they are kept

    def weights(self, dtype: torch.dtype, layout: str = MANY) -> tuple[torch.Tensor, ...]:
        """The derived weights as `layout` wants them: derived anew, unless a scope of `bem_peft.kept` is open."""
        owner = self.twin_of or self
        kept = None if is_compiling() else kept_of(owner)
        if kept is not None and not is_plain_thread():
            kept = None  # what a tracer, a transform or a mode saw being derived is theirs
        found = None if kept is None else kept.get((dtype, layout, self.expert))
        if kept is None or found is None or grad_enabled():
            return self._derive_anew(dtype, layout, kept)
        current: Any = owner._parameters
        for name, parameter, version, address, _ in found[0]:
            if current[name] is not parameter or parameter._version != version or parameter.data_ptr() != address:
                kept.clear()
                return self._derive_anew(dtype, layout, kept)
        weights: tuple[torch.Tensor, ...] = found[1]
        return weights

    def _derive_anew(self, dtype: torch.dtype, layout: str, kept: Kept | None) -> tuple[torch.Tensor, ...]:
        if layout == PACKED:
            derived = CPP_FORMS[self.kernel].pack(self, dtype)
        elif layout == FEW:
            derived = widened(self.derive_few_rows(dtype))
        else:
            derived = self.derive(dtype)
        parameters = [(name, p) for name, p in (self.twin_of or self)._parameters.items() if p is not None]
        if kept is None or torch.is_grad_enabled():
            return derived
        if is_distributed() or any(type(p) is not nn.Parameter or p.is_inference() for _, p in parameters):
            return derived  # sharding moves storages unseen; a fake or functional tensor has no version to watch
        # the aliases keep the old storages alive, so that no new one can stand at the same address
        seen = [(name, p, p._version, p.data_ptr(), p.detach()) for name, p in parameters]
        kept[dtype, layout, self.expert] = (seen, derived)
        return derived
