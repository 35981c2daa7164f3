"""support: tokens that were drawn among a few ids, at the logits level."""

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_kernels import TokenSupport, grpo_loss, token_stats
from reference import losses
from tests.helpers.grpo_loss import CONFIGS, B, T, make_inputs, run
from tests.helpers.peak_memory import peak_memory
from tests.helpers.record_operators import RecordOperators
from tests.helpers.supports import kept_entries, lists_of_ids, make_support, with_wrong_ids
from tests.helpers.tensors import (
    DTYPES,
    assert_same_bits,
    check_against_oracle,
    coin,
    make_case,
    normal,
    results,
    upstream_like,
)

V = 83  # two whole tiles of the interpreter and a tail
SIZES = (1, 0, 5, V, 20, 40)  # ids of each token; 0: the whole vocabulary
INF = torch.inf
ALL = ("logprob", "entropy", "kl", "sum_sq_probs", "mean_logit")
SUMS = {"sum_sq_probs": True, "mean_logit": True}
EVERY = {"is_top1": True, "top_logprobs": 1, **SUMS}


def make_all(seed, *leading, V=V, dtype=torch.float32, device="cpu", sizes=SIZES, kl="reverse"):
    """Logits, tokens, upstream gradients of every output, and keywords."""
    logits, tokens = make_case(seed, *leading, V, dtype=dtype, device=device)
    keywords = {"support": make_support(seed + 2, tokens, V, sizes), **EVERY}
    if kl:
        ref_logits = normal(seed + 3, *leading, V, dtype=dtype, device=device)
        keywords |= {"kl": kl, "ref_logits": ref_logits}
    names = [name for name in ALL if kl or name != "kl"]
    return logits, tokens, upstream_like(seed + 4, tokens, names), keywords


def select_rows(index, logits, tokens, upstream, keywords):
    """Index the rows of packed inputs."""
    selected = {"support": keywords["support"].select(index)}
    if "ref_logits" in keywords:
        selected["ref_logits"] = keywords["ref_logits"][index]
    upstream = {name: g[index] for name, g in upstream.items()}
    return logits[index], tokens[index], upstream, keywords | selected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl", [None, "forward", "reverse"])
def test_outputs_and_gradient_are_as_accurate_as_torch(backend, device, dtype, kl):
    *case, keywords = make_all(1, 2, 3, dtype=dtype, device=device, kl=kl)
    ours = check_against_oracle(*case, **keywords)
    kept = kept_entries(keywords["support"], case[1], V)
    assert (ours["d_logits"][~kept] == 0).all()
    assert ours["logprob"][0, 0] == ours["entropy"][0, 0] == 0 and ours["is_top1"][0, 0]
    assert not ours["is_top1"].all()


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_temperature_softcap_mask_and_logits_of_minus_infinity(backend, device, softcap, kl):
    logits, tokens, upstream, keywords = make_all(2, 2, 3, device=device, kl=kl)
    excluded = (logits < 0).scatter(-1, tokens.unsqueeze(-1), False)
    excluded[0, 1] = excluded[1, 0] = False
    keywords["ref_logits"] = keywords["ref_logits"].masked_fill(excluded, -INF)
    keywords["temperature"] = normal(7, 2, 3, device=device).abs() + 0.5
    keywords["mask"] = torch.tensor([[1, 1, 1], [1, 0, 1]], device=device)
    ours = check_against_oracle(
        logits.masked_fill(excluded, -INF), tokens, upstream, softcap=softcap, **keywords
    )
    assert all(value.isfinite().all() for value in ours.values())
    assert (ours["d_logits"][excluded] == 0).all()


