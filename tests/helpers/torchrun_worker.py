"""Run every case on one rank of a process group: `torchrun_worker.py RANK WORLD_SIZE STORE`.

Used by test_vocab_parallel.py. A case is a function; a failing case ends its rank with a traceback.
"""

import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import (
    HeadAdapter,
    LossConfig,
    TokenSupport,
    linear_distillation_loss,
    linear_grpo_loss,
    linear_token_stats,
    pack_tokens,
)
from grpo_kernels.integrations.verl_head import linear_cross_entropy
from grpo_kernels.lm_head import chunk_loop
from grpo_kernels.lm_head import support as head_support
from grpo_kernels.lm_head.inputs import prepare_inputs
from grpo_kernels.lm_head.roofline import ChunkSizes
from tests.helpers.linear import make_linear_case, relative_error, without_reference
from tests.helpers.supports import with_wrong_ids
from tests.helpers.tensors import coin, normal

SHARD_SIZES = {2: (5, 18), 4: (1, 9, 2, 11)}  # by world size
V = 23
HEAD = ("weight", "bias", "ref_weight", "ref_bias")
LEAVES = ("hidden", "weight", "bias", "a", "b")
OF_ROWS = ("d_weight", "d_bias", "d_b")  # gradients of this rank's rows alone
TIGHT = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}


def group():
    return dist.group.WORLD


def local_rows():
    """Rows of the head that this rank owns."""
    sizes, rank = SHARD_SIZES[dist.get_world_size()], dist.get_rank()
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def make_case(seed=0, dtype=torch.float64, kl=True):
    case = make_linear_case(seed, 2, 4, V=V, H=6, dtype=dtype)
    return case if kl else without_reference(case)


def shard(case, rows=None):
    rows = rows or local_rows()
    sharded = (*HEAD, "b")
    return {name: x[rows] if name in sharded and x is not None else x for name, x in case.items()}


def results(function, case, upstream=None, **keywords):
    """Outputs by name, and gradients as "d_<leaf>": of the loss if `upstream` is None."""
    case = {name: x if x is None else x.clone() for name, x in case.items()}
    leaves = [name for name in LEAVES if case.get(name) is not None]
    for name in leaves:
        case[name].requires_grad_()
    tensors = {name: case[name] for name in leaves}
    arguments = [case.pop(name) for name in ("hidden", "weight", "tokens")]
    outputs = function(*arguments, **case, **keywords)._asdict()
    outputs |= outputs.pop("metrics", {})
    outputs = {name: x for name, x in outputs.items() if x is not None}
    if upstream is None:
        total = outputs["loss"]
    else:
        total = sum(
            (torch.where(g != 0, outputs[name], 0) * g).sum() for name, g in upstream.items()
        )
    total.backward()
    outputs |= {f"d_{name}": x.grad for name, x in tensors.items()}
    return {name: x.detach() for name, x in outputs.items()}


def assert_same_on_all_ranks(name, x):
    first = x.contiguous().clone()
    dist.broadcast(first, 0)
    torch.testing.assert_close(
        x, first, rtol=0, atol=0, equal_nan=True, msg=f"{name}: ranks differ"
    )


def check(case, function=linear_token_stats, rows=None, **keywords):
    """Compare values and gradients of the sharded head with the whole head in one process."""
    rows = rows or local_rows()
    expected = results(function, case, **keywords)
    ours = results(function, shard(case, rows), vocab_group=group(), **keywords)
    assert ours.keys() == expected.keys()
    for name, x in ours.items():
        like = expected[name][rows] if name in OF_ROWS else expected[name]
        if x.dtype in (torch.bfloat16, torch.float16):
            assert relative_error(x, like.double()) < 8e-3, name
        else:
            tolerance = TIGHT[case["hidden"].dtype]
            torch.testing.assert_close(
                x,
                like,
                rtol=tolerance,
                atol=tolerance,
                equal_nan=True,
                msg=lambda m, n=name: f"{n}: {m}",
            )
        if name not in OF_ROWS:
            assert_same_on_all_ranks(name, x)
    return ours


def upstream(case, *names, seed=50):
    shape, dtype = case["tokens"].shape, case["hidden"].dtype
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: normal(seed + i, *shape, dtype=dtype) for i, name in enumerate(names)}


