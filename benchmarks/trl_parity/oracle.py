"""TRL's own loss on tensors that we choose: what its trainer computes, without a trainer.

`GRPOTrainer._compute_loss` is called unbound, on a stand-in that has the settings of a GRPOConfig
and one process, and that answers with given log-probabilities where the trainer would run a model.
The weights and metrics of a sampler with log-probabilities of its own stand amid TRL's code for
generation; those statements are found by their condition, and executed. So nothing of TRL is
repeated here, and where it has moved, `TrlHasMoved` is raised.
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

GMPO = "gmpo"  # the loss_type that stands for TRL's experimental GMPOTrainer
SAMPLER_CONDITION = "self.use_vllm and self.vllm_importance_sampling_correction"
SAMPLER_STATEMENTS = 3  # the weights, their metrics, and the weights into the loss's inputs


class TrlHasMoved(RuntimeError):
    """TRL's internals are not those that this file reaches into."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Completions as the loss sees them; fp64."""

    logprob: Tensor  # [B, T]
    entropy: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool
    advantages: Tensor  # [B], or [B, T]
    old_logprob: Tensor | None  # [B, T]; None: logprob's
    ref_logprob: Tensor  # [B, T]
    sampling_logprob: Tensor  # [B, T]
    generated_tokens: int  # of all the batches that were generated at once


class Result(NamedTuple):
    """A loss, its gradients and its metrics by name."""

    loss: float
    d_logprob: Tensor
    d_entropy: Tensor
    metrics: dict[str, float]


def trl_loss(settings: Mapping[str, Any], batch: Batch) -> Result:
    """What TRL's trainer makes of the batch.

    Args:
        settings: of GRPOConfig, by name; the others have TRL's defaults. loss_type may be "gmpo".
        batch: whose sampling_logprob counts with use_vllm, and ref_logprob with beta.

    Raises:
        TrlHasMoved: TRL is another one.
    """
    logprob, entropy = (x.detach().requires_grad_() for x in (batch.logprob, batch.entropy))
    with _told_where_trl_has_moved(), in_double():
        trainer, config = _classes(settings)
        stand_in = _stand_in(trainer, config, settings)
        stand_in._get_per_token_logps_and_entropies = lambda *_, **__: (logprob, entropy, None)
        loss = trainer._compute_loss(stand_in, None, _inputs(stand_in, batch))
    gradients = torch.autograd.grad(loss, (logprob, entropy), materialize_grads=True)
    metrics = {name: value for name, (value,) in stand_in._metrics["train"].items()}
    return Result(loss.item(), *gradients, metrics)


@contextmanager
def _told_where_trl_has_moved() -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError, KeyError, NameError, TypeError) as error:
        raise TrlHasMoved(
            f"TRL {version('trl')}'s loss wants what its stand-in does not have (it was made for "
            f"TRL 1.16): {type(error).__name__}: {error}"
        ) from error


@contextmanager
def in_double() -> Iterator[None]:
    """TRL makes its flags, quantiles and coefficients in fp32; here in fp64."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _FloatIsDouble():
            yield
    finally:
        torch.set_default_dtype(usual)


class _FloatIsDouble(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*arguments, **keywords or {})


def _classes(settings: Mapping[str, Any]) -> tuple[type, type]:
    """The trainer and its configuration."""
    if settings.get("loss_type") == GMPO:
        from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

        return GMPOTrainer, GMPOConfig
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer, GRPOConfig


class _OneProcess:
    """The part of Accelerate's Accelerator that the loss calls."""

    num_processes = 1
    sync_gradients = True

    def gather(self, x: Tensor) -> Tensor:
        return x if x.dim() else x.unsqueeze(0)

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x

    def pad_across_processes(self, x: Tensor, dim: int, pad_index: float) -> Tensor:
        return x


def _stand_in(trainer: type, config: type, settings: Mapping[str, Any]) -> SimpleNamespace:
    """A trainer's `self`: its settings, under the names that its __init__ gives them."""
    defaults = {each.name: each.default for each in fields(config) if each.default is not MISSING}
    if unknown := settings.keys() - defaults.keys():
        raise AttributeError(f"{config.__name__} has no settings {sorted(unknown)}")
    arguments = {**defaults, **settings}
    steps = arguments["gradient_accumulation_steps"]
    arguments["steps_per_generation"] = arguments["steps_per_generation"] or steps
    upper, lower = arguments["epsilon_high"], arguments["epsilon"]
    of_trainer = {
        "args": SimpleNamespace(**arguments),
        "model": SimpleNamespace(training=True),
        "accelerator": _OneProcess(),
        "epsilon_low": lower,
        "epsilon_high": lower if upper is None else upper,
        "current_gradient_accumulation_steps": steps,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": arguments["entropy_coef"] != 0,
        "_metrics": {"train": defaultdict(list)},
        "get_off_policy_mask": trainer.get_off_policy_mask,
        "get_gamma_weights": trainer.get_gamma_weights,
    }
    stand_in = SimpleNamespace(**{**arguments, **of_trainer})
    stand_in.get_high_entropy_mask = partial(trainer.get_high_entropy_mask, stand_in)
    return stand_in


def _inputs(stand_in: SimpleNamespace, batch: Batch) -> dict[str, Tensor]:
    """The loss's inputs. Prompts and token ids are for the model, which is not run."""
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
    """What TRL's generation makes of the sampler's log-probs: their weights, and metrics."""
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
    exec(_sampler_statements(), vars(_generation_module()), names)


@cache
def _sampler_statements() -> CodeType:
    """Those of TRL's generation that are about the sampler's log-probabilities."""
    from trl import GRPOTrainer

    source = textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions))
    found = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If) and ast.unparse(node.test) == SAMPLER_CONDITION
    ]
    if len(found) != SAMPLER_STATEMENTS:
        raise NameError(f"{SAMPLER_STATEMENTS} statements under {SAMPLER_CONDITION!r}")
    body = sorted(found, key=lambda node: node.lineno)
    return compile(ast.Module(body, type_ignores=[]), "TRL's generation", "exec")


def _generation_module():
    from trl import GRPOTrainer

    return sys.modules[GRPOTrainer.__module__]
