"""Group advantages: rewards [B, G] of G completions for each of B prompts -> advantages [B, G].

Rewards have any real dtype, and G is at least 2. Results are fp32 (fp64 for fp64 rewards) and not
differentiable. A group of exactly equal rewards gets exactly 0. A group whose rewards differ by
rounding only gets small advantages. Wrong shapes and dtypes, and on the CPU NaN or infinity, raise
a ValueError or TypeError.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .validation import (
    expect_finite,
    expect_number,
    expect_tensor,
    shape_of,
    suggest_keywords,
    values_are_readable,
)

MIN_STD = 1e-6
EPS = 1e-6


@suggest_keywords
def group_normalised_advantage(rewards: Tensor) -> Tensor:
    """Compute GRPO's advantage: reward minus group mean, over the group's standard deviation.

        A_i = (r_i - mean(r)) / max(std(r), floor)       std with ddof = 1
        floor = max(1e-6, 16 eps max|r|)                 eps of fp32 (fp64 for fp64 rewards)

    Args:
        rewards: [B, G], any real dtype, G >= 2 completions for each of B prompts.

    Returns:
        [B, G], fp32 (fp64 for fp64 rewards), not differentiable.

    Raises:
        TypeError: rewards is not a tensor of real numbers.
        ValueError: rewards is not [B, G] with G >= 2, or, on the CPU, not finite.

    Shao et al., 2024 (arXiv:2402.03300).
    """
    rewards = _scale_down(_prepare(rewards), -1)
    return _deviation(rewards) / torch.maximum(_group_std(rewards), _std_floor(rewards, -1))


@suggest_keywords
def centred_advantage(rewards: Tensor) -> Tensor:
    """Compute Dr. GRPO's advantage: reward minus group mean, A_i = r_i - mean(r).

    Args, Returns, Raises: see `group_normalised_advantage`.

    Liu et al., 2025 (arXiv:2503.20783).
    """
    return _deviation(_prepare(rewards))


@suggest_keywords
def batch_normalised_advantage(rewards: Tensor) -> Tensor:
    """Compute reward minus group mean, over the standard deviation of the whole batch.

        A_bi = (r_bi - mean(r_b)) / max(std(r), floor_b)     std of all B·G rewards, ddof = 1

    The floor is that of `group_normalised_advantage`; see there for Args, Returns and Raises.

    Liu et al., 2025 (arXiv:2508.08221).
    """
    rewards = _scale_down(_prepare(rewards), (0, 1))
    std = (rewards - rewards[:1, :1]).std()
    return _deviation(rewards) / torch.maximum(std, _std_floor(rewards, -1))


@suggest_keywords
def leave_one_out_advantage(rewards: Tensor) -> Tensor:
    """Compute RLOO's advantage: reward minus the mean of the other rewards in its group.

        A_i = r_i - mean(r_j over j != i) = G / (G - 1) · (r_i - mean(r))

    Args, Returns, Raises: see `group_normalised_advantage`.

    Ahmadian et al., 2024 (arXiv:2402.14740).
    """
    rewards = _prepare(rewards)
    G = rewards.shape[1]
    return _deviation(rewards) * (G / (G - 1))


@suggest_keywords
def max_rl_advantage(rewards: Tensor) -> Tensor:
    """Compute MaxRL's advantage: reward minus group mean, over the group mean.

        A_i = (r_i - mean(r)) / (mean(r) + 1e-6)             in [-1, G - 1]

    Rewards must be at least 0. A group of zeros has advantages of 0. On a GPU, where values are
    not checked, a group with a negative mean has advantages of 0 too.

    Args, Returns, Raises: see `group_normalised_advantage`; on the CPU a negative reward raises a
    ValueError too.

    Tajwar et al., 2026 (arXiv:2602.02710).
    """
    rewards = _prepare(rewards)
    if values_are_readable(rewards) and (rewards < 0).any():
        raise ValueError(f"rewards must be at least 0, got {rewards.min()}")
    mean = rewards.mean(dim=-1, keepdim=True)
    return torch.where(mean <= 0, 0.0, _deviation(rewards) / (mean + EPS))


@suggest_keywords
def length_weighted_advantage(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Compute OPO's advantage: reward minus the mean of its group, weighted by length.

        A_i = r_i - Σ_j l_j r_j / Σ_j l_j

    A group without tokens has advantages of its rewards minus their plain mean.

    Args:
        rewards: [B, G], any real dtype, G >= 2 completions for each of B prompts.
        lengths: [B, G], any real dtype, >= 0: tokens of each completion.

    Returns, Raises: see `group_normalised_advantage`.

    Hao et al., 2025 (arXiv:2505.23585).
    """
    rewards = _prepare(rewards)
    weights = _prepare_lengths(lengths, rewards)
    weights = torch.where(weights.sum(dim=-1, keepdim=True) == 0, 1.0, weights)
    shifted = rewards - rewards[..., :1]
    mean = (weights * shifted).sum(dim=-1, keepdim=True) / weights.sum(dim=-1, keepdim=True)
    return shifted - mean