def test_token_with_a_logit_of_minus_infinity(backend, device):
    logits, tokens, _, keywords = make_all(3, 5, device=device, kl=None, sizes=(7,))
    logits[2, tokens[2]] = -INF
    ours = check_against_oracle(logits, tokens, {}, **keywords)
    assert ours["logprob"][2] == -INF and ours["entropy"].isfinite().all()


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_kl_is_infinite_only_where_the_other_policy_excludes_an_entry_of_the_support(backend, kl):
    logits, tokens, _, keywords = make_all(4, 3, kl=kl, sizes=(9,))
    lacking = logits if kl == "forward" else keywords["ref_logits"]
    kept = kept_entries(keywords["support"], tokens, V)
    lacking[0, ~kept[0]] = -INF
    ids = lists_of_ids(keywords["support"])[1]
    lacking[1, ids[ids != tokens[1]][0]] = -INF
    ours = check_against_oracle(logits, tokens, {}, **keywords)
    assert ours["kl"].isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("sizes", [(1, 2, 15, 16, 17), (31, 32, 33, 34, 35)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_gradient_of_each_output_alone_at_sizes_about_powers_of_two(backend, sizes, name):
    logits, tokens, upstream, keywords = make_all(5, 5, V=35, sizes=sizes, kl="forward")
    check_against_oracle(logits, tokens, {name: upstream[name]}, **keywords)


def test_every_size_of_support(pytorch_backend):
    """K from 1 to V."""
    *case, keywords = make_all(6, V, sizes=range(1, V + 1))
    check_against_oracle(*case, **keywords)


@pytest.mark.parametrize("garbage", [torch.nan, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_outside_the_support_are_not_read(backend, device, garbage, dtype):
    logits, *case, keywords = make_all(7, 2, 3, dtype=dtype, device=device)
    expected = results(token_stats, logits, *case, softcap=9.0, **keywords)
    outside = ~kept_entries(keywords["support"], case[0], V)
    keywords["ref_logits"] = keywords["ref_logits"].masked_fill(outside, garbage)
    logits = logits.masked_fill(outside, garbage)
    assert_same_bits(results(token_stats, logits, *case, softcap=9.0, **keywords), expected)


def test_largest_logits_of_a_support(backend, device):
    """A support of fewer than K ids is followed by log-probs of -inf."""
    logits, tokens, _, keywords = make_all(8, 5, device=device, kl=None, sizes=(1, 6, 0, V, 3))
    logits[3] = logits[3].round()  # equal logits: the smaller id comes first
    ours = results(token_stats, logits, tokens, {}, **keywords | {"top_logprobs": 6})
    exact = results(losses.token_stats, logits, tokens, {}, **keywords | {"top_logprobs": 6})
    torch.testing.assert_close(ours["top_logprobs"], exact["top_logprobs"], rtol=1e-6, atol=4e-6)
    kept = ours["top_logprobs"] > -INF
    assert kept.sum(-1).tolist() == [1, 6, 6, 6, 3]
    assert torch.equal(ours["top_ids"][kept], exact["top_ids"][kept])
    assert ((ours["top_ids"] >= 0) & (ours["top_ids"] < V)).all()


def test_empty_supports_are_the_whole_vocabulary(backend, device):
    *case, keywords = make_all(9, 2, 3, device=device, sizes=(0,))
    without = {name: x for name, x in keywords.items() if name != "support"}
    expected = results(token_stats, *case, **without)
    assert_same_bits(results(token_stats, *case, **keywords), expected)


def test_order_and_dtype_of_the_ids_have_no_effect(backend, device):
    *case, keywords = make_all(10, 2, 3, device=device)
    expected = results(token_stats, *case, **keywords)
    token_ids, offsets = TokenSupport.from_lists(
        [ids.flip(0) for ids in lists_of_ids(keywords["support"])]
    )
    support = TokenSupport(token_ids.int().to(device), offsets.int())
    assert_same_bits(results(token_stats, *case, **keywords | {"support": support}), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_row_do_not_depend_on_other_rows(backend, device, dtype):
    case = make_all(11, 6, dtype=dtype, device=device)
    whole = results(token_stats, *case[:3], **case[3])
    for rows in ([2], [4, 1, 0], [5, 4, 3, 2, 1, 0]):
        rows = torch.tensor(rows, device=device)
        *part, keywords = select_rows(rows, *case)
        expected = {name: value[rows] for name, value in whole.items()}
        assert_same_bits(results(token_stats, *part, **keywords), expected)


def test_repeated_runs_are_bitwise_equal(backend, device):
    *case, keywords = make_all(12, 2, 3, dtype=torch.bfloat16, device=device)
    first = results(token_stats, *case, **keywords)
    assert_same_bits(results(token_stats, *case, **keywords), first)


def test_masked_tokens_have_no_effect(backend, device):
    logits, tokens, upstream, keywords = make_all(13, 2, 3, device=device)
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]], device=device) != 0
    keywords["mask"] = mask
    expected = check_against_oracle(logits, tokens, upstream, **keywords)
    assert all((value[~mask] == 0).all() for value in expected.values())
    keywords["support"] = with_wrong_ids(keywords["support"], mask)
    keywords["ref_logits"] = keywords["ref_logits"].masked_fill(~mask[..., None], torch.nan)
    logits = logits.masked_fill(~mask[..., None], torch.nan)
    tokens = tokens.masked_fill(~mask, -100)
    assert_same_bits(results(token_stats, logits, tokens, upstream, **keywords), expected)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 2)])
