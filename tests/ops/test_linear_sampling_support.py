"""support: tokens that were drawn among a few ids, at the hidden level."""

import pytest
import torch
import torch._dynamo.testing
from hypothesis import example, given
from hypothesis import strategies as st

import grpo_kernels
from grpo_kernels import (
    HeadAdapter,
    LossConfig,
    TokenSupport,
    linear_grpo_loss,
    linear_token_stats,
    pack_tokens,
)
from reference import losses
from tests.helpers.count_flops import count_flops
from tests.helpers.linear import (
    LEAVES,
    check_linear,
    exact_linear_results,
    half_gradient_tolerance,
    linear_results,
    make_linear_case,
    relative_error,
    without_reference,
)
from tests.helpers.peak_memory import peak_memory
from tests.helpers.record_operators import RecordOperators
from tests.helpers.supports import lists_of_ids, make_support, with_wrong_ids
from tests.helpers.tensors import DTYPES, assert_same_bits, coin, normal, token_ids, upstream_like

V = 37
SIZES = (1, 0, 5, V, 20, 17)  # ids of each token; 0: the whole vocabulary
# Size of a vocabulary, and number of ids that all supports are taken from: so few that, with
# chunk_tokens=None, the products are with the rows of these ids only.
WIDE, FEW = 64, 12
ALL = ("logprob", "entropy", "kl", "sum_sq_probs", "mean_logit")
EVERY = {"sum_sq_probs": True, "mean_logit": True, "is_top1": True, "top_logprobs": 1}


def draw_support(seed, case, sizes=SIZES, few=False):
    """Support of a case; few: FEW different ids, and tokens among them, all over the vocabulary."""
    if not few:
        return make_support(seed, case["tokens"], len(case["weight"]), sizes)
    case["tokens"] %= FEW
    token_ids, offsets = make_support(seed, case["tokens"], FEW, sizes)
    case["tokens"] = case["tokens"] * 5 + 3
    return TokenSupport(token_ids * 5 + 3, offsets)


def make_all(
    seed, *leading, V=V, H=8, dtype=torch.float32, device="cpu", sizes=SIZES, kl=True, few=False
):
    """A case, upstream gradients of every output, and the support; few: WIDE and FEW."""
    case = make_linear_case(seed, *leading, V=WIDE if few else V, H=H, dtype=dtype, device=device)
    case = case if kl else without_reference(case)
    support = draw_support(seed + 9, case, sizes, few)
    names = [name for name in ALL if kl or name != "kl"]
    return case, upstream_like(seed + 10, case["tokens"], names), support


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("chunk_tokens", "few"), [(None, False), (None, True), (4, False)])
@pytest.mark.parametrize("kl", [None, "reverse"])
def test_outputs_and_gradients_are_as_accurate_as_torch(
    backend, device, dtype, kl, chunk_tokens, few
):
    case, upstream, support = make_all(
        1, 2, 5, dtype=dtype, device=device, kl=kl is not None, few=few
    )
    mask, temperature = coin(8, 2, 5, device=device), normal(3, 2, 5, device=device).abs() + 0.5
    keywords = {"kl": kl, "mask": mask, "temperature": temperature, "softcap": 6.0, **EVERY}
    keywords |= {"support": support, "chunk_tokens": chunk_tokens}
    ours = check_linear(linear_token_stats, case, upstream, **keywords)
    assert all((ours[name][~mask] == 0).all() for name in upstream)