@suggest_keywords
def reinforce_plus_plus_advantage(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Compute REINFORCE++'s advantage: the reward normalised over all tokens of the batch.

        A_i = (r_i - μ) / max(σ, floor)

    μ and σ are the mean and the standard deviation (ddof = 1) over the tokens, each of which has
    the reward of its completion. The floor is that of `group_normalised_advantage`, over the batch.
    Rewards that are `centred_advantage` make it REINFORCE++ with a group baseline.

    Args, Returns, Raises: see `length_weighted_advantage`.

    Hu, 2025 (arXiv:2501.03262).
    """
    rewards = _prepare(rewards)
    weights = _prepare_lengths(lengths, rewards)
    tokens = weights.sum().clamp_min(1)
    shifted = rewards - rewards[:1, :1]
    deviation = shifted - (weights * shifted).sum() / tokens
    variance = (weights * deviation.square()).sum() / (tokens - 1).clamp_min(1)
    return deviation / torch.maximum(variance.sqrt(), _std_floor(rewards, (0, 1))[0])


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "group": group_normalised_advantage,
    "batch": batch_normalised_advantage,
    "centered": centred_advantage,
    "leave_one_out": leave_one_out_advantage,
    "max_rl": max_rl_advantage,
}


@suggest_keywords
def pass_at_k_advantage(rewards: Tensor, k: int) -> Tensor:
    """Compute how much a completion adds to the best of k, averaged over the sets that hold it.

        A_i = mean over S with i in S, |S| = k of  max(r over S) - max(r over S without i)

    Never negative: the rest of the set is the baseline. The mean over completions of A_i times the
    gradient of the log-prob is an unbiased estimate of 1/k of the gradient of the expected best of
    k. With k = G only a single best completion has an advantage.

    Closed form: with the group sorted upwards, r_a is the best of S and r_b (b < a) the best of the
    rest in C(b, k-2) of C(G-1, k-1) sets. Summed by parts,

        A_a = Σ_{c <= a} C(c, k-1) / C(G-1, k-1) · (r_c - r_{c-1})

    k, the size of the sets, is 2 to G. Args, Returns, Raises: see `group_normalised_advantage`.

    Tang et al., 2025 (arXiv:2503.19595).
    """
    rewards = _prepare(rewards)
    G = rewards.shape[1]
    expect_number("k", k, integer=True)
    if not 2 <= k <= G:
        raise ValueError(f"k must lie in [2, {G}], where {G} is the size of a group, got {k}")
    ordered, order = rewards.sort(dim=-1)
    gaps = ordered.diff(dim=-1, prepend=ordered[:, :1])
    # C(c, k-1) / C(c+1, k-1) for c = G-2 .. 0; the cumulative product is C(c, k-1) / C(G-1, k-1).
    above = torch.arange(G - 1, 0, -1, dtype=gaps.dtype, device=gaps.device)
    ratios = ((above - (k - 1)) / above).clamp_min(0)
    chances = F.pad(ratios, (1, 0), value=1.0).cumprod(dim=0).flip(0)
    # Not `cumsum`: torch.use_deterministic_algorithms refuses it on a GPU.
    up_to = torch.ones(G, G, dtype=torch.bool, device=gaps.device).tril()
    sorted_advantage = torch.where(up_to, (gaps * chances)[:, None], 0.0).sum(dim=-1)
    return sorted_advantage.gather(1, order.argsort(dim=-1))


@suggest_keywords
def weighted_reward(rewards: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Compute the weighted sum of several rewards, Σ_k w_k r_k.

    Args:
        rewards: [K, B, G], any real dtype: K rewards of G >= 2 completions for each of B prompts.
        weights: K numbers, or a tensor [K]. None: 1 each.

    Returns:
        [B, G], fp32 (fp64 for fp64 rewards), not differentiable.
    """
    return _weigh(_prepare_stack(rewards, weights), weights).sum(dim=0)


@suggest_keywords
def multi_reward_advantage(
    rewards: Tensor, weights: Sequence[float] | Tensor | None = None
) -> Tensor:
    """Compute GDPO's advantage: normalise each reward within its group, then sum and normalise.

        s = Σ_k w_k (r_k - mean(r_k)) / std(r_k)         mean and std over the group, ddof = 1
        A = s / max(std(s), floor)                       std over the batch, ddof = 1

    The scales of the rewards cancel: only their weights count. Groups with equal sums of different
    rewards get different advantages. A reward that differs within a group by rounding only adds 0,
    because the second line would amplify it.

    Args, Returns: see `weighted_reward`.

    Liu et al., 2026 (arXiv:2601.05242).
    """
    rewards = _prepare_stack(rewards, weights)
    std = _group_std(rewards)
    is_constant = std <= _std_floor(rewards, -1)
    terms = _weigh(torch.where(is_constant, 0.0, _deviation(rewards) / std), weights)
    total = terms.sum(dim=0)
    # The terms of a group may cancel; the rounding of the sum is that of the largest term.
    return total / torch.maximum(total.std(), _std_floor(terms, (0, 2))[0])


@suggest_keywords
def process_advantage(step_rewards: Tensor, step_ends: Tensor, length: int) -> Tensor:
    """Compute process supervision: a token's advantage sums the steps that end at or after it.

        Ã_s = (r_s - mean(r)) / max(std(r), floor)       over all steps of the group, ddof = 1
        A_t = Σ Ã_s over the completion's steps s that end at token t or after it

    The floor is that of `group_normalised_advantage`. A group with one step has advantages of 0.

    Args:
        step_rewards: [B, G, S], any real dtype; ignored where there is no step.
        step_ends: [B, G, S], int32 or int64: the index of the step's last token, in any order; -1
            where there is no step.
        length: T, tokens of a completion.

    Returns:
        [B, G, T], fp32 (fp64 for fp64 rewards), not differentiable; 0 after the last step.

    Shao et al., 2024 (arXiv:2402.03300), 4.1.3.
    """
    _expect_real("step_rewards", step_rewards)
    expect_tensor("step_rewards", step_rewards, dims=(3,), layout="[B, G, S]")
    expect_tensor("step_ends", step_ends)
    if step_ends.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"step_ends must be int32 or int64, got {step_ends.dtype}")
    if step_ends.shape != step_rewards.shape:
        raise ValueError(
            f"step_ends must have the shape of step_rewards, {tuple(step_rewards.shape)}, "
            f"got {shape_of(step_ends)}"
        )
    expect_tensor("step_ends", step_ends, device_of=step_rewards)
    expect_number("length", length, integer=True, at_least=0)
    if values_are_readable(step_ends):
        outside = (step_ends < -1) | (step_ends >= length)
        if outside.any():
            raise ValueError(
                f"step_ends must lie in [0, {length}), or be -1 where there is no step, "
                f"got {step_ends[outside][0]}"
            )
        expect_finite("step_rewards", step_rewards[step_ends >= 0])

    B, G, S = step_ends.shape
    rewards = _to_float(step_rewards)
    advantage = rewards.new_zeros(B, G, length)
    if step_ends.numel() == 0:
        return advantage
    rewards, valid = rewards.flatten(1), (step_ends >= 0).flatten(1)
    largest = torch.where(valid, rewards, -torch.inf).amax(dim=-1, keepdim=True)
    shifted = torch.where(valid, rewards - largest, 0.0)  # equal rewards have a mean of exactly 0
    count = valid.sum(dim=-1, keepdim=True)
    mean = shifted.sum(dim=-1, keepdim=True) / count.clamp_min(1)
    deviation = torch.where(valid, shifted - mean, 0.0)
    variance = deviation.square().sum(dim=-1, keepdim=True) / (count - 1).clamp_min(1)
    floor = _std_floor(torch.where(valid, rewards, 0.0), -1)
    normalised = (deviation / torch.maximum(variance.sqrt(), floor)).view(B, G, S)
    tokens = torch.arange(length, device=step_ends.device)
    for reward, end in zip(normalised.unbind(-1), step_ends.unbind(-1), strict=True):
        advantage += torch.where(tokens <= end[..., None], reward[..., None], 0.0)
    return advantage