def token_stats_under_any_upstream_gradient():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for kl in ("forward", "reverse"):
            case = make_case(1, dtype)
            check(case, upstream=upstream(case, "logprob", "entropy", "kl"), kl=kl)
    for name in ("logprob", "entropy", "kl"):
        case = make_case(2)
        check(case, upstream=upstream(case, name), kl="reverse", chunk_tokens=3)
    case = make_case(3, kl=False) | {"bias": None}
    check(case, upstream=upstream(case, "logprob"), entropy=False)


def masked_tokens_temperature_and_softcap():
    case, mask = make_case(4), coin(4, 2, 4)
    case["hidden"] = torch.where(mask[..., None], case["hidden"], torch.nan)
    case["tokens"] = torch.where(mask, case["tokens"], -100)
    settings = {"temperature": normal(5, 2, 4, dtype=torch.float64).exp(), "softcap": 3.0}
    given = upstream(case, "logprob", "entropy", "kl")
    ours = check(case, upstream=given, kl="forward", mask=mask, **settings)
    assert (ours["logprob"][~mask] == 0).all() and (ours["d_hidden"][~mask] == 0).all()
    check(case, upstream=given, kl="reverse", mask=mask, packing=pack_tokens(mask), **settings)
    all_masked = torch.zeros_like(mask)
    ours = check(case, upstream=given, kl="reverse", mask=all_masked, **settings)
    assert not ours["d_weight"].any()


def excluded_shards():
    sizes = SHARD_SIZES[dist.get_world_size()]
    for i, size in enumerate(sizes):
        case = make_case(6 + i)
        start = sum(sizes[:i])
        excluded = slice(start, start + size)
        for kl in ("forward", "reverse"):
            case["bias"][excluded] = case["ref_bias"][excluded] = -torch.inf
            given = upstream(case, "logprob", "entropy", "kl")
            outside = (case["tokens"] >= excluded.start) & (case["tokens"] < excluded.stop)
            ours = check(case, upstream=given, kl=kl)
            assert (ours["logprob"].isinf() == outside).all() and ours["entropy"].isfinite().all()
            assert ours["kl"].isfinite().all()
        # Excluded by the policy, not by the reference policy.
        case["ref_bias"][excluded] = 0.0
        finite = upstream(case, "logprob", "entropy")
        assert check(case, upstream=finite, kl="reverse")["kl"].isfinite().all()
        assert check(case, upstream=finite, kl="forward")["kl"].isinf().all()


