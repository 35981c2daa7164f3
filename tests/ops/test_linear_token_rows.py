"""token_rows: several tokens predicted by one row of hidden states, as in tree-packed batches."""

import pytest
import torch

import grpo_kernels
from grpo_kernels import HeadAdapter, LossConfig, linear_grpo_loss, linear_token_stats
from reference import losses
from tests.helpers.count_flops import count_flops
from tests.helpers.linear import (
    check_linear,
    exact_linear_results,
    linear_results,
    make_linear_case,
    relative_error,
    without_reference,
)
from tests.helpers.tensors import DTYPES, assert_same_bits, coin, normal, token_ids, upstream_like

ALL = ("logprob", "entropy", "kl")
N, V = 6, 37
# Row 1 has three tokens and row 4 four, one of them twice; row 3 has none.
ROWS = torch.tensor([0, 1, 1, 2, 4, 4, 1, 5, 4, 4])


def make_case(seed, dtype=torch.float32, bias=True):
    case = make_linear_case(seed, N, V=V, dtype=dtype, bias=bias)
    case["tokens"] = token_ids(seed + 9, len(ROWS), V=V)
    case["tokens"][5] = case["tokens"][4]
    return case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl", [None, "reverse"])
@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_outputs_and_gradients_are_as_accurate_as_torch(backend, dtype, kl, chunk_tokens):
    case = make_case(3, dtype)
    if kl is None:
        case = without_reference(case)
    upstream = upstream_like(9, case["tokens"], ALL if kl else ALL[:2])
    temperature = (0.5 + normal(1, N).abs())[ROWS]
    keywords = {"token_rows": ROWS, "kl": kl, "mask": coin(8, len(ROWS), p=0.7)}
    keywords |= {"temperature": temperature, "softcap": 4.0, "chunk_tokens": chunk_tokens}
    check_linear(linear_token_stats, case, upstream, **keywords)
    check_linear(linear_token_stats, case, upstream, ("hidden",), **keywords)


@pytest.mark.parametrize("chunk_tokens", [None, 2, 4])
def test_equals_copies_of_the_rows(backend, chunk_tokens):
    case = make_case(4, torch.float64)
    upstream = upstream_like(2, case["tokens"], ALL, torch.float64)
    keywords = {"kl": "forward", "chunk_tokens": chunk_tokens}
    ours = linear_results(linear_token_stats, case, upstream, token_rows=ROWS, **keywords)
    copied = case | {name: case[name][ROWS] for name in ("hidden", "ref_hidden")}
    others = linear_results(linear_token_stats, copied, upstream, **keywords)
    d_hidden = torch.zeros_like(case["hidden"]).index_add(0, ROWS, others.pop("d_hidden"))
    torch.testing.assert_close(ours.pop("d_hidden"), d_hidden, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours, others, rtol=1e-10, atol=1e-12)


def test_one_token_to_each_row_in_any_order(backend):
    case = without_reference(make_linear_case(5, 2, 4))
    upstream = upstream_like(2, case["tokens"])
    expected = linear_results(linear_token_stats, case, upstream)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = case | {"tokens": case["tokens"].flatten()[order]}
    upstream = {name: grad.flatten()[order] for name, grad in upstream.items()}
    ours = linear_results(linear_token_stats, shuffled, upstream, token_rows=order)
    for name in ("logprob", "entropy"):
        expected[name] = expected[name].flatten()[order]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_masked_tokens_have_no_effect(backend):
    case, mask = without_reference(make_case(6)), coin(3, len(ROWS))
    upstream = upstream_like(2, case["tokens"])
    keywords = {"mask": mask, "chunk_tokens": 2}
    clean = linear_results(linear_token_stats, case, upstream, token_rows=ROWS, **keywords)
    dirty = case | {"tokens": case["tokens"].masked_fill(~mask, -100)}
    dirty["hidden"] = case["hidden"].clone()
    is_read = torch.zeros(N, dtype=torch.bool)
    is_read[ROWS[mask]] = True
    dirty["hidden"][~is_read] = torch.nan
    rows = ROWS.masked_fill(~mask, 10**6)
    assert_same_bits(
        linear_results(linear_token_stats, dirty, upstream, token_rows=rows, **keywords), clean
    )
    assert (clean["d_hidden"][~is_read] == 0).all() and (clean["logprob"][~mask] == 0).all()