@pytest.mark.parametrize(("chunk_tokens", "few"), [(None, False), (None, True), (4, False)])
@pytest.mark.parametrize("leaves", [LEAVES, ("hidden",)], ids=["trained", "frozen"])
@pytest.mark.parametrize("names", [("logprob",), ("entropy",), ("logprob", "kl")], ids=str)
def test_gradients_of_each_output(pytorch_backend, leaves, names, chunk_tokens, few):
    """With a frozen head and several chunks, forward prepares the gradient of the log-prob."""
    case, _, support = make_all(2, 9, few=few)
    case = case if "kl" in names else without_reference(case)
    keywords = {"kl": "forward" if "kl" in names else None, "support": support}
    upstream = upstream_like(3, case["tokens"], names)
    ours = linear_results(
        linear_token_stats, case, upstream, leaves, chunk_tokens=chunk_tokens,
        entropy_grad="entropy" in names, **keywords,
    )  # fmt: skip
    exact = exact_linear_results(case, upstream, leaves, **keywords)
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("chunk_tokens", "few"), [(None, True), (3, False)])
def test_logits_of_minus_infinity_in_the_support(backend, chunk_tokens, few):
    case, upstream, support = make_all(4, 2, 4, sizes=(5, 0, 9), few=few)
    excluded = torch.arange(len(case["bias"])) % 3 == 0
    excluded[case["tokens"]] = False
    case["bias"][excluded] = case["ref_bias"][excluded] = -torch.inf
    ours = check_linear(
        linear_token_stats, case, upstream, support=support, kl="forward",
        chunk_tokens=chunk_tokens, **EVERY,
    )  # fmt: skip
    assert all(value.isfinite().all() for value in ours.values())


@pytest.mark.parametrize("function", [linear_token_stats, linear_grpo_loss])
def test_gradient_of_the_weight_is_rounded_once(pytorch_backend, function):
    """Products with a few rows of the head, and with all, are summed before."""
    case, _, support = make_all(
        17, 64, H=32, dtype=torch.bfloat16, sizes=(5, 0), kl=False, few=True
    )
    keywords = {"support": support}
    if function is linear_grpo_loss:
        keywords |= {"advantages": torch.ones(64), "cu_seqlens": torch.tensor([0, 64])}
        keywords |= {"config": LossConfig()}

    def d_weight(function, dtype, **chunks):
        given = {name: x if name == "tokens" else x.to(dtype) for name, x in case.items()}
        weight = given["weight"] = given["weight"].clone().requires_grad_()
        value = function(**given, **keywords, **chunks)[0].sum()
        return torch.autograd.grad(value, weight)[0][support.token_ids.unique()].double()

    exact = d_weight(getattr(losses, function.__name__), torch.float64)
    in_parts = d_weight(function, torch.bfloat16)
    in_one = d_weight(function, torch.bfloat16, chunk_tokens=64)
    assert (in_parts - exact).abs().mean() < 1.1 * (in_one - exact).abs().mean()


@pytest.mark.parametrize("K", [5, WIDE])
def test_more_top_logprobs_than_the_supports_have_ids(backend, K):
    case = make_linear_case(6, 4, V=WIDE)
    case = without_reference(case) | {"tokens": torch.tensor([7, 2, 7, 60])}
    support = TokenSupport.from_lists([[7, 2], [2], [7], [60, 7]])
    for mask in (None, torch.tensor([1, 1, 0, 1])):
        keywords = {"support": support, "mask": mask, "top_logprobs": K, "is_top1": True}
        ours = linear_results(linear_token_stats, case, {}, **keywords)
        exact = exact_linear_results(case, {}, **keywords)
        torch.testing.assert_close(
            ours["top_logprobs"].double(), exact["top_logprobs"], rtol=2e-5, atol=2e-5
        )
        assert torch.equal(ours["is_top1"], exact["is_top1"])
        kept = ours["top_logprobs"] > -torch.inf
        assert torch.equal(ours["top_ids"][kept], exact["top_ids"][kept])
        assert ((ours["top_ids"] >= 0) & (ours["top_ids"] < WIDE)).all()


# An adapter, several tokens to a row


R = 3
ADAPTED = (*LEAVES, "a", "b")
ADVANTAGES = torch.tensor([1.0, -0.7], dtype=torch.float64)


