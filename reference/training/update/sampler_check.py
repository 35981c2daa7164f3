"""Comparison of a sampler's log-probs with the trainer's, over all tokens that it sampled.

A sampler with weights of its own has to take over all weights of the policy. One that has taken
over most of them still answers, and part of its answers change. Its log-probs show it: with the
same weights they differ by rounding alone.

Which layers are old is found without a copy of old weights. The state of AdamW tells the last
update of each weight, so that the last optimiser step can be undone for one layer at a time. The
change of the log-probs by each of them is compared with the difference of the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from grpo_kernels.integrations.transformers import unwrap
from reference.training.config import TrainConfig
from reference.training.distributed import full_tensor
from reference.training.errors import UserError
from reference.training.model.activation_checkpointing import checkpointable_layers
from reference.training.model.policy import Policy
from reference.training.rollout.sampler import Sampler
from reference.training.update.micro_batches import MicroBatch

Score = Callable[[Policy, MicroBatch], Tensor]  # log-probs [B·G, T] of a micro-batch

# Bounds of the mean difference in nats per token. The vLLM sampler differs by 1e-5 if both compute
# in fp32, by 0.03 in bf16 with a model of 135M parameters, and by 0.4 with an old LM head.
FP32_BOUND, BF16_BOUND = 1e-3, 0.1
MIN_EXPLAINED = 0.5  # of the squared difference, for layers to be named
MAX_NAMED = 6


class SamplerCheck:
    """Compares the log-probs of a sampler with those of the policy, and stops a run that is wrong.

    Args:
        score: returns the log-probs of a micro-batch under a policy, without gradient.
        optimizer: of the policy, to undo its last step.
    """

    def __init__(
        self,
        sampler: Sampler,
        policy: Policy,
        score: Score,
        optimizer: torch.optim.AdamW,
        config: TrainConfig,
    ) -> None:
        self.sampler, self.policy, self.score, self.optimizer = sampler, policy, score, optimizer
        # Now, because FSDP has other parameters in the midst of a pass.
        model = unwrap(policy.model)
        self.weights, self.groups = dict(model.named_parameters()), weight_groups(model)
        self.bound, self.is_stale = config.max_sampler_difference, config.stale_sampler
        # Without a support the sampler's log-probs are normalised over fewer tokens than the
        # trainer's: they may be higher by any amount, but not lower.
        self.may_be_higher = config.truncation is not None and not config.support

    def compare(
        self, batches: Sequence[MicroBatch], logprobs: Sequence[Tensor], when: str
    ) -> dict[str, float]:
        """Return the metrics of the difference; raise a UserError if its mean exceeds the bound.

        All ranks call this, each with its share of the micro-batches and the trainer's log-probs of
        all their tokens.
        """
        differences = [
            (logprob.double() - batch.sampling_logprob)[batch.mask].cpu()
            for batch, logprob in zip(batches, logprobs, strict=True)
            if not batch.is_idle and batch.sampling_logprob is not None
        ]
        difference = torch.cat([torch.zeros(0, dtype=torch.float64), *differences])
        wrong = difference.clamp(min=0.0) if self.may_be_higher else difference.abs()
        largest = difference.abs().max().item() if len(difference) else 0.0
        shares = (difference.abs().sum().item(), wrong.sum().item(), len(difference), largest)
        totals = list(zip(*self.policy.ranks.all_gather(shares), strict=True))
        count = max(1, sum(totals[2]))
        mean, wrong_mean = sum(totals[0]) / count, sum(totals[1]) / count
        largest = math.nan if math.isnan(mean) else max(totals[3])
        bound = self._bound()
        if not wrong_mean <= bound and not self.is_stale:
            cause = self.policy.ranks.broadcast(self._describe_cause(batches))
            raise UserError(
                f"{when}: the log-probs of the sampler differ from the trainer's by "
                f"{wrong_mean:.2g} nats per token, the mean over {count} sampled tokens; expected "
                f"at most {bound:g} (--max-sampler-difference). {cause}"
            )
        names = {"mean": mean, "max": largest}
        return {f"sampling/sampling_logp_difference/{name}": x for name, x in names.items()}

    def _bound(self) -> float:
        if self.bound is not None:
            return self.bound
        exact = (torch.float32, torch.float64)
        sampler_is_exact = self.sampler.dtype is None or self.sampler.dtype in exact
        return FP32_BOUND if sampler_is_exact and not self.policy.uses_bf16 else BF16_BOUND

    def _describe_cause(self, batches: Sequence[MicroBatch]) -> str:
        """Say which weights of the sampler look old. A collective under FSDP."""
        if not self.optimizer.state:
            return (
                "No optimiser step was made yet, so that the sampler does not have the weights "
                "with which the policy started, or computes in another precision (give both the "
                f"same, or allow {BF16_BOUND:g}, which is enough for bf16), or gives log-probs "
                "from before --temperature and --top-p (start a vLLM server with --logprobs-mode "
                "processed_logprobs)"
            )
        explained, old = self._find_old_weights(batches)
        if explained < MIN_EXPLAINED:
            return (
                "It is not explained by weights from before the last optimiser step: does the "
                "sampler have another model, or another precision?"
            )
        named = ", ".join(old[:MAX_NAMED])
        named += f" and {len(old) - MAX_NAMED} more" if len(old) > MAX_NAMED else ""
        return (
            f"The sampler has not taken over all weights. These look old: {named}; without "
            f"the last update they explain {explained:.0%} of the difference"
        )

    def _find_old_weights(self, batches: Sequence[MicroBatch]) -> tuple[float, list[str]]:
        """Return the share of the squared difference that old weights explain, and their names.

        An update is small, so that the changes of the log-probs by single layers add up. Their
        least-squares fit to the difference has coefficients of about 1 for the layers that are old,
        or another common value if they are older or the learning rate has changed, and 0 for the
        others.
        """
        policy = replace(self.policy, precision="off")  # rounding to bf16 would hide the changes
        model, optimizer = unwrap(policy.model), self.optimizer
        batches = [batch for batch in batches if not batch.is_idle]
        enough, used = 32 * len(self.groups), []  # tokens
        for batch in batches:
            if sum(int(each.mask.sum()) for each in used) < enough:
                used.append(replace(batch, loss_mask=batch.mask))

        def logprobs() -> Tensor:
            found = [self.score(policy, batch)[batch.mask].double().cpu() for batch in used]
            return torch.cat([torch.zeros(0, dtype=torch.float64), *found])

        columns: dict[str, Tensor] = {}
        with torch.no_grad(), policy.ranks.unsharded(policy.model):
            whole = dict(model.named_parameters())
            new = logprobs()
            for group in self.groups:
                updates = [
                    (whole[name], full_tensor(last_update(optimizer, self.weights[name])))
                    for name in group.names
                    if self.weights[name] in optimizer.state
                ]
                with undo(updates, group):
                    columns[group.label] = logprobs() - new
        sampled = [
            batch.sampling_logprob[batch.mask].double().cpu()
            for batch in used
            if batch.sampling_logprob is not None
        ]
        difference = torch.cat([torch.zeros(0, dtype=torch.float64), *sampled]) - new
        columns = {group: column for group, column in columns.items() if column.any()}
        if not columns or not difference.isfinite().all():
            return 0.0, []
        changes = torch.stack(list(columns.values()), dim=1)

        def fit(directions: Tensor) -> tuple[float, Tensor, Tensor]:
            """Fit the difference; return the share explained, coefficients and their errors."""
            inverse = torch.linalg.pinv(directions, rtol=1e-9)
            coefficients = inverse @ difference
            rest = (difference - directions @ coefficients).square().sum()
            variance = rest / max(1, len(difference) - len(coefficients))
            explained = 1.0 - rest / difference.square().sum()
            return explained.item(), coefficients, inverse.norm(dim=1) * variance.sqrt()

        explained, coefficients, errors = fit(changes)
        explained_by_all, *_ = fit(changes.sum(dim=1, keepdim=True))
        if explained_by_all > 0.95 * explained:
            return explained_by_all, ["all weights"]
        share = coefficients / coefficients[(coefficients * changes.norm(dim=0)).argmax()]
        is_old = (coefficients > 3 * errors) & (share > 0.5) & (share < 2)
        old = [group for group, yes in zip(columns, is_old.tolist(), strict=True) if yes]
        return explained, old


@dataclass
class WeightGroup:
    """Trained weights that are undone together: those of a layer, an embedding or a head.

    Attributes:
        label: how an error message names it.
        names: of its weights.
        embedding: the module of an embedding whose weights an LM head shares.
        in_embedding: undo them in `embedding` and not elsewhere; False: elsewhere and not there.
    """

    label: str
    names: list[str] = field(default_factory=list)
    embedding: nn.Module | None = None
    in_embedding: bool = False


def weight_groups(model: Any) -> list[WeightGroup]:
    """Group the weights of a model that train.

    An LM head that is tied to the embedding is a group of its own.
    """
    modules = dict(model.named_modules())
    layers = {id(layer) for layer in checkpointable_layers(model)}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight if head is not None and head.weight is embedding.weight else None
    groups: dict[str, WeightGroup] = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        owner = name.rpartition(".")[0]
        parts = owner.split(".")
        prefixes = [".".join(parts[: n + 1]) for n in range(len(parts))]
        whole = next((prefix for prefix in prefixes if id(modules[prefix]) in layers), owner)
        kinds = {id(embedding): "the embedding", id(head): "the LM head"}
        label = kinds.get(id(modules[whole]), "")
        label = f"{label} ({whole})" if label else whole
        group = groups.setdefault(label, WeightGroup(label))
        group.names.append(name)
        if weight is tied:
            path = next(path for path, module in modules.items() if module is head)
            group.embedding, group.in_embedding = embedding, True
            label = f"the tied LM head ({path})"
            groups[label] = WeightGroup(label, [name], embedding)
    return list(groups.values())


def last_update(optimizer: torch.optim.AdamW, weight: Tensor) -> Tensor:
    """Compute by how much AdamW, without weight decay, has changed a weight in its last step."""
    settings = next(
        group for group in optimizer.param_groups if any(weight is x for x in group["params"])
    )
    state, (beta1, beta2) = optimizer.state[weight], settings["betas"]
    step = float(state["step"])
    second = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + settings["eps"]
    return -settings["lr"] / (1 - beta1**step) * state["exp_avg"] / second


@contextmanager
def undo(updates: Sequence[tuple[Tensor, Tensor]], group: WeightGroup) -> Iterator[None]:
    """Subtract updates from weights, where the group has them; restore the weights bit for bit."""
    saved = [(weight, weight.clone(), update) for weight, update in updates]

    def use(old: bool) -> None:
        for weight, new, update in saved:
            weight.copy_(new - update if old else new)

    handles = []
    if group.embedding is not None:
        inside, outside = group.in_embedding, not group.in_embedding
        handles = [
            group.embedding.register_forward_pre_hook(lambda *_: use(inside)),
            group.embedding.register_forward_hook(lambda *_: use(outside)),
        ]
    try:
        use(not group.in_embedding)
        yield
    finally:
        for handle in handles:
            handle.remove()
        use(False)