def _prepare(rewards: Tensor, layout: str = "[B, G]") -> Tensor:
    """Check rewards of groups; return them detached, in fp32 or fp64."""
    _expect_real("rewards", rewards)
    expect_tensor("rewards", rewards, dims=(layout.count(",") + 1,), layout=layout)
    if rewards.shape[-1] < 2:
        raise ValueError(
            f"rewards must hold at least 2 completions per prompt, got {shape_of(rewards)}: "
            "a group of 1 has nothing to compare with"
        )
    expect_finite("rewards", rewards)
    return _to_float(rewards)


def _prepare_stack(rewards: Tensor, weights: Sequence[float] | Tensor | None) -> Tensor:
    """Check rewards [K, B, G] and their weights; return the rewards as `_prepare` does."""
    prepared = _prepare(rewards, "[K, B, G]")
    K = rewards.shape[0]
    if K < 1:
        raise ValueError(f"rewards must hold at least 1 reward, got {shape_of(rewards)}")
    if isinstance(weights, Tensor):
        _expect_real("weights", weights)
        expect_tensor("weights", weights, shape=(K,), device_of=rewards)
        expect_finite("weights", weights)
    elif weights is not None:
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            got = type(weights).__name__
            raise TypeError(f"weights must be a tensor or a sequence of numbers, got {got}")
        if len(weights) != K:
            raise ValueError(f"weights must be {K} numbers, one per reward, got {len(weights)}")
        for idx, weight in enumerate(weights):
            expect_number(f"weights[{idx}]", weight)
    return prepared