def padded_vocabulary():
    """Padding rows in the last shard, with a bias of -inf, change nothing."""
    whole, rank, world = make_case(11), dist.get_rank(), dist.get_world_size()
    size = -(-V // world)
    rows = slice(rank * size, min(V, (rank + 1) * size))
    given = upstream(whole, "logprob", "entropy", "kl")
    expected = check(whole, rows=rows, upstream=given, kl="reverse")
    padded = shard(whole, rows)
    for name in HEAD if rank == world - 1 else ():
        padding = (world * size - V, *padded[name].shape[1:])
        fill = -torch.inf if name.endswith("bias") else 1.0
        padded[name] = torch.cat((padded[name], padded[name].new_full(padding, fill)))
    ours = results(linear_token_stats, padded, upstream=given, kl="reverse", vocab_group=group())
    for name, x in ours.items():
        if name in ("d_weight", "d_bias"):
            assert not x[len(expected[name]) :].any()
            x = x[: len(expected[name])]
        torch.testing.assert_close(x, expected[name], rtol=1e-12, atol=1e-12)


LOSSES = {
    "plain": (LossConfig.grpo(), ()),
    "sampled kl": (LossConfig.grpo(beta=0.1, entropy_coef=0.05), ("ref_hidden",)),
    "reverse kl": (LossConfig.dapo(beta=0.1, kl_estimator="reverse"), ("ref_hidden",)),
    "sequence": (LossConfig.gspo(beta=0.1, kl_estimator="forward"), ("ref_hidden",)),
}


def linear_grpo_losses():
    advantages = torch.tensor([1.0, -0.5], dtype=torch.float64)
    for name, (config, reference) in LOSSES.items():
        for chunk_tokens in (None, 3):
            case = make_case(12, kl=bool(reference))
            old = normal(13, 2, 4, dtype=torch.float64) - 3
            loss = {"advantages": advantages, "config": config, "old_logprob": old}
            ours = check(
                case, linear_grpo_loss, mask=coin(14, 2, 4), chunk_tokens=chunk_tokens, **loss
            )
            assert ours["d_hidden"].any(), name
    case = make_case(15, kl=False)
    some_zero = torch.tensor([0.0, 1.0], dtype=torch.float64)
    check(case, linear_grpo_loss, advantages=some_zero)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = adapter_case(make_case(16, dtype, kl=False), 17)
        check(case, with_adapter(linear_grpo_loss), advantages=advantages.float())


def with_adapter(function):
    """The function with `a` and `b` of an adapter as keywords."""

    def call(*arguments, a, b, **keywords):
        return function(*arguments, adapter=HeadAdapter(a, b, 0.5), **keywords)

    return call


def adapter_case(case, seed):
    (V, H), dtype = case["weight"].shape, case["weight"].dtype
    a, b = normal(seed, 3, H, dtype=dtype), normal(seed + 1, V, 3, dtype=dtype)
    return case | {"a": a, "b": b}


def adapter_in_shards_of_the_vocabulary():
    advantages = torch.tensor([1.0, -0.5], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        case = adapter_case(make_case(24, dtype, kl=False), 25)
        given = upstream(case, "logprob", "entropy")
        check(case, with_adapter(linear_token_stats), upstream=given, chunk_tokens=3)
        for config in (LossConfig(), LossConfig.gspo()):
            loss = {"advantages": advantages.to(dtype), "config": config}
            check(case, with_adapter(linear_grpo_loss), mask=coin(14, 2, 4), **loss)


def several_tokens_to_a_row():
    rows = torch.tensor([0, 5, 5, 1, 7, 5, 2])
    case = make_case(27)
    case["tokens"] = torch.tensor([0, 22, 3, 9, 9, 22, 15])
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 1])
    for names in (("logprob",), ("logprob", "entropy", "kl")):
        given = upstream(case, *names)
        check(case, upstream=given, token_rows=rows, mask=mask, kl="reverse", chunk_tokens=2)
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, 3.0, -2.0], dtype=torch.float64)
    case = {name: x for name, x in case.items() if not name.startswith("ref_")}
    cu_seqlens = torch.tensor([0, 3, 7])
    loss = {"advantages": advantages, "cu_seqlens": cu_seqlens, "mask": mask}
    check(case, linear_grpo_loss, token_rows=rows, **loss)


def statistics_on_request():
    request = {"sum_sq_probs": True, "mean_logit": True, "is_top1": True, "top_logprobs": 6}
    names = ("logprob", "sum_sq_probs", "mean_logit")
    for dtype in (torch.float64, torch.float32):
        case = make_case(35, dtype, kl=False)
        tops = linear_token_stats(**case, top_logprobs=1).top_ids[..., 0]
        case["tokens"][:, :3] = tops[:, :3]
        for keywords in ({"chunk_tokens": 3}, {"softcap": 4.0, "temperature": 0.7}):
            ours = check(case, upstream=upstream(case, *names), **request, **keywords)
            assert ours["is_top1"][:, :3].all() and not ours["is_top1"].all()
    # Small integers have exact products: many equal logits, in all shards, and -inf.
    case = {name: x.round() for name, x in make_case(36, kl=False).items()}
    case["weight"][12:] = case["weight"][:11].clone()
    case["bias"] = torch.zeros_like(case["bias"])
    case["bias"][3:7] = -torch.inf
    case["tokens"] = case["tokens"] % 3
    check(case, upstream=upstream(case, "logprob"), top_logprobs=V, is_top1=True)
    case["tokens"], rows = torch.tensor([0, 22, 3, 9, 9]), torch.tensor([0, 5, 5, 1, 7])
    case["tokens"][1] = linear_token_stats(
        case["hidden"].flatten(0, 1)[rows], case["weight"], case["tokens"], bias=case["bias"],
        top_logprobs=1,
    ).top_ids[1, 0]  # fmt: skip
    ours = check(case, upstream=upstream(case, *names), token_rows=rows, is_top1=True,
                 sum_sq_probs=True, mean_logit=True)  # fmt: skip
    assert ours["is_top1"][1]


# Among them ids of one shard only, ids of all, a single one, and the whole vocabulary.
IDS = ([4, 0, 2], [22, 17], [0], [], list(range(V)), [8, 20, 3, 1], [5], [11, 9, 10])
TOKENS = torch.tensor([2, 17, 0, 13, 22, 8, 5, 9])


