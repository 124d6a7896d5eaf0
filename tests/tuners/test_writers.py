"""I13: whatever wrote the weights, a forward pass without gradients gives what a deep copy gives, bit for bit.

Writers x methods x forms (torch, C++), plain, after `generate`, checkpointed, inside a Trainer and between rollouts. A
deep copy has its own parameters and nothing kept, so it cannot share the fault.
"""

from __future__ import annotations

import copy
import inspect
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import Trainer, TrainerCallback, TrainingArguments

from bem_peft import kept_weights, use_kernels
from bem_peft.kept import kept_of
from bem_peft.tuners.base.adapter import Adapter
from tests.contract.methods import METHODS, adapted, adapter_parameters
from tests.tiny_models import VOCABULARY, tokens

FORMS = ("torch", "cpp")
methods, forms = pytest.mark.parametrize("method", METHODS), pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def _torch_form_after() -> Iterator[None]:
    yield
    use_kernels("torch")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens(), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    return torch.stack(out.scores)


# -- writers: each changes every parameter of the adapters

Writer = Callable[[nn.Module], None]


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in adapter_parameters(model).values() if p.requires_grad]


def stepped(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Writer:
    def write(model: nn.Module) -> None:
        optimizer = make(parameters(model))

        def closure() -> torch.Tensor:
            for i, parameter in enumerate(parameters(model)):
                parameter.grad = torch.full_like(parameter, 0.1 + 0.01 * i)
            return torch.tensor(1.0)

        closure()
        optimizer.step(closure)  # type: ignore[arg-type]
        for parameter in parameters(model):
            parameter.grad = None

    return write


def torch_optimizers() -> dict[str, Writer]:
    """Every optimizer of the installed torch, in each form that a CPU takes."""
    found: dict[str, Writer] = {}
    for name, cls in vars(torch.optim).items():
        if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)) or cls is torch.optim.Optimizer:
            continue
        for form in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"capturable": True}):
            taken = inspect.signature(cls).parameters
            if set(form) - set(taken) or (not form and "foreach" in taken):  # without either it is one of the two
                continue

            def make(ps: list[nn.Parameter], cls: Any = cls, form: dict[str, bool] = form) -> Any:
                matrices = cls.__name__ == "Muon"  # which takes nothing else
                return cls([p for p in ps if p.dim() == 2 or not matrices], lr=0.05, **form)

            trial = nn.Parameter(torch.ones(4, 4))
            trial.grad = torch.ones(4, 4)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    make([trial]).step(*((lambda: torch.tensor(1.0),) if name == "LBFGS" else ()))
            except (RuntimeError, AssertionError, ValueError):  # wants CUDA, sparse gradients, or two dimensions
                continue
            found[f"{name} {'for-loop' if form == {'foreach': False} else ''.join(form) or 'default'}"] = stepped(make)
    return found