def value(package, case, kind, **keywords):
    """A number made of the statistics, or the loss, with an adapter on the head."""
    case = dict(case)
    adapter = HeadAdapter(case.pop("a"), case.pop("b"), 0.7)
    inputs = [case.pop(name) for name in ("hidden", "weight", "tokens")]
    keywords |= {"adapter": adapter, "temperature": 0.9, "softcap": 8.0, **case}
    if kind == "statistics":
        stats = package.linear_token_stats(*inputs, kl="reverse", **keywords)
        return (stats.logprob * 1.3 + stats.entropy * 0.5 - stats.kl).sum()
    keywords |= {"config": LOSSES[kind], "old_logprob": -0.3 - 0.1 * inputs[2].double()}
    advantages = ADVANTAGES.to(torch.promote_types(torch.float32, inputs[0].dtype))
    return package.linear_grpo_loss(*inputs, advantages, **keywords).loss


LOSSES = {
    "token": LossConfig(beta=0.1, entropy_coef=0.05, epsilon_high=5.0),
    "reverse": LossConfig(beta=0.1, kl_estimator="reverse", epsilon_high=5.0),
    "sequence": LossConfig.gspo(beta=0.1, kl_estimator="forward"),
    "top entropy": LossConfig(top_entropy=0.5, beta=0.1),
}


def make_adapted(seed, *leading, V=V):
    case = make_linear_case(seed, *leading, V=V, dtype=torch.float64)
    case["a"] = normal(seed + 7, R, 8, dtype=torch.float64)
    case["b"] = normal(seed + 8, V, R, dtype=torch.float64)
    return case


def gradients(package, case, kind, frozen=(), **keywords):
    case, trained = dict(case), [name for name in ADAPTED if name not in frozen]
    for name in trained:
        case[name] = case[name].clone().requires_grad_()
    total = value(package, case, kind, **keywords)
    return (total.detach(), *torch.autograd.grad(total, [case[name] for name in trained]))