def case_with_support(seed, dtype=torch.float64, kl=True):
    case = make_case(seed, dtype, kl) | {"tokens": TOKENS.view(2, 4)}
    return case, TokenSupport.from_lists(IDS)


@contextmanager
def rows_of_any_union():
    """Multiply with the rows of the supports only, however many they are."""
    gain, head_support.SMALLEST_GAIN = head_support.SMALLEST_GAIN, 0
    yield
    head_support.SMALLEST_GAIN = gain


@rows_of_any_union()
def supports_in_shards_of_the_vocabulary():
    request = {"sum_sq_probs": True, "mean_logit": True, "is_top1": True, "top_logprobs": 1}
    names = ("logprob", "entropy", "kl", "sum_sq_probs", "mean_logit")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for kl in ("forward", "reverse"):
            case, support = case_with_support(40, dtype)
            given = upstream(case, *names)
            keywords = {"upstream": given, "kl": kl, "support": support, **request}
            check(case, chunk_tokens=3 if kl == "forward" else None, **keywords)
    mask = coin(41, 2, 4)
    case, support = case_with_support(40)
    settings = {"temperature": normal(42, 2, 4, dtype=torch.float64).exp(), "softcap": 3.0}
    settings |= {"mask": mask, "support": with_wrong_ids(support, mask), "kl": "reverse"}
    case["hidden"] = torch.where(mask[..., None], case["hidden"], torch.nan)
    case["tokens"] = torch.where(mask, case["tokens"], -100)
    check(case, upstream=upstream(case, *names[:3]), **settings)


@rows_of_any_union()
def losses_with_supports():
    advantages = torch.tensor([1.0, -0.5], dtype=torch.float64)
    for config, reference in LOSSES.values():
        for chunk_tokens in (None, 3):
            case, support = case_with_support(43, kl=bool(reference))
            loss = {"advantages": advantages, "config": config, "support": support}
            old = normal(44, 2, 4, dtype=torch.float64) - 1
            check(case, linear_grpo_loss, old_logprob=old, chunk_tokens=chunk_tokens, **loss)
    case, support = case_with_support(45, kl=False)
    case = adapter_case(case, 46)
    given = upstream(case, "logprob", "entropy")
    check(case, with_adapter(linear_token_stats), upstream=given, support=support, chunk_tokens=3)
    rows = torch.tensor([0, 1, 2, 3, 5, 5, 1, 6, 7])
    case, _ = case_with_support(47)
    case["tokens"] = torch.tensor([4, 22, 0, 6, 20, 3, 17, 5, 11])
    support = TokenSupport.from_lists([IDS[row] for row in rows.tolist()])
    check(
        case, upstream=upstream(case, "logprob", "entropy", "kl"), token_rows=rows, kl="forward",
        support=support, chunk_tokens=3,
    )  # fmt: skip


def ranks_agree_on_the_rows_of_the_supports():
    """At most a fourth of the whole vocabulary, wherever it lies."""
    for num_ids, is_part in ((5, True), (6, False)):
        for first in (0, V - num_ids):
            tokens = torch.arange(first, first + num_ids)
            support = TokenSupport(tokens, torch.arange(num_ids + 1))
            hidden, weight = torch.zeros(num_ids, 2), torch.zeros(V, 2)[local_rows()]
            inputs = prepare_inputs(hidden, weight, tokens, support=support, vocab_group=group())
            parts = head_support.split_by_support(inputs, torch.arange(num_ids), 0, None)
            assert [part.inputs.vocab_ids is not None for part in parts] == [is_part]


def frozen_head_in_shards_of_the_vocabulary():
    for support in (None, TokenSupport.from_lists(IDS)):
        case = make_case(28) | {"tokens": TOKENS.view(2, 4)}
        given = upstream(case, "logprob", "entropy", "kl")
        d_hidden = []
        for keywords, part in (({}, case), ({"vocab_group": group()}, shard(case))):
            hidden = part["hidden"].clone().requires_grad_()
            with count_collectives() as counts:
                stats = linear_token_stats(
                    **(part | {"hidden": hidden}), kl="forward", chunk_tokens=3, entropy_grad=True,
                    support=support, **keywords,
                )  # fmt: skip
                in_forward = counts.get("all_reduce", 0)
                sum((getattr(stats, name) * g).sum() for name, g in given.items()).backward()
            assert counts.get("all_reduce", 0) == in_forward == (3 if keywords else 0)
            d_hidden.append(hidden.grad)
        torch.testing.assert_close(d_hidden[1], d_hidden[0], rtol=1e-12, atol=1e-12)
        assert_same_on_all_ranks("d_hidden", d_hidden[1])


