"""TRL's own loss on given tensors, without a trainer.

`GRPOTrainer._compute_loss` is called unbound. Its `self` is a stand-in with the settings of a
GRPOConfig and one process, which returns given log-probs in place of a model's. The weights and
metrics of importance sampling are computed inside TRL's method for generation: the statements are
found by their condition and executed. No formula of TRL is repeated here, and `TrlChanged` is
raised if TRL's internals are other ones.
"""

import ast
import inspect
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import cache, partial
from importlib.metadata import version
from types import CodeType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GMPO = "gmpo"  # stands for TRL's experimental GMPOTrainer, which has no loss_type of that name
SAMPLER_CONDITION = "self.use_vllm and self.vllm_importance_sampling_correction"
SAMPLER_STATEMENTS = 3  # the weights, their metrics, and the weights as an input of the loss


class TrlChanged(RuntimeError):
    """Raised if TRL's internals are not those that this file uses."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The per-token tensors of a loss; fp64."""

    logprob: Tensor  # [B, T]
    entropy: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool
    advantages: Tensor  # [B], or [B, T]
    old_logprob: Tensor | None  # [B, T]; None: equal to logprob
    ref_logprob: Tensor  # [B, T]
    sampling_logprob: Tensor  # [B, T]
    generated_tokens: int  # of all batches that were generated at once


class Result(NamedTuple):
    """A loss, its gradients and its metrics."""

    loss: float
    d_logprob: Tensor
    d_entropy: Tensor
    metrics: dict[str, float]


def trl_loss(settings: Mapping[str, Any], batch: Batch) -> Result:
    """Compute the loss by TRL's trainer.

    Args:
        settings: fields of GRPOConfig; the others have TRL's defaults. loss_type may be "gmpo".
        batch: sampling_logprob is read with use_vllm, and ref_logprob with beta.

    Raises:
        TrlChanged: the loss needs attributes or inputs that are unknown here.
    """
    logprob, entropy = (x.detach().requires_grad_() for x in (batch.logprob, batch.entropy))
    try:
        with in_double():
            trainer, stand_in = make_stand_in(settings)
            stand_in._get_per_token_logps_and_entropies = lambda *_, **__: (logprob, entropy, None)
            loss = trainer._compute_loss(stand_in, None, loss_inputs(stand_in, batch))
    except (ImportError, AttributeError, KeyError, NameError, TypeError) as error:
        raise TrlChanged(
            f"the loss of TRL {version('trl')} needs what its stand-in, made for TRL 1.16, does "
            f"not have: {type(error).__name__}: {error}"
        ) from error
    gradients = torch.autograd.grad(loss, (logprob, entropy), materialize_grads=True)
    metrics = {name: value for name, (value,) in stand_in._metrics["train"].items()}
    return Result(loss.item(), *gradients, metrics)


@contextmanager
def in_double() -> Iterator[None]:
    """Compute TRL's flags, quantiles and coefficients in fp64 instead of fp32."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with FloatAsDouble():
            yield
    finally:
        torch.set_default_dtype(usual)


class FloatAsDouble(TorchFunctionMode):
    """Turns x.float() and x.to(dtype=torch.float32) into fp64."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        if function is torch.Tensor.to and keywords.get("dtype") is torch.float32:
            keywords = keywords | {"dtype": torch.float64}
        return function(*arguments, **keywords)


class OneProcess:
    """The part of Accelerate's Accelerator that the loss calls."""

    num_processes = 1
    sync_gradients = True

    def gather(self, x: Tensor) -> Tensor:
        return x if x.dim() else x.unsqueeze(0)

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x

    def pad_across_processes(self, x: Tensor, dim: int, pad_index: float) -> Tensor:
        return x


def make_stand_in(settings: Mapping[str, Any]) -> tuple[Any, SimpleNamespace]:
    """Return the trainer class and its `self`: the settings under the names of its __init__."""
    if settings.get("loss_type") == GMPO:
        from trl.experimental.gmpo import GMPOConfig as Config
        from trl.experimental.gmpo import GMPOTrainer as Trainer
    else:
        from trl import GRPOConfig as Config
        from trl import GRPOTrainer as Trainer

    defaults = {item.name: item.default for item in fields(Config) if item.default is not MISSING}
    if unknown := settings.keys() - defaults.keys():
        raise AttributeError(f"{Config.__name__} has no settings {sorted(unknown)}")
    arguments = {**defaults, **settings}
    steps = arguments["gradient_accumulation_steps"]
    arguments["steps_per_generation"] = arguments["steps_per_generation"] or steps
    lower, upper = arguments["epsilon"], arguments["epsilon_high"]
    attributes = {
        "args": SimpleNamespace(**arguments),
        "model": SimpleNamespace(training=True),
        "accelerator": OneProcess(),
        "epsilon_low": lower,
        "epsilon_high": lower if upper is None else upper,
        "current_gradient_accumulation_steps": steps,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": arguments["entropy_coef"] != 0,
        "_metrics": {"train": defaultdict(list)},
        "get_off_policy_mask": Trainer.get_off_policy_mask,
        "get_gamma_weights": Trainer.get_gamma_weights,
    }
    stand_in = SimpleNamespace(**{**arguments, **attributes})
    stand_in.get_high_entropy_mask = partial(Trainer.get_high_entropy_mask, stand_in)
    return Trainer, stand_in


def loss_inputs(stand_in: SimpleNamespace, batch: Batch) -> dict[str, Tensor]:
    """Return the inputs of `_compute_loss`; prompts and token ids are for the model alone."""
    mask = batch.mask.long()
    inputs = {
        "prompt_ids": mask[:, :0],
        "prompt_mask": mask[:, :0],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": batch.advantages,
        "num_items_in_batch": torch.tensor(batch.generated_tokens),
    }
    if batch.old_logprob is not None:
        inputs["old_per_token_logps"] = batch.old_logprob
    if stand_in.beta != 0:
        inputs["ref_per_token_logps"] = batch.ref_logprob
    if stand_in.use_vllm:
        inputs["sampling_per_token_logps"] = batch.sampling_logprob
        add_sampler(stand_in, inputs)
    return inputs


def add_sampler(trainer: Any, inputs: dict[str, Tensor]) -> None:
    """Add the importance weights and their metrics, by the statements of TRL's generation."""
    from trl import GRPOTrainer

    mask = inputs["completion_mask"]
    names = {
        "self": trainer,
        "mode": "train",
        "device": mask.device,
        "old_per_token_logps": inputs.get("old_per_token_logps"),
        "sampling_per_token_logps": inputs["sampling_per_token_logps"],
        "completion_mask": mask,
        "tool_mask": inputs.get("tool_mask"),
        "output": inputs,
    }
    exec(sampler_statements(), vars(sys.modules[GRPOTrainer.__module__]), names)


@cache
def sampler_statements() -> CodeType:
    """Compile the statements of TRL's generation that read the sampler's log-probs."""
    from trl import GRPOTrainer

    source = textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions))
    statements = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If) and ast.unparse(node.test) == SAMPLER_CONDITION
    ]
    if len(statements) != SAMPLER_STATEMENTS:
        raise NameError(f"{SAMPLER_STATEMENTS} statements under {SAMPLER_CONDITION!r}")
    body: list[ast.stmt] = sorted(statements, key=lambda node: node.lineno)
    return compile(ast.Module(body, type_ignores=[]), "TRL's generation", "exec")