@pytest.mark.parametrize(("chunk_tokens", "few"), [(None, False), (None, True), (4, False)])
@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", ["statistics", *LOSSES])
def test_losses_and_gradients_with_an_adapter_match_autograd(
    pytorch_backend, kind, frozen, chunk_tokens, few
):
    case, mask = make_adapted(6, 2, 5, V=WIDE if few else V), coin(1, 2, 5)
    keywords = {"mask": mask, "frozen": frozen, "chunk_tokens": chunk_tokens}
    keywords["support"] = draw_support(2, case, few=few)
    exact = gradients(losses, case, kind, **keywords)
    case["hidden"] = torch.where(mask[..., None], case["hidden"], torch.nan)
    case["tokens"] = torch.where(mask, case["tokens"], -100)
    keywords["support"] = with_wrong_ids(keywords["support"], mask)
    ours = gradients(grpo_kernels, case, kind, **keywords)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("chunk_tokens", "few"), [(None, True), (4, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_losses_in_lower_precision(backend, kind, dtype, chunk_tokens, few):
    case = make_adapted(6, 2, 5, V=WIDE if few else V)
    support = draw_support(2, case, few=few)
    case = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.items()}
    doubled = {name: x.double() if x.is_floating_point() else x for name, x in case.items()}
    exact = gradients(losses, doubled, kind, support=support)
    ours = gradients(grpo_kernels, case, kind, support=support, chunk_tokens=chunk_tokens)
    for name, x, like in zip(("loss", *ADAPTED), ours, exact, strict=True):
        is_rounded = dtype != torch.float32 and name != "loss"
        assert relative_error(x, like) <= (half_gradient_tolerance() if is_rounded else 2e-6), name


ROWS = torch.tensor([0, 1, 1, 2, 4, 4, 1, 5, 4, 4])  # row 3 has no token


def make_shared(seed, few=False):
    """Several tokens to a row, and the support, the same for the tokens of a row."""
    case = make_adapted(seed, 6, V=WIDE if few else V)
    ids = lists_of_ids(draw_support(seed, case, (5, 0, 20, 1), few))
    drawn = token_ids(seed + 1, len(ROWS), V=V).tolist()
    tokens = [
        int(ids[row][token % len(ids[row])]) if len(ids[row]) else token
        for row, token in zip(ROWS.tolist(), drawn, strict=True)
    ]
    case["tokens"] = torch.tensor(tokens)
    return case, TokenSupport.from_lists([ids[row] for row in ROWS.tolist()])


@pytest.mark.parametrize(("chunk_tokens", "few"), [(None, False), (None, True), (2, False)])
def test_several_tokens_to_a_row(backend, chunk_tokens, few):
    case, support = make_shared(7, few)
    case = {name: x for name, x in case.items() if name not in ("a", "b")}
    upstream, mask = upstream_like(9, case["tokens"], ALL), coin(8, len(ROWS), p=0.8)
    keywords = {"token_rows": ROWS, "kl": "reverse", "mask": mask, "chunk_tokens": chunk_tokens}
    keywords |= {"support": with_wrong_ids(support, mask), **EVERY}
    check_linear(linear_token_stats, case, upstream, **keywords)
    check_linear(linear_token_stats, case, upstream, ("hidden",), **keywords)


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize("few", [False, True])
def test_loss_of_several_tokens_to_a_row(pytorch_backend, kind, few):
    case, support = make_shared(8, few)
    keywords = {"token_rows": ROWS, "cu_seqlens": torch.tensor([0, 4, 10]), "support": support}
    exact = gradients(losses, case, kind, **keywords)
    for chunk_tokens in (None, 2):
        ours = gradients(grpo_kernels, case, kind, chunk_tokens=chunk_tokens, **keywords)
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


# Bits, masks, sizes


def test_fixed_chunk_size_is_batch_invariant(backend, device):
    case, upstream, support = make_all(9, 14, V=65, H=24, device=device, sizes=(1, 0, 9, 40, 65))
    keywords = {"kl": "forward", "chunk_tokens": 8, **EVERY}
    whole = linear_results(linear_token_stats, case, upstream, support=support, **keywords)
    for rows in (range(3), range(6, 9), range(13, 14)):
        rows = torch.tensor(rows)
        part = case | {name: case[name][rows] for name in ("hidden", "tokens", "ref_hidden")}
        incoming = {name: g[rows] for name, g in upstream.items()}
        alone = linear_results(
            linear_token_stats, part, incoming, support=support.select(rows), **keywords
        )
        names = (*ALL, "is_top1", "top_logprobs", "top_ids", "d_hidden")
        assert_same_bits({n: alone[n] for n in names}, {n: whole[n][rows] for n in names})


@pytest.mark.parametrize(("dtype", "chunk_tokens"), [(torch.float32, None), (torch.bfloat16, 4)])
def test_masked_tokens_have_no_effect(backend, device, dtype, chunk_tokens):
    few = chunk_tokens is None
    case, upstream, support = make_all(10, 3, 5, dtype=dtype, device=device, few=few)
    mask = coin(11, 3, 5, device=device)
    keywords = {"kl": "reverse", "chunk_tokens": chunk_tokens, **EVERY}
    clean = linear_results(
        linear_token_stats, case, upstream, support=support, mask=mask, **keywords
    )
    support = with_wrong_ids(support, mask)
    for name in ("hidden", "ref_hidden"):
        case[name] = case[name].masked_fill(~mask[..., None], torch.nan)
    case["tokens"] = case["tokens"].masked_fill(~mask, -100)
    for masked in ({"mask": mask}, {"mask": mask, "packing": pack_tokens(mask)}):
        ours = linear_results(
            linear_token_stats, case, upstream, support=support, **masked, **keywords
        )
        assert_same_bits(ours, clean)


def test_empty_supports_are_the_whole_vocabulary(backend, device):
    case, upstream, support = make_all(12, 2, 5, device=device, sizes=(0,))
    keywords = {"kl": "reverse", "chunk_tokens": 4, **EVERY}
    expected = linear_results(linear_token_stats, case, upstream, **keywords)
    ours = linear_results(linear_token_stats, case, upstream, support=support, **keywords)
    assert_same_bits(ours, expected)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3)])