def bitsandbytes_optimizers() -> dict[str, Writer]:
    """Every optimizer of bitsandbytes that runs on a CPU; none where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes
    except ImportError:
        return {}
    found: dict[str, Writer] = {}
    for name, cls in vars(bitsandbytes.optim).items():
        if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)):
            continue

        def make(ps: list[nn.Parameter], cls: Any = cls) -> Any:
            options = {"momentum": 0.9} if "momentum" in inspect.signature(cls).parameters else {}
            return cls(ps, lr=0.05, **options)

        trial = nn.Parameter(torch.ones(64, 64))
        trial.grad = torch.ones(64, 64)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make([trial]).step()
        except (RuntimeError, AssertionError, ValueError, NotImplementedError, TypeError, AttributeError, KeyError):
            continue
        if not torch.equal(trial, torch.ones(64, 64)):
            found[f"bitsandbytes {name}"] = stepped(make)
    return found


def data(model: nn.Module) -> None:
    for parameter in parameters(model):
        parameter.data.mul_(1.5).add_(0.01)


def numpy_view(model: nn.Module) -> None:
    for parameter in parameters(model):
        array = parameter.detach().numpy()
        array *= 1.5
        array += 0.01


def storage_view(model: nn.Module) -> None:
    for parameter in parameters(model):
        view = torch.empty(0).set_(parameter.untyped_storage(), 0, (parameter.numel(),))  # type: ignore[call-overload]
        view.mul_(1.5).add_(0.01)


def averaged(model: nn.Module) -> None:
    """An exponential moving average written back, as callbacks do before an evaluation."""
    for parameter in parameters(model):
        parameter.data.lerp_(torch.ones_like(parameter), 0.3)


def state_dict(model: nn.Module) -> None:
    model.load_state_dict(
        {name: p.detach() * 1.5 + 0.01 for name, p in adapter_parameters(model).items()}, strict=False
    )


def assigned_state_dict(model: nn.Module) -> None:
    state = {n: nn.Parameter(p.detach() * 1.5 + 0.01) for n, p in adapter_parameters(model).items()}
    model.load_state_dict(state, strict=False, assign=True)


def swapped(model: nn.Module) -> None:
    for parameter in parameters(model):
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 1.5 + 0.01))


def replaced(model: nn.Module) -> None:
    for adapter in adapters(model):
        for name, parameter in list(adapter._parameters.items()):
            if parameter is not None:
                setattr(adapter, name, nn.Parameter(parameter.detach() * 1.5 + 0.01))


def scaled(model: nn.Module) -> None:
    for adapter in adapters(model):
        adapter.scaling *= 1.5


def other_process(model: nn.Module) -> None:
    """A trainer in another process writes through shared memory."""
    model.share_memory()
    child = os.fork()
    if child == 0:
        numpy_view(model)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


class Times(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor


def adapters(model: nn.Module) -> list[Adapter]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


WRITERS: dict[str, Writer] = {
    **torch_optimizers(),
    **bitsandbytes_optimizers(),
    ".data": data,
    "numpy": numpy_view,
    "storage view": storage_view,
    "moving average": averaged,
    "load_state_dict": state_dict,
    "load_state_dict(assign)": assigned_state_dict,
    "swap_tensors": swapped,
    "new parameters": replaced,
    "another process": other_process,
}


def test_the_writers_are_all_that_can_be_had() -> None:
    names = " ".join(WRITERS)
    for expected in ("AdamW fused", "Adam fused", "SGD fused", "Adagrad fused", "Adafactor", "LBFGS", "Muon", "ASGD"):
        if hasattr(torch.optim, expected.split()[0]):
            assert expected in names
    assert len(WRITERS) >= 40


@methods
@forms
@pytest.mark.parametrize("writer", WRITERS)
def test_a_forward_without_gradients_is_that_of_a_deep_copy(writer: str, method: str, form: str) -> None:
    use_kernels(form)
    model = adapted(method, "llama")
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optimizers on their own features
        WRITERS[writer](model)
    after = logits(model)
    assert not torch.equal(after, before), "the writer changed nothing"
    assert torch.equal(after, logits(copy.deepcopy(model)))


@methods
@forms
def test_a_changed_scaling_is_seen(method: str, form: str) -> None:
    use_kernels(form)
    model = adapted(method, "llama")
    before = logits(model)
    scaled(model)
    assert torch.equal(logits(model), logits(copy.deepcopy(model)))
    if method != "film":  # which has no update to scale
        assert not torch.equal(logits(model), before)


@methods
@forms
def test_flat_buffers_are_seen(method: str, form: str) -> None:
    """Parameters that are views of one buffer, which an optimizer writes whole (FSDP1, DeepSpeed, apex)."""
    use_kernels(form)
    model = adapted(method, "llama")
    flat = torch.cat([p.detach().reshape(-1) for p in parameters(model)])
    start = 0
    for parameter in parameters(model):
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    before = logits(model)
    flat.mul_(1.5).add_(0.01)
    after = logits(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, logits(copy.deepcopy(model)))


@methods
@forms
def test_a_parametrised_parameter_is_seen(method: str, form: str) -> None:
    use_kernels(form)
    model = adapted(method, "llama")
    factors = []
    for adapter in adapters(model):
        for name in [n for n, p in adapter._parameters.items() if p is not None]:
            factors.append(Times())
            parametrize.register_parametrization(adapter, name, factors[-1])
    before = logits(model)
    for factor in factors:
        factor.factor = 1.5
    after = logits(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, logits(copy.deepcopy(model)))


@methods
@forms
def test_a_replica_of_data_parallel_has_its_own_weights(method: str, form: str) -> None:
    use_kernels(form)
    model = adapted(method, "llama")
    logits(model)
    adapter = adapters(model)[0]
    replica = adapter._replicate_for_data_parallel()
    for name, parameter in adapter._parameters.items():
        if parameter is not None:
            setattr(replica, name, parameter.detach() * 1.5 + 0.01)
    own = copy.deepcopy(adapter)
    for parameter in own.parameters():
        parameter.data.mul_(1.5).add_(0.01)
    x, y = torch.randn(3, adapter.in_features), torch.randn(3, adapter.out_features)
    with torch.no_grad():
        assert torch.equal(replica(x, y), own(x, y))
        assert not torch.equal(replica(x, y), adapter(x, y))


@methods
@forms
@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0)])
def test_inputs_of_no_tokens_pass_as_through_a_linear_layer(method: str, form: str, shape: tuple[int, ...]) -> None:
    use_kernels(form)
    for adapter in adapters(adapted(method, "llama")):
        x = torch.randn(*shape, adapter.in_features, requires_grad=True)
        y = nn.Linear(adapter.in_features, adapter.out_features)(x)
        with torch.no_grad():
            assert adapter.eval()(x, y).shape == y.shape
        out = adapter.train()(x, y)
        out.sum().backward()
        assert out.shape == y.shape
        assert x.grad is not None
        assert x.grad.shape == x.shape


# -- the scope


@methods
@forms
def test_weights_are_kept_inside_a_scope_and_gone_after_it(method: str, form: str) -> None:
    use_kernels(form)
    model = adapted(method, "llama")
    expected = logits(model)
    other = (
        adapted(method, "llama", seed=3) if "seed" in inspect.signature(adapted).parameters else adapted(method, "gpt2")
    )
    with kept_weights(model):
        assert torch.equal(logits(model), expected)
        logits(other)
        assert all(kept_of(adapter) for adapter in adapters(model)), "nothing was kept"
        assert not any(kept_of(adapter) for adapter in adapters(other)), "another model's weights were kept"
        assert torch.equal(logits(model), expected)
    assert all(kept_of(adapter) is None for adapter in adapters(model))
    numpy_view(model)
    assert torch.equal(logits(model), logits(copy.deepcopy(model)))


def test_a_scope_ends_with_an_exception_and_belongs_to_its_thread() -> None:
    import threading

    model = adapted("kronecker", "llama")
    seen: list[object] = []

    def scoped() -> None:
        with kept_weights(model):
            thread = threading.Thread(target=lambda: seen.append(kept_of(adapters(model)[0])))
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        scoped()
    assert seen == [None]
    assert kept_of(adapters(model)[0]) is None


# -- training


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, VOCABULARY, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones(8, dtype=torch.long)}


@methods
@forms
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_training_with_a_fused_optimizer_is_plain_training(
    method: str, form: str, reentrant: bool
) -> None:
    """Reentrant checkpointing runs the first pass without gradients: stale weights there make training itself wrong."""
    use_kernels(form)

    def losses(fused: bool, checkpointed: bool) -> list[float]:
        model = adapted(method, "llama").train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        optimizer = torch.optim.AdamW(parameters(model), lr=3e-3, fused=fused)
        found = []
        for _ in range(4):
            loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    expected = losses(fused=False, checkpointed=False)
    assert max(expected) - min(expected) > 1e-4
    assert losses(fused=True, checkpointed=True) == pytest.approx(expected, rel=1e-4)


@methods
@forms
def test_evaluation_in_a_trainer_with_defaults_is_that_of_a_deep_copy(method: str, form: str, tmp_path: Path) -> None:
    """`adamw_torch_fused` is the default; the best checkpoint is the best by the losses of deep copies."""
    use_kernels(form)
    truth: list[float] = []

    class Copies(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            rows = [Rows()[i] for i in range(16)]
            batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            with torch.no_grad():
                truth.append(float(copy.deepcopy(model).eval()(**batch).loss))

    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
        learning_rate=1e-2, per_device_eval_batch_size=16, report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    model = adapted(method, "llama")
    trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[Copies()])
    with redirect_stdout(io.StringIO()):
        trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged == pytest.approx(truth, rel=1e-6)
    assert len(set(logged)) == 3, "nothing was trained"
    assert trainer.state.best_metric == pytest.approx(min(truth), rel=1e-6)
    best = logits(trainer.model.eval())
    assert torch.equal(best, logits(copy.deepcopy(trainer.model)))


@methods
@forms
def test_rollouts_between_steps_use_the_weights_of_now(method: str, form: str) -> None:
    """As GRPO: generate, step a fused optimizer, generate."""
    use_kernels(form)
    model = adapted(method, "llama")
    optimizer = torch.optim.AdamW(parameters(model), lr=3e-2, fused=True)
    seen = [answers(model)]
    for _ in range(2):
        model.train()
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        seen.append(answers(model))
        assert torch.equal(seen[-1], answers(copy.deepcopy(model)))
        assert not torch.equal(seen[-1], seen[-2])


@forms
@methods
def test_a_grpo_rollout_uses_the_weights_of_now(method: str, form: str, tmp_path: Path) -> None:
    """TRL's GRPOTrainer with its default optimizer: before each reward, the policy equals a deep copy of itself."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tests.training.equalities import word_tokenizer

    use_kernels(form)
    model, seen = adapted(method, "llama"), []

    def reward(completions: list[str], **_: Any) -> list[float]:
        policy = trainer.model
        was_training = policy.training
        policy.eval()
        twin = copy.deepcopy(policy)
        assert torch.equal(logits(policy), logits(twin))
        assert torch.equal(answers(policy), answers(twin))
        policy.train(was_training)
        seen.append(logits(twin))
        return [float(len(set(text.split()))) for text in completions]

    data = Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(3, 27)]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's and transformers' own
        arguments = GRPOConfig(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, num_generations=4, max_completion_length=4,
            learning_rate=3e-2, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False, logging_strategy="no", gradient_checkpointing=False,
        )  # fmt: skip
        assert arguments.optim == "adamw_torch_fused"
        trainer = GRPOTrainer(
            model, reward_funcs=reward, args=arguments, train_dataset=data, processing_class=word_tokenizer()
        )
        trainer.train()
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
