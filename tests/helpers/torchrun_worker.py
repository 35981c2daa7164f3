"""What each rank of a process group does in test_vocab_parallel.py: `ranks.py RANK RANKS STORE`.

A case is a function; a rank whose case fails ends with its traceback, and a status other than 0.
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

from grpo_kernels import LossConfig, linear_grpo_loss, linear_token_stats, pack_tokens
from grpo_kernels.integrations.verl import linear_cross_entropy
from grpo_kernels.lm_head import chunk_loop as linear_rows
from tests.helpers.linear import make_linear_case, relative_error, without_reference
from tests.helpers.tensors import coin, normal

SIZES = {2: (5, 18), 4: (1, 9, 2, 11)}  # of the shards
V = 23
HEAD = ("weight", "bias", "ref_weight", "ref_bias")
LEAVES = ("hidden", "weight", "bias")
TIGHT = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 4e-6}


def group():
    return dist.group.WORLD


def my_rows(sizes=None):
    start = sum((sizes or SIZES[dist.get_world_size()])[: dist.get_rank()])
    return slice(start, start + (sizes or SIZES[dist.get_world_size()])[dist.get_rank()])


def make_case(seed=0, dtype=torch.float64, kl=True):
    case = make_linear_case(seed, 2, 4, V=V, H=6, dtype=dtype)
    return case if kl else without_reference(case)


def sharded(case, at=None):
    at = at or my_rows()
    return {name: x[at] if name in HEAD and x is not None else x for name, x in case.items()}


def results(function, case, upstream=None, **keywords):
    """Outputs by name and, as "d_<leaf>", gradients: under upstream, or of the loss."""
    case = {name: x if x is None else x.clone() for name, x in case.items()}
    leaves = [name for name in LEAVES if case.get(name) is not None]
    for name in leaves:
        case[name].requires_grad_()
    tensors = {name: case[name] for name in leaves}
    arguments = [case.pop(name) for name in ("hidden", "weight", "tokens")]
    found = function(*arguments, **case, **keywords)._asdict()
    found |= found.pop("metrics", {})
    found = {name: x for name, x in found.items() if x is not None}
    if upstream is None:
        total = found["loss"]
    else:
        total = sum((torch.where(g != 0, found[name], 0) * g).sum() for name, g in upstream.items())
    total.backward()
    found |= {f"d_{name}": x.grad for name, x in tensors.items()}
    return {name: x.detach() for name, x in found.items()}


def assert_same_on_all_ranks(name, x):
    first = x.contiguous().clone()
    dist.broadcast(first, 0)
    torch.testing.assert_close(
        x, first, rtol=0, atol=0, equal_nan=True, msg=f"{name}: ranks differ"
    )


def check(case, function=linear_token_stats, at=None, expected=None, **keywords):
    """The shards against the whole vocabulary in this process, in value and gradient."""
    mine, at = sharded(case, at), at or my_rows()
    if expected is None:
        expected = results(function, case, **keywords)
    ours = results(function, mine, vocab_group=group(), **keywords)
    assert ours.keys() == expected.keys()
    for name, x in ours.items():
        like = expected[name][at] if name in ("d_weight", "d_bias") else expected[name]
        if x.dtype == torch.bfloat16:
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
        if name not in ("d_weight", "d_bias"):
            assert_same_on_all_ranks(name, x)
    return ours


def upstream(case, *names, seed=50):
    shape, dtype = case["tokens"].shape, case["hidden"].dtype
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: normal(seed + i, *shape, dtype=dtype) for i, name in enumerate(names)}


def statistics_under_any_upstream_gradient():
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
    nothing = torch.zeros_like(mask)
    ours = check(case, upstream=given, kl="reverse", mask=nothing, **settings)
    assert not ours["d_weight"].any()


def shards_that_are_excluded():
    sizes = SIZES[dist.get_world_size()]
    for shard in range(len(sizes)):
        case = make_case(6 + shard)
        start = sum(sizes[:shard])
        excluded = slice(start, start + sizes[shard])
        for kl in ("forward", "reverse"):
            case["bias"][excluded] = case["ref_bias"][excluded] = -torch.inf
            given = upstream(case, "logprob", "entropy", "kl")
            outside = (case["tokens"] >= excluded.start) & (case["tokens"] < excluded.stop)
            ours = check(case, upstream=given, kl=kl)
            assert (ours["logprob"].isinf() == outside).all() and ours["entropy"].isfinite().all()
            assert ours["kl"].isfinite().all()
        # A token that only one of the two gives a probability.
        case["ref_bias"][excluded] = 0.0
        finite = upstream(case, "logprob", "entropy")
        assert check(case, upstream=finite, kl="reverse")["kl"].isfinite().all()
        assert check(case, upstream=finite, kl="forward")["kl"].isinf().all()


def a_padded_vocabulary():
    """Rows of padding in the last shard: a bias of -inf on them, or a shard without them."""
    whole, world = make_case(11), dist.get_world_size()
    each = -(-V // world)
    last = dist.get_rank() == world - 1
    at = slice(dist.get_rank() * each, min(V, (dist.get_rank() + 1) * each))
    given = upstream(whole, "logprob", "entropy", "kl")
    expected = check(whole, at=at, upstream=given, kl="reverse")
    mine = sharded(whole, at)
    for name in HEAD if last else ():
        padding = (world * each - V, *mine[name].shape[1:])
        fill = -torch.inf if name.endswith("bias") else 1.0
        mine[name] = torch.cat((mine[name], mine[name].new_full(padding, fill)))
    ours = results(linear_token_stats, mine, upstream=given, kl="reverse", vocab_group=group())
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


def losses():
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
    inert = {"advantages": torch.tensor([0.0, 1.0], dtype=torch.float64)}
    check(case, linear_grpo_loss, **inert)
    for dtype in (torch.float32, torch.bfloat16):
        check(make_case(16, dtype, kl=False), linear_grpo_loss, advantages=advantages.float())


@contextmanager
def counted():
    """The collectives that are called meanwhile, by name."""
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
    case = sharded(make_case(17, kl=False))
    hidden, weight, tokens = (case.pop(name) for name in ("hidden", "weight", "tokens"))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    case |= {"vocab_group": group(), "chunk_tokens": 3}  # 8 tokens
    with counted() as counts:
        loss = linear_grpo_loss(
            hidden, weight, tokens, normal(1, 2, dtype=torch.float64), **case
        ).loss
        assert counts == {"all_gather": 1 + 3, "all_reduce": 1}
        loss.backward()
        assert counts == {"all_gather": 1 + 3, "all_reduce": 1}
    with counted() as counts:
        stats = linear_token_stats(*leaves, tokens, **case)
        assert counts == {"all_gather": 1 + 3}
        stats.logprob.sum().backward()
        assert counts == {"all_gather": 1 + 3, "all_reduce": 1}
    with counted() as counts:
        linear_token_stats(hidden.detach(), weight, tokens, **case).logprob.sum().backward()
        assert counts == {"all_gather": 1 + 3}


def ranks_that_would_plan_other_chunks_agree():
    case, original = make_case(21), linear_rows.plan_chunk
    given = upstream(case, "logprob", "entropy", "kl")
    linear_rows.plan_chunk = lambda *_, **__: 2 + dist.get_rank()
    check(case, upstream=given, kl="reverse")
    linear_rows.plan_chunk = original


def compiled_whole():
    if dist.get_world_size() > 2:
        return  # half a minute, and nothing that two ranks do not show
    case = sharded(make_case(18, torch.float32))
    hidden, weight, tokens = (case.pop(name) for name in ("hidden", "weight", "tokens"))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    config = LossConfig.grpo(beta=0.1, kl_estimator="reverse")

    def loss(hidden, weight):
        keywords = case | {"vocab_group": group()}
        loss = linear_grpo_loss(
            hidden, weight, tokens, torch.tensor([1.0, -0.5]), config=config, **keywords
        ).loss
        stats = linear_token_stats(hidden, weight, tokens, kl="forward", **keywords)
        return loss + sum(each.sum() for each in stats)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*leaves), loss(*leaves)
    torch.testing.assert_close(ours, expected)
    ours = torch.autograd.grad(ours, leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, leaves))


def a_group_within_the_world():
    """Tensor parallel in pairs: each pair has a batch of its own."""
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group([start, start + 1]) for start in range(0, world, 2)]
    case, mine = make_case(20 + rank // 2), groups[rank // 2]
    at = slice(0, 7) if rank % 2 == 0 else slice(7, V)
    given = upstream(case, "logprob", "entropy", "kl")
    expected = results(linear_token_stats, case, upstream=given, kl="reverse")
    shard = sharded(case, at)
    ours = results(linear_token_stats, shard, upstream=given, kl="reverse", vocab_group=mine)
    torch.testing.assert_close(ours["kl"], expected["kl"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours["d_hidden"], expected["d_hidden"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours["d_weight"], expected["d_weight"][at], rtol=1e-12, atol=1e-12)


def megatron_adds_up_the_gradients_of_verl():
    """Outside of verl's function, whose own kernel leaves each rank its share."""
    case = make_case(23, kl=False)
    hidden, weight, tokens = (case[name] for name in ("hidden", "weight", "tokens"))
    whole = hidden.clone().requires_grad_()
    expected = linear_cross_entropy(whole, weight, tokens)
    mine = hidden.clone().requires_grad_()
    found = linear_cross_entropy(
        mine, weight[my_rows()].contiguous(), tokens, dist_process_group=group()
    )
    for each in (found, expected):
        (each[0].sum() + each[1].square().sum()).backward()
    dist.all_reduce(mine.grad)
    torch.testing.assert_close(mine.grad, whole.grad)
    torch.testing.assert_close(found, expected)