def test_without_tokens_that_count(backend, shape):
    case, upstream, support = make_all(13, *shape)
    mask = torch.zeros(shape, dtype=torch.bool)
    support = with_wrong_ids(support, mask)
    ours = linear_results(
        linear_token_stats, case, upstream, support=support, mask=mask, kl="forward", **EVERY
    )
    assert all((value == 0).all() for value in ours.values())
    loss, _ = linear_grpo_loss(
        case["hidden"], case["weight"], case["tokens"], torch.ones(shape), support=support,
        mask=mask, cu_seqlens=torch.tensor([0, 0]) if shape == (0,) else None,
    )  # fmt: skip
    assert loss == 0


@given(
    seed=st.integers(0, 2**31),
    B=st.integers(0, 3),
    T=st.integers(1, 4),
    V=st.sampled_from([1, 2, 17, 64]),
    chunk_tokens=st.sampled_from([None, 1, 3, 16]),
    masked=st.sampled_from([0.0, 0.5]),
    kl=st.sampled_from([None, "forward", "reverse"]),
    frozen=st.booleans(),
    few=st.booleans(),
)
@example(0, 0, 3, 5, None, 0.5, "reverse", False, False)
@example(1, 2, 1, 1, 1, 0.0, "forward", True, False)
@example(2, 2, 3, 5, None, 0.5, "reverse", False, True)
def test_any_shape_mask_and_chunk_size(
    pytorch_backend, seed, B, T, V, chunk_tokens, masked, kl, frozen, few
):
    case, upstream, support = make_all(
        seed, B, T, V=V, dtype=torch.float64, sizes=None, kl=kl is not None, few=few
    )
    leaves = ("hidden",) if frozen else LEAVES
    mask = coin(seed, B, T, p=1 - masked)
    keywords = {"kl": kl, "mask": mask, "chunk_tokens": chunk_tokens, "support": support, **EVERY}
    ours = linear_results(linear_token_stats, case, upstream, leaves, **keywords)
    exact = exact_linear_results(case, upstream, leaves, **keywords)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


# torch


@pytest.mark.parametrize("kind", ["statistics", "token", "sequence"])
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_gradcheck(pytorch_backend, kind, chunk_tokens):
    case = make_adapted(14, 2, 3, V=WIDE)
    support = draw_support(15, case, (3, 0, 9), few=True)
    leaves = [case[name].requires_grad_() for name in ADAPTED]

    def function(*leaves):
        given = case | dict(zip(ADAPTED, leaves, strict=True))
        return value(grpo_kernels, given, kind, support=support, chunk_tokens=chunk_tokens)

    torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", ["token", "sequence", "frozen"])
def test_opcheck(pytorch_backend, kind):
    case, _, support = make_all(16, 1, 3, V=11, H=4, sizes=(3, 0, 11), kl=False)
    leaves = [case["hidden"].requires_grad_(), case["weight"].requires_grad_(kind != "frozen")]
    config = LossConfig() if kind == "token" else LossConfig.gspo()
    with RecordOperators() as recorder:
        linear_grpo_loss(
            *leaves, case["tokens"], torch.ones(1), support=support, config=config, chunk_tokens=2
        ).loss.backward()
    assert "prepare_support" in recorder.calls and len(recorder.calls) >= 4
    recorder.opcheck({"linear_token_stats_forward": (0,) if kind == "frozen" else (0, 1)})


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_compiled_fullgraph_equals_eager_for_any_size_of_support(pytorch_backend, kind):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(case, token_ids, offsets, mask):
        support = TokenSupport(token_ids, offsets)
        return value(grpo_kernels, case, kind, support=support, mask=mask)

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    frames = set()
    for length in (4, 5, 7):
        case = make_adapted(length, 2, length)
        support, mask = make_support(length, case["tokens"], V), coin(length, 2, length)
        leaves = [case[name].requires_grad_() for name in ADAPTED]
        expected, ours = (f(case, *support, mask) for f in (function, compiled))
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x, leaves) for x in (ours, expected)))
        frames.add(counter.frame_count)
    assert len(frames) == 1, "compiled again"
    torch._dynamo.reset()


