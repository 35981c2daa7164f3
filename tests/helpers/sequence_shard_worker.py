"""Losses of one rank's part of every sequence: `sequence_shard_worker.py RANK WORLD_SIZE STORE`.

Used by test_sequence_shards.py. The losses of the ranks are compared with one process that has the
whole sequences; a difference ends the rank with a traceback.
"""

import os
import sys

import torch
import torch.distributed as dist

from grpo_kernels import LossConfig, linear_grpo_loss, linear_token_stats, policy_loss
from tests.helpers.linear import make_linear_case
from tests.helpers.tensors import coin, normal

B, T = 3, 9  # 9 tokens are not a multiple of the ranks: their parts differ in length
LEAVES = ("hidden", "weight", "bias")
# Sums over tokens: the parts of the ranks add up under the normalizer of the whole batch.
SUMS = {
    "token_mean": (LossConfig.dapo(beta=0.1, kl_estimator="reverse", entropy_coef=0.02), True),
    "fixed_length": (LossConfig.dr_grpo(T, beta=0.1, kl_estimator="forward"), True),
    "sequence_sum_mean": (LossConfig.reinforce(), False),
}
# Objectives that read whole sequences, or rank the tokens of the call.
WHOLE = {
    "sequence_mean": LossConfig.grpo(beta=0.1, kl_estimator="reverse"),
    "sequence ratio": LossConfig.gspo(epsilon_low=0.2, epsilon_high=0.2),
    "geometric mean": LossConfig.gmpo(),
    "prompt_mean": LossConfig(aggregation="prompt_mean", completions_per_prompt=3),
    "top entropy": LossConfig.dapo(top_entropy=0.4, entropy_coef=0.02),
    "second moment": LossConfig.m2po(second_moment=0.05),
}


def make_batch(seed):
    """The head, hidden states and per-token tensors of whole sequences; one ends in rank 0."""
    case = make_linear_case(seed, B, T, V=23, H=6, dtype=torch.float64)
    mask = coin(seed + 1, B, T, p=0.8) & (torch.arange(T) < torch.tensor([[9], [7], [2]]))
    old = linear_token_stats(**head_of(case), entropy=False).logprob
    old = old + 0.4 * normal(seed + 2, B, T, dtype=torch.float64)
    return case, mask, old, torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def head_of(case):
    return {name: case[name] for name in ("hidden", "weight", "tokens", "bias")}


def gradients(loss, case):
    return dict(zip(LEAVES, torch.autograd.grad(loss, [case[x] for x in LEAVES]), strict=True))


def with_leaves(case):
    return case | {name: case[name].clone().requires_grad_() for name in LEAVES}


def own_tokens():
    return torch.arange(T).tensor_split(dist.get_world_size())[dist.get_rank()]


def part_of(case, columns):
    sharded = ("hidden", "ref_hidden", "tokens")
    return {name: x[:, columns] if name in sharded else x for name, x in case.items()}


def compare(name, loss, grads, whole_loss, whole_grads, columns):
    """Compare with one process: the head's gradients are sums over the ranks."""
    torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=1e-13, msg=f"{name}: loss")
    for leaf, grad in grads.items():
        expected = whole_grads[leaf]
        if leaf == "hidden":
            expected = expected[:, columns]
        else:
            dist.all_reduce(grad)
        torch.testing.assert_close(
            grad, expected, rtol=1e-11, atol=1e-12, msg=lambda m, n=leaf: f"{name}, {n}: {m}"
        )
    assert whole_grads["weight"].any()


def normalizers(config, mask):
    """The denominators of the whole batch: numbers that every rank knows."""
    count = {"token_mean": mask.sum(), "fixed_length": B * T, "sequence_sum_mean": B}
    found = {"normalizer": count[config.aggregation]}
    return found | ({"entropy_normalizer": mask.sum()} if config.has_entropy_bonus else {})


def sums_of_tokens_add_up():
    columns = own_tokens()
    for seed, (name, (config, has_reference)) in enumerate(SUMS.items()):
        case, mask, old, advantages = make_batch(10 * seed)
        if not has_reference:
            case = {key: x for key, x in case.items() if not key.startswith("ref_")}
        keywords = {"advantages": advantages, "config": config}
        whole = with_leaves(case)
        expected = linear_grpo_loss(**whole, mask=mask, old_logprob=old, **keywords).loss

        part = with_leaves(part_of(case, columns))
        keywords |= normalizers(config, mask)
        loss = linear_grpo_loss(
            **part, mask=mask[:, columns], old_logprob=old[:, columns], **keywords
        ).loss
        grads, total = gradients(loss, part), loss.detach().clone()
        dist.all_reduce(total)
        compare(name, total, grads, expected.detach(), gradients(expected, whole), columns)


def gather_sequences(own):
    """Join the ranks' parts of a per-token tensor; the gradient is of this rank's own part."""
    lengths = [len(part) for part in torch.arange(T).tensor_split(dist.get_world_size())]
    longest = max(lengths)
    padded = torch.nn.functional.pad(own.detach(), (0, longest - own.shape[1]))
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded.contiguous())
    parts = [part[:, :length] for part, length in zip(parts, lengths, strict=True)]
    parts[dist.get_rank()] = own
    return torch.cat(parts, dim=1)


def objectives_of_whole_sequences_gather_the_statistics():
    columns = own_tokens()
    for seed, (name, config) in enumerate((WHOLE | {n: c for n, (c, _) in SUMS.items()}).items()):
        case, mask, old, advantages = make_batch(100 + 10 * seed)
        kl = config.kl_estimator if config.has_kl else None
        if kl is None:
            case = {key: x for key, x in case.items() if not key.startswith("ref_")}
        keywords = {"mask": mask, "old_logprob": old, "config": config}
        whole = with_leaves(case)
        expected = linear_grpo_loss(**whole, advantages=advantages, **keywords).loss

        part = with_leaves(part_of(case, columns))
        stats = linear_token_stats(**part, mask=mask[:, columns], kl=kl)
        gathered = {
            key: gather_sequences(x)
            for key, x in stats._asdict().items()
            if key in ("logprob", "entropy", "kl") and x is not None
        }
        logprob = gathered.pop("logprob")
        loss = policy_loss(logprob, advantages, **gathered, **keywords).loss
        grads = gradients(loss, part)
        compare(name, loss.detach(), grads, expected.detach(), gradients(expected, whole), columns)


def main(rank, world, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
    sums_of_tokens_add_up()
    objectives_of_whole_sequences_gather_the_statistics()
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    os._exit(0)  # gloo sometimes aborts at teardown, after all cases have passed