def _prepare_lengths(lengths: Tensor, rewards: Tensor) -> Tensor:
    """Check the lengths of completions; return them in the dtype of the prepared rewards."""
    _expect_real("lengths", lengths)
    expect_tensor("lengths", lengths, shape=rewards.shape, device_of=rewards)
    expect_finite("lengths", lengths)
    if values_are_readable(lengths) and (lengths < 0).any():
        raise ValueError(f"lengths must be at least 0, got {lengths.min()}")
    return lengths.detach().to(rewards.dtype)


def _expect_real(name: str, tensor: Tensor) -> None:
    expect_tensor(name, tensor)
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")


def _to_float(rewards: Tensor) -> Tensor:
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return rewards.detach().to(dtype)


def _weigh(terms: Tensor, weights: Sequence[float] | Tensor | None) -> Tensor:
    """Multiply each of K terms by its weight; Python numbers reach a GPU without a sync."""
    if weights is None:
        return terms
    return torch.stack([w * term for w, term in zip(weights, terms, strict=True)]).detach()


def _scale_down(rewards: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Divide rewards beyond 2^40, whose squares may overflow, by a power of two: a ratio stays."""
    if rewards.numel() == 0:
        return rewards
    _, exponent = torch.frexp(rewards.abs().amax(dim=dim, keepdim=True))
    return rewards * (40.0 - exponent.to(rewards.dtype)).clamp(max=0).exp2()


def _deviation(rewards: Tensor) -> Tensor:
    # The mean of G equal numbers is not always that number in floating point; of G zeros it is.
    shifted = rewards - rewards[..., :1]
    return shifted - shifted.mean(dim=-1, keepdim=True)


def _group_std(rewards: Tensor) -> Tensor:
    return (rewards - rewards[..., :1]).std(dim=-1, keepdim=True)


def _std_floor(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Compute the standard deviation at or below which values differ by rounding only.

        floor = max(1e-6, 16 eps max|values|)

    Equal rewards whose terms were added in another order differ by about eps·|r| per addition.
    With this floor one such difference gives an advantage of at most 1/16.
    """
    largest = values.abs().amax(dim=dim, keepdim=True)
    return (16 * torch.finfo(values.dtype).eps * largest).clamp_min(MIN_STD)