# Cost


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize("chunk_tokens", [None, 32])
def test_products_and_peak_memory_with_and_without_a_support(
    pytorch_backend, kind, frozen, chunk_tokens
):
    N, V, H = 64, 32768, 16
    hidden, weight = normal(1, N, H).requires_grad_(), normal(2, V, H).requires_grad_(not frozen)
    tokens, advantages = token_ids(3, N, V=V), normal(4, N)
    supports = (None, make_support(5, tokens, V, (50,)))
    cu_seqlens, config = torch.tensor([0, 30, N]), LossConfig(ratio_level=kind)

    def run(support):
        linear_grpo_loss(
            hidden, weight, tokens, advantages, support=support, cu_seqlens=cu_seqlens,
            config=config, chunk_tokens=chunk_tokens,
        ).loss.backward()  # fmt: skip

    run(None), run(supports[1])
    without, ours = (peak_memory(lambda x=x: run(x)) for x in supports)
    assert 32 * V * 4 < without and ours <= 1.05 * without
    without, ours = (count_flops(lambda x=x: run(x)) for x in supports)
    assert ours == without if chunk_tokens else ours < without / 2


# Errors


@pytest.mark.parametrize(
    ("support", "error", "message"),
    [
        (torch.ones(2, 5), TypeError, "support must be a TokenSupport.*got Tensor"),
        (
            TokenSupport(torch.tensor([0, 1]), torch.tensor([0, 2])),
            ValueError,
            r"support.offsets must have shape \(3,\).*got shape \(2,\)",
        ),
        (
            TokenSupport(torch.tensor([0, 1]), torch.tensor([0, 1, 1])),
            ValueError,
            r"support.offsets must .*from 0 to 2.*got \[0, 1, 1\]",
        ),
        (TokenSupport.from_lists([[0, 5], [1]]), ValueError, r"support.*got 5 for token 0"),
        (
            TokenSupport.from_lists([[0], [1, 3, 3]]),
            ValueError,
            r"support.*got 3 more than once for token 1",
        ),
        (
            TokenSupport.from_lists([[0], [2, 4]]),
            ValueError,
            r"support must have the id of every.*got \[2, 4\] for token 1, which is id 1",
        ),
    ],
)
def test_error_messages(pytorch_backend, support, error, message):
    inputs = (torch.zeros(1, 2, 4), torch.zeros(5, 4), torch.tensor([[0, 1]]))
    with pytest.raises(error, match=message):
        linear_token_stats(*inputs, support=support)
    with pytest.raises(error, match=message):
        linear_grpo_loss(*inputs, torch.ones(1), support=support)


def test_supports_of_the_tokens_of_a_row_are_the_same(pytorch_backend):
    hidden, weight = torch.zeros(2, 4), torch.zeros(5, 4)
    tokens, rows = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 1])
    same = TokenSupport.from_lists([[0], [1, 2], [2, 1]])
    linear_token_stats(hidden, weight, tokens, token_rows=rows, support=same)
    for ids in ([1, 3], [1], [], [0, 1, 2]):
        support = TokenSupport.from_lists([[0], [1, 2], ids])
        with pytest.raises(ValueError, match=r"support must be the same for all.*row 1"):
            linear_token_stats(hidden, weight, tokens, token_rows=rows, support=support)
        masked = torch.tensor([1, 1, 0])
        linear_token_stats(hidden, weight, tokens, token_rows=rows, support=support, mask=masked)
