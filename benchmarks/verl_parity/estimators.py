"""Compare the advantage estimators that our plugin registers with verl's own."""

from types import SimpleNamespace

import torch

from grpo_kernels.integrations.verl_advantages import ESTIMATORS

# Our name: verl's adv_estimator, and its keywords.
NAMES: dict[str, tuple[str, dict[str, bool]]] = {
    "group": ("grpo", {}),
    "centered": ("grpo", {"norm_adv_by_std_in_grpo": False}),
    "leave_one_out": ("rloo", {}),
    "opo": ("opo", {}),
    "reinforce_plus_plus": ("reinforce_plus_plus", {}),
    "reinforce_plus_plus_baseline": ("reinforce_plus_plus_baseline", {}),
}
GROUPS = {"groups of four": "aaaabbbbcccc", "uneven groups": "abcaabaabadb"}
SEEDS = range(8)


def largest_difference(name: str, index: str) -> float:
    """Return the largest absolute difference of the advantages, over random rewards in fp64."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    estimator, keywords = NAMES[name]
    largest, T = 0.0, 7
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, T + 1, (len(index), 1), generator=generator)
        rewards = torch.zeros(len(index), T, dtype=torch.float64)
        outcome = torch.randn(len(index), 1, generator=generator, dtype=torch.float64)
        rewards.scatter_(1, lengths - 1, outcome)
        mask = (torch.arange(T) < lengths).double()
        inputs = {"response_mask": mask, "index": list(index)}
        inputs["config"] = SimpleNamespace(gamma=0.9)
        verl, _ = get_adv_estimator_fn(estimator)(rewards.clone(), **inputs, **keywords)
        ours, _ = ESTIMATORS[name](rewards.clone(), **inputs)
        largest = max(largest, (verl - ours).abs().max().item())
    return largest