def test_without_tokens_that_count(backend, device, shape):
    logits, tokens, upstream, keywords = make_all(14, *shape, device=device)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    keywords |= {"support": with_wrong_ids(keywords["support"], mask), "top_logprobs": 30}
    ours = results(token_stats, logits * torch.nan, tokens, upstream, mask=mask, **keywords)
    assert all((value == 0).all() for value in ours.values())


def test_nan_stays_in_its_row(backend, device):
    logits, *case, keywords = make_all(15, 4, device=device, sizes=(4, 9, 20, 0))
    clean = results(token_stats, logits, *case, **keywords)
    logits[1, lists_of_ids(keywords["support"])[1][3]] = torch.nan
    ours = results(token_stats, logits, *case, **keywords)
    assert all(ours[name][1].isnan() for name in ALL) and not ours["is_top1"][1]
    others = torch.tensor([0, 2, 3], device=device)
    assert_same_bits(*({k: x[others] for k, x in found.items()} for found in (ours, clean)))


def test_strided_logits(backend, device):
    wide, tokens = make_case(16, 2, 4, V + 7, device=device)
    logits, tokens = wide[:, :-1, :V], tokens[:, 1:] % V
    support = make_support(17, tokens, V, SIZES)
    check_against_oracle(logits, tokens, upstream_like(5, tokens), support=support)


def test_gradient_of_one_support_is_zero_where_upstream_is(backend):
    logits, tokens, upstream, keywords = make_all(18, 3, sizes=(4,))
    upstream = {name: g * torch.tensor([1.0, 0.0, 2.0]) for name, g in upstream.items()}
    ours = check_against_oracle(logits, tokens, upstream, **keywords)
    assert (ours["d_logits"][1] == 0).all()


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 5),
    V=st.integers(1, 100),
    kl=st.sampled_from([None, "forward", "reverse"]),
    softcap=st.sampled_from([None, 3.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_support_is_as_accurate_as_torch(backend, seed, N, V, kl, softcap, dtype):
    *case, keywords = make_all(seed, N, V=V, dtype=dtype, kl=kl, sizes=None)
    mask = coin(seed + 9, N, p=0.8)
    check_against_oracle(*case, softcap=softcap, mask=mask, temperature=0.8, **keywords)


# Losses

LOSS_SIZES = (3, 0, 37, 1, 12, 20)
LOSS_CONFIGS = (
    "grpo", "entropy bonus", "every term", "gspo", "gspo_token", "cispo", "beta, k3",
    "beta, forward", "top entropy", "dppo", "metric, k3",
)  # fmt: skip


def make_loss_inputs(seed, *leading, dtype=torch.float64, sequences=B):
    logits, tokens, advantages, keywords = make_inputs(
        seed, *leading, dtype=dtype, sequences=sequences
    )
    keywords["support"] = make_support(seed + 7, tokens, logits.shape[-1], LOSS_SIZES)
    logprob = losses.token_stats(logits, tokens, support=keywords["support"]).logprob
    for name in ("old_logprob", "sampling_logprob"):
        keywords[name] = logprob + 0.3 * normal(seed + len(name), *leading, dtype=logprob.dtype)
    return logits, tokens, advantages, keywords | {"temperature": 0.9, "softcap": 20.0}


@pytest.mark.parametrize("name", LOSS_CONFIGS)
def test_loss_gradient_and_metrics_match_reference(backend, name):
    *case, keywords = make_loss_inputs(11, B, T)
    keywords |= {"config": CONFIGS[name], "scale": 1.7}
    ours = run(grpo_loss, *case, **keywords)
    exact = run(losses.grpo_loss, *case, **keywords)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)
    kept = kept_entries(keywords["support"], case[1], case[0].shape[-1])
    assert (ours[2][~kept] == 0).all() and ours[2].any()


@pytest.mark.parametrize("name", ["every term", "gspo"])
def test_packed_loss_matches_reference(backend, name):
    *case, keywords = make_loss_inputs(12, 5, sequences=2)
    keywords |= {"config": CONFIGS[name], "cu_seqlens": torch.tensor([0, 2, 5])}
    ours = run(grpo_loss, *case, **keywords)
    exact = run(losses.grpo_loss, *case, **keywords)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["grpo", "every term", "gspo"])