def errors_rise_on_every_rank():
    case = sharded(make_case(19, kl=False))
    hidden, weight, tokens = (case.pop(name) for name in ("hidden", "weight", "tokens"))

    def message(hidden, weight, tokens, vocab_group):
        try:
            linear_token_stats(hidden, weight, tokens, vocab_group=vocab_group)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    for outside in (V, -1):
        found = message(hidden, weight, torch.full_like(tokens, outside), group())
        assert found == (
            f"ValueError: tokens must lie in [0, {V}) where they are not masked, got {outside}"
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
    more = 1 + dist.get_rank()
    counts = ", ".join(str(4 + 4 * (rank > 0)) for rank in range(dist.get_world_size()))
    some = slice(0, min(2, more))
    assert message(hidden[some], weight, tokens[some], group()) == (
        f"ValueError: tokens must be the same on every rank of vocab_group, got {counts} of them"
    )


def data_parallel_meshes(world):
    yield init_device_mesh("cpu", (world,)), [Shard(0)], {"reduce_scatter": 1}
    if world == 4:
        hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        yield hybrid, [Replicate(), Shard(0)], {"reduce_scatter": 1, "all_reduce": 1}


def collectives(mode):
    """By kind, whichever of the namespaces they are in."""
    kinds = {"gather": "all_gather", "reduce_scatter": "reduce_scatter", "reduce": "all_reduce"}
    counts = {}
    for operator, count in mode.get_comm_counts().items():
        kind = next(kind for word, kind in kinds.items() if word in str(operator))
        counts[kind] = counts.get(kind, 0) + count
    return counts


def data_parallel_batch(world):
    whole = make_linear_case(30, world, 3, V=13, H=4)
    return whole, normal(31, world), slice(dist.get_rank(), dist.get_rank() + 1)


DATA_PARALLEL_LOSSES = (
    LossConfig.dapo(beta=0.1, kl_estimator="reverse"),
    LossConfig.gspo(aggregation="token_mean", beta=0.1, kl_estimator="forward"),
    LossConfig.vespo(aggregation="token_mean", beta=0.1, kl_estimator="forward"),
)


def sharded_weights_are_gathered_once_and_get_the_mean_in_shards():
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
                    shard = shards[name]
                    assert shard.grad.placements == shard.placements
                    torch.testing.assert_close(shard.grad.full_tensor(), expected[f"d_{name}"])
                assert not frozen or shards["weight"].grad is None


class Sizes(TorchDispatchMode):
    """Notes the number of entries of every tensor that is reduced, by kind of collective."""

    def __init__(self):
        super().__init__()
        self.found = {"all_reduce": [], "reduce_scatter_tensor": []}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._opname in self.found:
            self.found[function._opname].append(args[0].numel())
        return function(*args, **(kwargs or {}))


def replicas_of_shards_are_reduced_in_shards():
    """The whole gradient goes over the fast links of a shard's mesh, not over the replicas'."""
    if dist.get_world_size() != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2))
    case = make_linear_case(32, 1, 3, V=12, H=4, bias=False)
    weight = distribute_tensor(case["weight"], mesh, [Replicate(), Shard(0)]).requires_grad_()
    logprob = linear_token_stats(case["hidden"], weight, case["tokens"]).logprob
    with Sizes() as sizes:
        logprob.sum().backward()
    assert sizes.found == {"reduce_scatter_tensor": [12 * 4], "all_reduce": [12 * 4 // 2]}


class WithoutLogits(torch.nn.Module):
    """A body and a head that its forward gives no position, as integrations do."""

    def __init__(self, case):
        super().__init__()
        V, H = case["weight"].shape
        self.body, self.head = torch.nn.Linear(H, H), torch.nn.Linear(H, V)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(H)), self.body.bias.zero_()
            self.head.weight.copy_(case["weight"]), self.head.bias.copy_(case["bias"])

    def forward(self, x):
        return self.body(x), self.head(x[..., :0, :])


def fsdp_heads_on_their_own_and_within_the_root():
    world = dist.get_world_size()
    case, advantages, mine = data_parallel_batch(world)
    case = without_reference(case)
    config = LossConfig.dapo()
    expected = results(linear_grpo_loss, case, advantages=advantages, config=config)
    for mesh, _, _ in data_parallel_meshes(world):
        for alone in (True, False):
            model = WithoutLogits(case)
            if alone:
                fully_shard(model.head, mesh=mesh)
            fully_shard(model, mesh=mesh)
            hidden, _ = model(case["hidden"][mine])
            linear_grpo_loss(
                hidden, model.head.weight, case["tokens"][mine], advantages[mine],
                bias=model.head.bias, config=config,
            ).loss.backward()  # fmt: skip
            for shard, name in ((model.head.weight, "d_weight"), (model.head.bias, "d_bias")):
                assert isinstance(shard.grad, DTensor)
                torch.testing.assert_close(shard.grad.full_tensor(), expected[name])


CASES = (
    statistics_under_any_upstream_gradient,
    masked_tokens_temperature_and_softcap,
    shards_that_are_excluded,
    losses,
    a_padded_vocabulary,
    one_collective_per_chunk_and_one_for_the_gradient,
    ranks_that_would_plan_other_chunks_agree,
    compiled_whole,
    a_group_within_the_world,
    megatron_adds_up_the_gradients_of_verl,
    errors_rise_on_every_rank,
    sharded_weights_are_gathered_once_and_get_the_mean_in_shards,
    replicas_of_shards_are_reduced_in_shards,
    fsdp_heads_on_their_own_and_within_the_root,
)


def main(rank, world, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
    for case in CASES:
        case()
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    os._exit(0)  # tearing gloo's threads down sometimes aborts, long after what is tested here
