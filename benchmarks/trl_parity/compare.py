"""Compare the losses of grpo_kernels and of the reference implementation with TRL's own."""

import math
from collections.abc import Mapping
from typing import Any

import torch

import grpo_kernels
from benchmarks.trl_parity.differences import excluded_parts, is_excluded
from benchmarks.trl_parity.options import Options, settings_of
from benchmarks.trl_parity.oracle import Batch, Result, trl_loss
from grpo_kernels.integrations.trl_loss import WINDOW, loss_config, loss_denominators
from reference import losses

IMPLEMENTATIONS = {"grpo_kernels": grpo_kernels, "reference": losses}
TRL_ONLY = frozenset({"entropy_coef"})  # a setting among TRL's metrics


def make_batch(seed: int, kind: str) -> Batch:
    """Make a few short sequences, on both sides of every bound that FIXED sets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    B, T = (int(torch.randint(2, most, (), generator=generator)) for most in (6, 8))
    lengths = torch.randint(1, T + 1, (B, 1), generator=generator)
    lengths[0] = T
    if kind == "one sequence masked":
        lengths[-1] = 0
    mask = torch.arange(T) < lengths
    logprob = -normal(B, T).abs()
    old, ref, sampling = (logprob + normal(B, T) for _ in range(3))
    if kind == "far":
        old[0, 0] = logprob[0, 0] - 30
    if kind == "not scored":
        sampling[0, 0] = torch.nan
    return Batch(
        logprob=logprob,
        entropy=normal(B, T).abs(),
        mask=mask,
        advantages=normal(B, T) if kind == "an advantage per token" else normal(B),
        old_logprob=None if kind == "on-policy" else old,
        ref_logprob=ref,
        sampling_logprob=sampling,
        generated_tokens=3 * int(mask.sum()) + 5,
    )


def our_loss(implementation: str, settings: Mapping[str, Any], batch: Batch) -> Result:
    """Compute the loss under TRL's settings by one of IMPLEMENTATIONS."""
    logprob, entropy = (x.detach().requires_grad_() for x in (batch.logprob, batch.entropy))
    config, steps = loss_config(settings), settings["gradient_accumulation_steps"]
    denominators = {}  # by default those of the aggregation
    if steps != 1 or settings["loss_type"] in WINDOW:
        denominators = loss_denominators(
            config,
            batch.mask,
            loss_type=settings["loss_type"],
            generated_tokens=batch.generated_tokens,
            batches=settings["steps_per_generation"],
            accumulated=steps,
        )
    loss, metrics = IMPLEMENTATIONS[implementation].policy_loss(
        logprob,
        batch.advantages,
        entropy=entropy,
        mask=batch.mask,
        old_logprob=batch.old_logprob,
        ref_logprob=batch.ref_logprob if settings["beta"] != 0 else None,
        sampling_logprob=batch.sampling_logprob if settings["use_vllm"] else None,
        config=config,
        **denominators,
    )
    gradients = torch.autograd.grad(loss, (logprob, entropy), materialize_grads=True)
    return Result(loss.item(), *gradients, {name: x.item() for name, x in metrics.items()})


def differences_from_trl(settings: Mapping[str, Any], batch: Batch) -> dict[str, dict[str, float]]:
    """Return the absolute differences of each implementation from TRL, intended ones included.

    They are by part: "loss", "gradient" (the largest), and the name of each of TRL's metrics.
    """
    trl = trl_loss(settings, batch)
    found = {}
    for implementation in IMPLEMENTATIONS:
        ours = our_loss(implementation, settings, batch)
        gradients = ((trl.d_logprob, ours.d_logprob), (trl.d_entropy, ours.d_entropy))
        parts = {
            "loss": abs(trl.loss - ours.loss),
            "gradient": max((x - y).abs().max().item() for x, y in gradients),
        }
        for name in sorted(trl.metrics.keys() - TRL_ONLY):
            parts[name] = abs(trl.metrics[name] - ours.metrics[name])
        found[implementation] = {
            part: math.inf if math.isnan(value) else value for part, value in parts.items()
        }
    return found


def unintended_differences(options: Options, seed: int) -> dict[str, dict[str, float]]:
    """Return the differences in the parts that are compared, on a random batch."""
    excluded, batch = excluded_parts(options), make_batch(seed, options["batch"])
    return {
        implementation: {
            part: value for part, value in parts.items() if not is_excluded(part, excluded)
        }
        for implementation, parts in differences_from_trl(settings_of(options), batch).items()
    }