def test_inplace_is_bitwise_equal(backend, name, dtype):
    logits, *case, keywords = make_loss_inputs(13, B, T, dtype=dtype)
    keywords["config"] = CONFIGS[name]
    expected = run(grpo_loss, logits, *case, **keywords)
    values = logits.clone().requires_grad_() * 1.0
    loss, metrics = grpo_loss(values, *case, inplace=True, **keywords)
    loss.backward()
    assert torch.equal(loss, expected[0]) and torch.equal(values.detach(), expected[2])
    torch.testing.assert_close(metrics, expected[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["grpo", "every term", "gspo"])
def test_loss_does_not_read_masked_tokens_and_logits_outside_the_support(backend, name):
    logits, tokens, advantages, keywords = make_loss_inputs(14, B, T, dtype=torch.float32)
    keywords["config"] = CONFIGS[name]
    expected = run(grpo_loss, logits, tokens, advantages, **keywords)
    mask = keywords["mask"]
    outside = ~(kept_entries(keywords["support"], tokens, logits.shape[-1]) & mask[..., None])
    keywords["support"] = with_wrong_ids(keywords["support"], mask)
    keywords["ref_logits"] = keywords["ref_logits"].masked_fill(outside, torch.nan)
    tokens, logits = tokens.masked_fill(~mask, -100), logits.masked_fill(outside, torch.nan)
    ours = run(grpo_loss, logits, tokens, advantages, **keywords)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


# torch


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_gradcheck(pytorch_backend, kl):
    logits, tokens = make_case(1, 3, 6, dtype=torch.float64, std=1.5)
    keywords = {"kl": kl, "ref_logits": normal(3, 3, 6, dtype=torch.float64), "softcap": 3.0}
    support = make_support(2, tokens, 6, (3, 0, 5))

    def outputs(logits):
        stats = token_stats(logits, tokens, support=support, temperature=0.7, **SUMS, **keywords)
        return tuple(stat for stat in stats if stat is not None)

    torch.autograd.gradcheck(outputs, logits.requires_grad_(), fast_mode=True)


def test_opcheck(backend):
    *case, keywords = make_all(3, 1, 3, V=7, sizes=(3, 0, 7))
    with RecordOperators() as recorder:
        results(token_stats, *case, **keywords)
        run(grpo_loss, *case[:2], torch.ones(1), support=keywords["support"])
    assert recorder.calls.keys() == {
        "prepare_support", "token_stats_forward", "token_stats_backward", "grpo_loss_", "scale_",
    }  # fmt: skip
    recorder.opcheck({"token_stats_forward": (0,)})


def test_compiled_fullgraph_equals_eager_for_any_size_of_support(pytorch_backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(logits, tokens, advantages, token_ids, offsets, mask):
        support = TokenSupport(token_ids, offsets)
        stats = token_stats(logits, tokens, support=support, mask=mask)
        return (
            stats.logprob.sum()
            + grpo_loss(logits, tokens, advantages, support=support, mask=mask).loss
        )

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    frames = set()
    for length in (3, 4, 6):
        logits, tokens = make_case(length, 2, length, 17)
        support = make_support(length, tokens, 17)
        mask = coin(length, 2, length)
        found = []
        for function in (loss, compiled):
            leaf = logits.clone().requires_grad_()
            value = function(leaf, tokens, torch.tensor([1.0, -1.0]), *support, mask)
            found.append((value.detach(), *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(found[1], found[0])
        frames.add(counter.frame_count)
    assert len(frames) == 1, "compiled again"
    torch._dynamo.reset()


def test_forward_makes_no_tensor_of_the_size_of_the_logits(pytorch_backend):
    logits, tokens = make_case(1, 32, 4096)
    support = make_support(2, tokens, 4096, (50,))
    call = lambda: token_stats(logits, tokens, support=support)  # noqa: E731
    call()
    assert peak_memory(call) < logits.numel() * logits.element_size() / 4


# Errors


@pytest.mark.parametrize(
    ("support", "error", "message"),
    [
        (([0, 1], [0, 1, 2]), TypeError, "support must be a TokenSupport.*got tuple"),
        (
            TokenSupport(torch.tensor([0.0, 1.0]), torch.tensor([0, 1, 2])),
            TypeError,
            "support.token_ids must be integer ids, got torch.float32",
        ),
        (
            TokenSupport(torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 2.0])),
            TypeError,
            "support.offsets must be integer ids, got torch.float32",
        ),
        (
            TokenSupport(torch.tensor([[0, 1]]), torch.tensor([0, 1, 2])),
            ValueError,
            r"support.token_ids must be \[S\], got shape \(1, 2\)",
        ),
        (
            TokenSupport(torch.tensor([0, 1]), torch.tensor([0, 2])),
            ValueError,
            r"support.offsets must have shape \(3,\).*got shape \(2,\)",
        ),
        *(
            (
                TokenSupport(torch.tensor([0, 1]), torch.tensor(offsets)),
                ValueError,
                rf"support.offsets must .*from 0 to 2.*got \[{str(offsets)[1:-1]}\]",
            )
            for offsets in ([1, 1, 2], [0, 1, 3], [0, 3, 2], [0, 1, 1])
        ),
        *(
            (TokenSupport.from_lists(ids), ValueError, rf"support.*got {got} for token {token}")
            for ids, got, token in (
                ([[0, 5], [1]], "5", 0),
                ([[0], [1, -1]], "-1", 1),
                ([[0], [2, 1, 2]], "2 more than once", 1),
            )
        ),
        (
            TokenSupport.from_lists([[0], [2, 4]]),
            ValueError,
            r"support must have the id of every.*got \[2, 4\] for token 1, which is id 1",
        ),
    ],
)
def test_error_messages(backend, support, error, message):
    logits, tokens = torch.zeros(1, 2, 5), torch.tensor([[0, 1]])
    with pytest.raises(error, match=message):
        token_stats(logits, tokens, support=support)
    with pytest.raises(error, match=message):
        grpo_loss(logits.requires_grad_(), tokens, torch.ones(1), support=support)


@pytest.mark.gpu
def test_wrong_support_gives_nan_on_a_gpu():
    ids = [[0, 5], [1, -1], [2, 1, 2], [2, 4], [1, 0], []]
    support = TokenSupport.from_lists(ids)
    logits = torch.zeros(6, 5, device="cuda")
    tokens = torch.tensor([0, 1, 1, 1, 1, 1], device="cuda")
    for given_support in (support, support.to("cuda")):
        logprob = token_stats(logits, tokens, support=given_support).logprob
        assert logprob.isnan().tolist() == [True] * 4 + [False] * 2