@contextmanager
def count_collectives():
    """Count the collectives called inside the block, by name."""
    counts, originals = {}, {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def counting(name):
        def call(*arguments, **keywords):
            counts[name] = counts.get(name, 0) + 1
            return originals[name](*arguments, **keywords)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    yield counts
    for name, function in originals.items():
        setattr(dist, name, function)


def one_collective_per_chunk_and_one_for_the_gradient():
    for support in (None, TokenSupport.from_lists(IDS)):
        case = shard(make_case(17, kl=False) | {"tokens": TOKENS.view(2, 4)})
        hidden, weight, tokens = (case.pop(name) for name in ("hidden", "weight", "tokens"))
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        case |= {"vocab_group": group(), "chunk_tokens": 3, "support": support}  # 8 tokens
        with count_collectives() as counts:
            loss = linear_grpo_loss(
                hidden, weight, tokens, normal(1, 2, dtype=torch.float64), **case
            ).loss
            assert counts == {"all_gather": 1 + 3, "all_reduce": 1}
            loss.backward()
            assert counts == {"all_gather": 1 + 3, "all_reduce": 1}
        with count_collectives() as counts:
            stats = linear_token_stats(*leaves, tokens, **case)
            assert counts == {"all_gather": 1 + 3}
            stats.logprob.sum().backward()
            assert counts == {"all_gather": 1 + 3, "all_reduce": 1}
        with count_collectives() as counts:
            linear_token_stats(hidden.detach(), weight, tokens, **case).logprob.sum().backward()
            assert counts == {"all_gather": 1 + 3}


def ranks_agree_on_the_chunk_size():
    case, original = make_case(21), chunk_loop.plan_chunks
    given = upstream(case, "logprob", "entropy", "kl")
    size = 2 + dist.get_rank()
    chunk_loop.plan_chunks = lambda *_, **__: ChunkSizes(size, (3 - dist.get_rank() % 2) * size)
    check(case, upstream=given, kl="reverse")
    chunk_loop.plan_chunks = original


def compile_fullgraph():
    if dist.get_world_size() > 2:
        return  # takes half a minute; two ranks cover it
    case = shard(make_case(18, torch.float32))
    hidden, weight, tokens = (case.pop(name) for name in ("hidden", "weight", "tokens"))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    config = LossConfig.grpo(beta=0.1, kl_estimator="reverse")

    def loss(hidden, weight):
        keywords = case | {"vocab_group": group()}
        loss = linear_grpo_loss(
            hidden, weight, tokens, torch.tensor([1.0, -0.5]), config=config, **keywords
        ).loss
        stats = linear_token_stats(
            hidden, weight, tokens, kl="forward", is_top1=True, top_logprobs=3, **keywords
        )
        return loss + sum(stat.sum() for stat in stats if stat is not None)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*leaves), loss(*leaves)
    torch.testing.assert_close(ours, expected)
    ours = torch.autograd.grad(ours, leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, leaves))


