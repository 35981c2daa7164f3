"""Compare the policy losses that our plugin registers with verl's own, on random batches."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.integrations.verl import make_policy_loss

# Our name: verl's loss_mode.
NAMES = {
    "grpo": "vanilla",
    "gspo": "gspo",
    "gspo_token": "gspo",
    "gmpo": "geo_mean",
    "cispo": "cispo",
    "sapo": "sapo",
    "dppo": "dppo_tv",
    "dppo_kl": "dppo_kl",
    "dro": "dro",
    "reinforce": "gpg",
    "clip_covariance": "clip_cov",
    "kl_covariance": "kl_cov",
}
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
BATCHES = ("ragged", "one sequence masked", "an advantage per token")
WHOLE = {"dp_size": 2, "batch_num_tokens": 23, "global_batch_size": 7, "loss_scale_factor": 11}
INFOS: dict[str, dict[str, int]] = {"counts of the micro-batch": {}, "counts of all ranks": WHOLE}
WEIGHTS = ("no weights", "rollout weights")
SEEDS = range(4)
METRICS = ("actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl")


def combinations() -> Iterator[dict[str, Any]]:
    """Yield the batches, normalizers and weights that an objective and a mode are compared on."""
    for values in itertools.product(BATCHES, INFOS, WEIGHTS, SEEDS):
        yield dict(zip(("batch", "info", "weights", "seed"), values, strict=True))


class Difference(NamedTuple):
    """A condition under which verl's loss and ours differ on purpose."""

    name: str  # ours
    applies: Callable[[Mapping[str, Any]], bool]  # to the options of the batch
    reason: str
    example: dict[str, Any]  # options that show it, beside the plain ones


DIFFERENCES = {
    "gspo with an advantage or a weight per token": Difference(
        "gspo",
        lambda options: options["batch"] == BATCHES[2] or options["weights"] == WEIGHTS[1],
        "ours differentiates the ratio of the sequence; verl gives each token the gradient of its "
        "own ratio, which is our `gspo_token`",
        {"batch": BATCHES[2]},
    ),
    "gmpo with a sequence that is masked throughout, or with counts of all ranks": Difference(
        "gmpo",
        lambda options: options["batch"] == BATCHES[1] or options["info"] != next(iter(INFOS)),
        "ours divides by the sequences that have a token, of the whole batch if verl counts them; "
        "verl divides by all sequences of the micro-batch, so that its gradient grows with the "
        "number of micro-batches",
        {"info": [*INFOS][1]},
    ),
}


def is_excluded(name: str, options: Mapping[str, Any]) -> bool:
    return any(x.name == name and x.applies(options) for x in DIFFERENCES.values())


def make_actor(info: Mapping[str, int]) -> Any:
    """Make verl's actor config; clip_cov takes every eligible token, so that nothing is drawn."""
    from verl.workers.config import ActorConfig, PolicyLossConfig

    own = PolicyLossConfig(
        clip_cov_ratio=1.0, clip_cov_lb=0.2, kl_cov_ratio=0.3, ppo_kl_coef=0.7, dro_beta=0.3
    )
    settings = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 1.5}
    actor = ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=own,
        tau_pos=1.2,
        **settings,
    )
    actor.global_batch_info.update(info)
    return actor


def make_batch(options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make a few short sequences, on both sides of every bound of `make_actor`."""
    generator = torch.Generator().manual_seed(options["seed"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    B, T = 5, 6
    lengths = torch.randint(1, T + 1, (B, 1), generator=generator)
    if options["batch"] == "one sequence masked":
        lengths[-1] = 0
    advantages = normal(B, 1).expand(B, T)
    if options["batch"] == "an advantage per token":
        advantages = normal(B, T)
    old = -normal(B, T).abs()
    batch = {
        "old_log_prob": old,
        "log_prob": (old + 0.5 * normal(B, T)).clamp(max=-0.01),
        "advantages": advantages.contiguous(),
        "response_mask": (torch.arange(T) < lengths).double(),
    }
    if options["weights"] == "rollout weights":
        batch["rollout_is_weights"] = normal(B, T).abs()
    return batch


def differences_from_verl(name: str, mode: str, options: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest absolute differences: of the loss, of its gradient, of verl's metrics."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    results = []
    for function in (get_policy_loss_fn(NAMES[name]), make_policy_loss(name)):
        batch, actor = make_batch(options), make_actor(INFOS[options["info"]])
        batch["log_prob"].requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the mode is not read
            loss, metrics = function(**batch, loss_agg_mode=mode, config=actor)
        gradient = torch.autograd.grad(loss, batch["log_prob"])[0]
        results.append((loss.item(), gradient, metrics))
    (loss, gradient, metrics), (our_loss, our_gradient, our_metrics) = results
    found = {
        "loss": abs(loss - our_loss),
        "gradient": (gradient - our_gradient).abs().max().item(),
        "metrics": max(
            (abs(metrics[key] - our_metrics[key]) for key in METRICS if key in metrics), default=0.0
        ),
    }
    return {part: math.inf if math.isnan(value) else value for part, value in found.items()}


def largest_differences(name: str, mode: str) -> tuple[int, dict[str, float]]:
    """Return the number of batches that are compared, and the largest difference of each part."""
    count, largest = 0, {"loss": 0.0, "gradient": 0.0, "metrics": 0.0}
    for options in combinations():
        if not is_excluded(name, options):
            found = differences_from_verl(name, mode, options)
            count, largest = count + 1, {part: max(largest[part], found[part]) for part in found}
    return count, largest