def test_all_masked_and_no_tokens(backend):
    case = without_reference(make_case(7))
    for tokens in (len(ROWS), 0):
        part = case | {"tokens": case["tokens"][:tokens]}
        mask = torch.zeros(tokens, dtype=torch.bool)
        results = linear_results(
            linear_token_stats, part, upstream_like(2, part["tokens"]), token_rows=ROWS[:tokens],
            mask=mask,
        )  # fmt: skip
        assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_loss_and_gradients(backend, level, chunk_tokens):
    """Two sequences that share rows; some tokens have an advantage of 0."""
    case = without_reference(make_case(8, torch.float64, bias=False))
    case.pop("bias")
    adapter = HeadAdapter(*(normal(seed, *shape).double() for seed, shape in
                            ((20, (2, 8)), (21, (V, 2)))), 0.5)  # fmt: skip
    keywords = {
        "advantages": torch.tensor([1.0, -0.5, 2.0] if level == "sequence" else
                                   [1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 2.0, 0.0, 1.0, 0.0]).double(),
        "cu_seqlens": torch.tensor([0, 4, 8, 10]),
        "old_logprob": normal(3, len(ROWS)).double() - 3,
        "mask": coin(4, len(ROWS), p=0.8),
        "token_rows": ROWS,
        "config": LossConfig(ratio_level=level, epsilon_high=10.0),
    }  # fmt: skip
    results = []
    for package in (grpo_kernels, losses):
        leaves = [case["hidden"], case["weight"], adapter.a, adapter.b]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        hidden, weight, a, b = leaves
        loss, metrics = package.linear_grpo_loss(
            hidden, weight, case["tokens"], adapter=HeadAdapter(a, b, 0.5),
            chunk_tokens=chunk_tokens, **keywords,
        )  # fmt: skip
        results.append((loss, metrics["entropy"], *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_products_are_of_rows(pytorch_backend):
    """Twice as many tokens as rows cost the products of the rows."""
    rows, H = 32, 16
    case = without_reference(make_linear_case(0, rows, V=96, H=H, bias=False))
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    token_rows = torch.arange(rows).repeat(2)
    tokens, advantages = token_ids(3, 2 * rows, V=96), normal(4, 2 * rows)
    matmul = 2 * rows * 96 * H

    def loss(config):
        linear_grpo_loss(
            hidden, weight, tokens, advantages, token_rows=token_rows, chunk_tokens=8,
            config=config, cu_seqlens=torch.tensor([0, rows, 2 * rows]),
        ).loss.backward()  # fmt: skip

    assert count_flops(lambda: loss(LossConfig())) == 3 * matmul
    assert count_flops(lambda: loss(LossConfig(ratio_level="sequence"))) == 4 * matmul
    weight.requires_grad_(False)
    assert count_flops(lambda: loss(LossConfig())) == 2 * matmul
    with torch.no_grad():
        call = lambda: linear_token_stats(hidden, weight, tokens, token_rows=token_rows)  # noqa: E731
        assert count_flops(call) == matmul


def test_repeated_runs_are_bitwise_equal(backend):
    case = make_case(9, torch.bfloat16)
    upstream = upstream_like(2, case["tokens"], ALL)
    keywords = {"token_rows": ROWS, "kl": "reverse", "chunk_tokens": 2}
    first = linear_results(linear_token_stats, case, upstream, **keywords)
    assert_same_bits(linear_results(linear_token_stats, case, upstream, **keywords), first)


def test_fixed_chunk_size_is_batch_invariant(backend):
    """Seven rows with 1 to 7 tokens, alone and beside a row with 300."""
    counts = torch.tensor([*range(1, 8), 300])
    case = without_reference(make_linear_case(13, len(counts), V=V))
    token_rows = torch.arange(len(counts)).repeat_interleave(counts)
    case["tokens"] = token_ids(1, len(token_rows), V=V)
    upstream = upstream_like(2, case["tokens"])
    whole = linear_results(
        linear_token_stats, case, upstream, token_rows=token_rows, chunk_tokens=8
    )
    rows, tokens = len(counts) - 1, int(counts[:-1].sum())
    part = case | {"hidden": case["hidden"][:rows], "tokens": case["tokens"][:tokens]}
    alone = linear_results(
        linear_token_stats, part, {name: grad[:tokens] for name, grad in upstream.items()},
        token_rows=token_rows[:tokens], chunk_tokens=8,
    )  # fmt: skip
    for name in ("logprob", "entropy", "d_hidden"):
        assert torch.equal(alone[name], whole[name][: len(alone[name])]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("names", [("logprob",), ALL])
@pytest.mark.parametrize("softcap", [None, 40.0])
def test_probable_tokens_in_half_precision(backend, dtype, names, softcap):
    """g (1 - p) is rounded, not g and g p, which would cancel: as if each row had one token."""
    case, rows = make_linear_case(10, N, V=V, dtype=dtype), torch.arange(N).repeat(2)
    case["hidden"] = 5 * case["hidden"]
    case["tokens"] = (case["hidden"] @ case["weight"].T + case["bias"]).argmax(-1)
    upstream = upstream_like(2, case["tokens"], names)
    keywords = {"kl": "reverse", "softcap": softcap}
    once = linear_results(linear_token_stats, case, upstream, **keywords)
    exact = exact_linear_results(case, upstream, **keywords)
    twice = case | {"tokens": case["tokens"][rows]}
    halves = {name: grad[rows] / 2 for name, grad in upstream.items()}
    ours = linear_results(linear_token_stats, twice, halves, token_rows=rows, **keywords)
    for name in ("d_hidden", "d_weight", "d_bias"):
        allowed = 1.1 * relative_error(once[name], exact[name])
        assert relative_error(ours[name], exact[name]) <= allowed, name


def test_gradcheck_and_compile(backend):
    case = without_reference(make_case(11, torch.float64))
    leaves = [case.pop(name).requires_grad_() for name in ("hidden", "weight")]
    mask = coin(1, len(ROWS))

    def outputs(hidden, weight):
        stats = linear_token_stats(hidden, weight, **case, token_rows=ROWS, mask=mask)
        return stats.logprob, stats.entropy

    torch.autograd.gradcheck(outputs, leaves, fast_mode=True)
    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), outputs(*leaves))
    ours, expected = (
        torch.autograd.grad(sum(x.sum() for x in function(*leaves)), leaves)
        for function in (compiled, outputs)
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"token_rows": ROWS[:3]}, ValueError, r"token_rows must have shape \(10,\), got"),
        ({"token_rows": ROWS.float()}, TypeError, "token_rows must be integer ids, got"),
        ({"token_rows": ROWS + 1}, ValueError, r"token_rows must lie in \[0, 6\), .* got 6"),
        ({"token_rows": ROWS - 1}, ValueError, r"token_rows must lie in \[0, 6\), .* got -1"),
        ({"token_rows": None}, ValueError, r"tokens must have shape \(6,\)"),
        (
            {"temperature": 1.0 + torch.arange(10.0)},
            ValueError,
            "temperature must be the same for all tokens of a row of hidden, got several for row 1",
        ),
    ],
)
def test_errors(keywords, error, message):
    case = without_reference(make_case(12))
    with pytest.raises(error, match=message):
        linear_token_stats(**case, **({"token_rows": ROWS} | keywords))
