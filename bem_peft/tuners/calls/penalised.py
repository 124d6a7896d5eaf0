"""What an adapter with a penalty does in a call: whether it carries it now, and over which sequences it averages."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.calls.penalty import carry
from bem_peft.tuners.calls.penalty_call import Sequences, sequences_of


class Penalised(nn.Module):
    """A module that may have penalties; by itself it has none."""

    site_name: str
    call: CallState
    is_penalised = False
    token_penalties: tuple[str, ...] = ()  # penalties that are on and read tokens, by field name
    num_experts: int | None = None  # of fused experts that have parameters of their own
    has_parameter_penalties = False  # all of its penalties are of parameters: `carry_parameter_penalties` carries them

    def carries_penalties(self, y: torch.Tensor) -> bool:
        """Whether this call carries them: in training alone, and not where a budget is counted on fake tensors."""
        is_training = self.is_penalised and self.training and torch.is_grad_enabled()
        return is_training and not isinstance(y, FakeTensor)

    def carry_parameter_penalties(self, y: torch.Tensor) -> torch.Tensor:
        """y with the penalties that are of parameters alone."""
        return y

    def penalise(
        self, y: torch.Tensor, name: str, strength: float | torch.Tensor, value: torch.Tensor, *, once: bool = False
    ) -> torch.Tensor:
        """y, carrying `strength * value` to the gradient; `once`: the value is of parameters alone.

        Raises:
            RuntimeError: the call did not go through the model.
        """
        call = self.call.values.penalty
        if call is None:
            raise RuntimeError(
                f"{self.site_name} has a penalty ({name}) and was called without its model: call the whole model."
            )
        weighted, owner = strength * value, (self.site_name, id(self), name) if once else None
        if torch.compiler.is_compiling():
            call.add_compiled(name, self.site_name, value, weighted, owner)
            return y
        self.call.log.record(name, self.site_name, value, weighted)
        return carry(y, weighted, call, owner)

    def penalise_tokens(
        self, y: torch.Tensor, values: torch.Tensor, experts: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """y with the penalties that the rows' `values` (N, ...) give; at fused experts what leaves them carries these.

        experts: whose parameters the rows met, where each expert has its own.
        """
        routing = self.call.routing
        if routing is None:
            return self.penalise_rows(y, values, self.sequences(values.shape[0]))
        routing.add(self, values, experts)
        return y

    def penalise_rows(self, y: torch.Tensor, values: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """y with the penalties of tokens, for `values` (N, ...) of rows that belong to `sequences`."""
        raise NotImplementedError

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