def vocab_group_smaller_than_the_world():
    """Tensor parallelism in pairs of ranks; each pair has its own batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group([start, start + 1]) for start in range(0, world, 2)]
    case, pair = make_case(20 + rank // 2), groups[rank // 2]
    rows = slice(0, 7) if rank % 2 == 0 else slice(7, V)
    given = upstream(case, "logprob", "entropy", "kl")
    expected = results(linear_token_stats, case, upstream=given, kl="reverse")
    ours = results(
        linear_token_stats, shard(case, rows), upstream=given, kl="reverse", vocab_group=pair
    )
    torch.testing.assert_close(ours["kl"], expected["kl"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours["d_hidden"], expected["d_hidden"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours["d_weight"], expected["d_weight"][rows], rtol=1e-12, atol=1e-12)


def verl_linear_cross_entropy_leaves_the_all_reduce_to_megatron():
    """verl's contract: d_hidden holds this rank's part of the sum."""
    case = make_case(23, kl=False)
    hidden, weight, tokens = (case[name] for name in ("hidden", "weight", "tokens"))
    whole = hidden.clone().requires_grad_()
    expected = linear_cross_entropy(whole, weight, tokens)
    local = hidden.clone().requires_grad_()
    ours = linear_cross_entropy(
        local, weight[local_rows()].contiguous(), tokens, dist_process_group=group()
    )
    for logprob, entropy in (ours, expected):
        (logprob.sum() + entropy.square().sum()).backward()
    dist.all_reduce(local.grad)
    torch.testing.assert_close(local.grad, whole.grad)
    torch.testing.assert_close(ours, expected)


def error_messages_on_every_rank():
    case = shard(make_case(19, kl=False))
    hidden, weight, tokens = (case.pop(name) for name in ("hidden", "weight", "tokens"))

    def message(hidden, weight, tokens, vocab_group, **keywords):
        try:
            linear_token_stats(hidden, weight, tokens, vocab_group=vocab_group, **keywords)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    for outside in (V, -1):
        error = message(hidden, weight, torch.full_like(tokens, outside), group())
        assert error == (
            f"ValueError: tokens must lie in [0, {V}) where they are not masked, got {outside}"
        )
    for ids, wrong in (([V], "support.token_ids"), ([0], "support")):
        support = TokenSupport.from_lists([ids, *[[]] * (tokens.numel() - 1)])
        error = message(hidden, weight, torch.ones_like(tokens), group(), support=support)
        assert error.startswith(f"ValueError: {wrong} must "), error
    assert message(hidden, weight, tokens, group(), top_logprobs=V + 1) == (
        f"ValueError: top_logprobs must be at most {V}, got {V + 1}"
    )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = distribute_tensor(make_case(19)["weight"], mesh, [Shard(0)])
    assert message(hidden, whole, tokens, group()) == (
        "TypeError: weight must be this rank's rows with vocab_group, as weight.to_local() has "
        "them, got a DTensor"
    )
    assert message(hidden, weight, tokens, mesh).startswith(
        "TypeError: vocab_group must be a torch.distributed.ProcessGroup that this rank is in, got"
    )
    counts = ", ".join(str(4 + 4 * (rank > 0)) for rank in range(dist.get_world_size()))
    sequences = slice(0, min(2, 1 + dist.get_rank()))  # one on rank 0, two on the others
    assert message(hidden[sequences], weight, tokens[sequences], group()) == (
        f"ValueError: tokens must be the same on every rank of vocab_group, got {counts} of them"
    )


def data_parallel_meshes(world):
    yield init_device_mesh("cpu", (world,)), [Shard(0)], {"reduce_scatter": 1}
    if world == 4:
        hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        yield hybrid, [Replicate(), Shard(0)], {"reduce_scatter": 1, "all_reduce": 1}


def collectives(mode):
    """Number of collectives by kind, summed over the operator namespaces."""
    kinds = {"gather": "all_gather", "reduce_scatter": "reduce_scatter", "reduce": "all_reduce"}
    counts = {}
    for operator, count in mode.get_comm_counts().items():
        kind = next(kind for word, kind in kinds.items() if word in str(operator))
        counts[kind] = counts.get(kind, 0) + count
    return counts


def data_parallel_batch(world):
    """The inputs of all ranks, their advantages, and the slice of this rank."""
    whole = make_linear_case(30, world, 3, V=13, H=4)
    return whole, normal(31, world), slice(dist.get_rank(), dist.get_rank() + 1)


DATA_PARALLEL_LOSSES = (
    LossConfig.dapo(beta=0.1, kl_estimator="reverse"),
    LossConfig.gspo(aggregation="token_mean", beta=0.1, kl_estimator="forward"),
    LossConfig.vespo(aggregation="token_mean", beta=0.1, kl_estimator="forward"),
)


def sharded_weights_are_gathered_once_and_their_gradient_is_reduced():
    world = dist.get_world_size()
    case, advantages, mine = data_parallel_batch(world)
    for config in DATA_PARALLEL_LOSSES:
        expected = results(linear_grpo_loss, case, advantages=advantages, config=config)
        batch = {name: x if name in HEAD else x[mine] for name, x in case.items()}
        for mesh, placements, in_backward in data_parallel_meshes(world):
            for frozen in (False, True):
                shards = {name: distribute_tensor(case[name], mesh, placements) for name in HEAD}
                shards["weight"].requires_grad_(not frozen)
                shards["bias"].requires_grad_()
                with CommDebugMode() as mode:
                    loss = linear_grpo_loss(
                        **batch | shards, advantages=advantages[mine], config=config, chunk_tokens=2
                    ).loss
                assert collectives(mode) == {"all_gather": len(HEAD)}
                with CommDebugMode() as mode:
                    loss.backward()
                trained = ("bias",) if frozen else ("weight", "bias")
                assert collectives(mode) == {k: len(trained) * n for k, n in in_backward.items()}
                for name in trained:
                    param = shards[name]
                    assert param.grad.placements == param.placements
                    torch.testing.assert_close(param.grad.full_tensor(), expected[f"d_{name}"])
                assert not frozen or shards["weight"].grad is None


def sharded_adapter_is_gathered_and_its_gradient_is_reduced():
    world = dist.get_world_size()
    case, advantages, mine = data_parallel_batch(world)
    case = adapter_case(without_reference(case), 33)
    loss = with_adapter(linear_grpo_loss)
    expected = results(loss, case, advantages=advantages, config=LossConfig.dapo())
    batch = {name: x[mine] for name, x in case.items() if name in ("hidden", "tokens")}
    for mesh, placements, _ in data_parallel_meshes(world):
        shards = {
            name: distribute_tensor(case[name], mesh, placements) for name in ("weight", "a", "b")
        }
        trained = [shards[name].requires_grad_() for name in ("a", "b")]
        loss(
            **batch, **shards, bias=case["bias"], advantages=advantages[mine],
            config=LossConfig.dapo(),
        ).loss.backward()  # fmt: skip
        for param, name in zip(trained, ("d_a", "d_b"), strict=True):
            assert param.grad.placements == param.placements
            torch.testing.assert_close(param.grad.full_tensor(), expected[name])


class ReducedSizes(TorchDispatchMode):
    """Record the size of every reduced tensor, by kind of collective."""

    def __init__(self):
        super().__init__()
        self.sizes = {"all_reduce": [], "reduce_scatter_tensor": []}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._opname in self.sizes:
            self.sizes[function._opname].append(args[0].numel())
        return function(*args, **(kwargs or {}))


def hybrid_sharding_reduces_shards_between_replicas():
    """Reduce-scatter within the shard mesh first, then all-reduce only a shard between replicas."""
    if dist.get_world_size() != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2))
    case = make_linear_case(32, 1, 3, V=12, H=4, bias=False)
    weight = distribute_tensor(case["weight"], mesh, [Replicate(), Shard(0)]).requires_grad_()
    logprob = linear_token_stats(case["hidden"], weight, case["tokens"]).logprob
    with ReducedSizes() as reduced:
        logprob.sum().backward()
    assert reduced.sizes == {"reduce_scatter_tensor": [12 * 4], "all_reduce": [12 * 4 // 2]}


class WithoutLogits(torch.nn.Module):
    """A body and a head; forward runs the head on zero positions, as the integrations do."""

    def __init__(self, case):
        super().__init__()
        V, H = case["weight"].shape
        self.body, self.head = torch.nn.Linear(H, H), torch.nn.Linear(H, V)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(H)), self.body.bias.zero_()
            self.head.weight.copy_(case["weight"]), self.head.bias.copy_(case["bias"])
        if "a" in case:
            self.head.a, self.head.b = (torch.nn.Parameter(case[name].clone()) for name in "ab")
            self.head.weight.requires_grad_(False)

    def forward(self, x):
        return self.body(x), self.head(x[..., :0, :])


def fsdp2_head_as_its_own_unit_and_within_the_root():
    world = dist.get_world_size()
    case, advantages, mine = data_parallel_batch(world)
    case = without_reference(case)
    config = LossConfig.dapo()
    expected = results(linear_grpo_loss, case, advantages=advantages, config=config)
    for mesh, _, _ in data_parallel_meshes(world):
        for own_unit in (True, False):
            model = WithoutLogits(case)
            if own_unit:
                fully_shard(model.head, mesh=mesh)
            fully_shard(model, mesh=mesh)
            hidden, _ = model(case["hidden"][mine])
            linear_grpo_loss(
                hidden, model.head.weight, case["tokens"][mine], advantages[mine],
                bias=model.head.bias, config=config,
            ).loss.backward()  # fmt: skip
            for param, name in ((model.head.weight, "d_weight"), (model.head.bias, "d_bias")):
                assert isinstance(param.grad, DTensor)
                torch.testing.assert_close(param.grad.full_tensor(), expected[name])


def fsdp2_head_with_an_adapter():
    """LoRA on a frozen head."""
    world = dist.get_world_size()
    case, advantages, mine = data_parallel_batch(world)
    case = adapter_case(without_reference(case), 33)
    (mesh, *_), *_ = data_parallel_meshes(world)
    for config in (LossConfig.dapo(), LossConfig.gspo(aggregation="token_mean")):
        keywords = {"advantages": advantages, "config": config}
        expected = results(with_adapter(linear_grpo_loss), case, **keywords)
        for own_unit in (True, False):
            model = WithoutLogits(case)
            if own_unit:
                fully_shard(model.head, mesh=mesh)
            fully_shard(model, mesh=mesh)
            hidden, _ = model(case["hidden"][mine])
            head = model.head
            linear_grpo_loss(
                hidden, head.weight, case["tokens"][mine], advantages[mine], bias=head.bias,
                adapter=HeadAdapter(head.a, head.b, 0.5), config=config, chunk_tokens=2,
            ).loss.backward()  # fmt: skip
            assert head.weight.grad is None
            for param, name in ((head.bias, "d_bias"), (head.a, "d_a"), (head.b, "d_b")):
                assert isinstance(param.grad, DTensor)
                torch.testing.assert_close(param.grad.full_tensor(), expected[name])


def distillation_in_shards_of_the_vocabulary():
    def call(hidden, weight, tokens, ref_hidden, ref_weight, bias, ref_bias, **keywords):
        return linear_distillation_loss(
            hidden, weight, ref_hidden, ref_weight, bias=bias, teacher_bias=ref_bias, **keywords
        )

    for dtype in (torch.float64, torch.float32, torch.float16):
        for divergence in ("reverse", "forward", "jsd"):
            case = make_case(50, dtype)
            if divergence == "jsd":
                case["bias"][:4] = -torch.inf
            check(case, call, divergence=divergence, mask=coin(51, 2, 4), chunk_tokens=3)


def top_k_distillation_in_shards_of_the_vocabulary():
    """Lists of all kinds: short, in one shard, of every token that is not excluded."""

    def call(hidden, weight, tokens, bias, **keywords):
        return linear_distillation_loss(hidden, weight, bias=bias, **keywords)

    logprobs, ids = torch.log_softmax(normal(60, 2, 4, V, std=3), dim=-1).sort(descending=True)
    ids[0, 0, 3:], ids[0, 1], ids[1, 0, 1:] = -1, -1, -1
    for dtype, K in (
        (torch.float64, 5),
        (torch.float32, 5),
        (torch.float16, 5),
        (torch.float64, V),
    ):
        for divergence in ("reverse", "forward", "jsd"):
            case = make_case(61, dtype, kl=False)
            check(
                case, call, divergence=divergence, mask=coin(62, 2, 4, p=0.8), chunk_tokens=3,
                teacher_top_logprobs=(ids[..., :K], logprobs[..., :K]), softcap=5.0,
            )  # fmt: skip


CASES = (
    distillation_in_shards_of_the_vocabulary,
    top_k_distillation_in_shards_of_the_vocabulary,
    token_stats_under_any_upstream_gradient,
    masked_tokens_temperature_and_softcap,
    excluded_shards,
    linear_grpo_losses,
    adapter_in_shards_of_the_vocabulary,
    several_tokens_to_a_row,
    supports_in_shards_of_the_vocabulary,
    losses_with_supports,
    ranks_agree_on_the_rows_of_the_supports,
    frozen_head_in_shards_of_the_vocabulary,
    padded_vocabulary,
    statistics_on_request,
    one_collective_per_chunk_and_one_for_the_gradient,
    ranks_agree_on_the_chunk_size,
    compile_fullgraph,
    vocab_group_smaller_than_the_world,
    verl_linear_cross_entropy_leaves_the_all_reduce_to_megatron,
    error_messages_on_every_rank,
    sharded_weights_are_gathered_once_and_their_gradient_is_reduced,
    sharded_adapter_is_gathered_and_its_gradient_is_reduced,
    hybrid_sharding_reduces_shards_between_replicas,
    fsdp2_head_as_its_own_unit_and_within_the_root,
    fsdp2_head_with_an_adapter,
)


def main(rank, world, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
    for case in CASES:
        case()
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    os._exit(0)  # gloo sometimes aborts at teardown, after all cases have passed
