"""linear_token_stats with a frozen head: forward computes the gradients in the hidden states."""

import pytest
import torch

from grpo_kernels import LossConfig, linear_grpo_loss, linear_token_stats
from tests.helpers.linear import check_linear, linear_results, make_linear_case, without_reference
from tests.helpers.tensors import DTYPES, coin, normal, upstream_like

ALL = ("logprob", "entropy", "kl")
HIDDEN = ("hidden",)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl", [None, "forward", "reverse"])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_gradients_are_as_accurate_as_torch(backend, device, dtype, kl, entropy_grad):
    case = make_linear_case(3, 2, 5, dtype=dtype, device=device)
    if kl is None:
        case = without_reference(case)
    mask = coin(8, 2, 5, device=device)
    keywords = {"kl": kl, "mask": mask, "chunk_tokens": 4, "softcap": 5.0, "temperature": 0.7}
    for names in (("logprob",), ("entropy",), ALL if kl else ALL[:2]):
        upstream = upstream_like(9, case["tokens"], names)

        def function(*tensors, **keywords):
            return linear_token_stats(*tensors, entropy_grad=entropy_grad, **keywords)

        check_linear(function, case, upstream, HIDDEN, **keywords)


@pytest.mark.parametrize("names", [("logprob",), ALL])
def test_fixed_chunk_size_is_batch_invariant(backend, names):
    """Three tokens alone, fewer than a chunk, equal the same among 11 others."""
    case = make_linear_case(11, 14, V=65, H=24)
    upstream = upstream_like(3, case["tokens"], names)
    for entropy_grad in (False, True):
        keywords = {"kl": "forward", "chunk_tokens": 8, "entropy_grad": entropy_grad}
        whole = linear_results(linear_token_stats, case, upstream, HIDDEN, **keywords)
        part = case | {name: case[name][6:9] for name in ("hidden", "tokens", "ref_hidden")}
        incoming = {name: g[6:9] for name, g in upstream.items()}
        alone = linear_results(linear_token_stats, part, incoming, HIDDEN, **keywords)
        assert torch.equal(alone["d_hidden"], whole["d_hidden"][6:9])


def test_broken_tokens_have_no_effect_on_others(backend):
    """Masked tokens with garbage, a NaN row, and NaN upstream gradients under the mask."""
    case, mask = without_reference(make_linear_case(1, 3, 4)), coin(2, 3, 4)
    upstream = upstream_like(3, case["tokens"], ("logprob",))
    keywords = {"mask": mask, "chunk_tokens": 3}
    clean = linear_results(linear_token_stats, case, upstream, HIDDEN, **keywords)
    broken = mask.nonzero()[1].tolist()
    dirty = dict(case, hidden=case["hidden"].masked_fill(~mask[..., None], torch.nan))
    dirty["hidden"][*broken] = torch.nan
    dirty["tokens"] = case["tokens"].masked_fill(~mask, -100)
    upstream["logprob"].masked_fill_(~mask, torch.nan)
    ours = linear_results(linear_token_stats, dirty, upstream, HIDDEN, **keywords)
    assert ours["d_hidden"][*broken].isnan().all()
    is_clean = torch.ones_like(mask)
    is_clean[*broken] = False
    assert torch.equal(ours["d_hidden"][is_clean], clean["d_hidden"][is_clean])
    # An upstream gradient of 0 gives 0, also in the broken row.
    upstream["logprob"][*broken] = 0.0
    ours = linear_results(linear_token_stats, dirty, upstream, HIDDEN, **keywords)
    assert (ours["d_hidden"][*broken] == 0).all() and (ours["d_hidden"][~mask] == 0).all()


def test_excluded_entries(backend):
    """A padded vocabulary: entries whose bias is -inf."""
    case = without_reference(make_linear_case(2, 2, 4, V=24))
    case["bias"][:20] = -torch.inf
    case["tokens"] = case["tokens"] % 4 + 20
    upstream = upstream_like(3, case["tokens"])
    check_linear(linear_token_stats, case, upstream, HIDDEN, chunk_tokens=3)


def test_backward_can_run_twice(backend):
    case = without_reference(make_linear_case(5, 2, 4, bias=False))
    hidden = case["hidden"].requires_grad_()
    for leaves in ([hidden], [hidden, case["weight"].requires_grad_()]):
        for chunk_tokens in (None, 3):
            stats = linear_token_stats(**case, chunk_tokens=chunk_tokens)
            total = (stats.logprob + stats.entropy).sum()
            first = torch.autograd.grad(total, leaves, retain_graph=True)
            second = torch.autograd.grad(2.0 * total, leaves)
            for one, two in zip(first, second, strict=True):
                torch.testing.assert_close(two, 2.0 * one)


@pytest.mark.parametrize("kl", [None, "reverse"])
def test_gradcheck(backend, kl):
    case = make_linear_case(1, 2, 3, V=11, H=4, dtype=torch.float64)
    if kl is None:
        case = without_reference(case)
    hidden = case.pop("hidden").requires_grad_()

    def outputs(hidden):
        stats = linear_token_stats(hidden, **case, kl=kl, entropy_grad=True, chunk_tokens=2)
        return tuple(stat for stat in stats if stat is not None)

    torch.autograd.gradcheck(outputs, (hidden,), fast_mode=True)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_sequence_level_loss_equals_that_of_one_chunk(backend, entropy_coef):
    case = without_reference(make_linear_case(6, 3, 4, dtype=torch.float64, bias=False))
    hidden, weight, tokens = case["hidden"].requires_grad_(), case["weight"], case["tokens"]
    config = LossConfig.gspo(entropy_coef=entropy_coef)
    advantages, old_logprob = torch.tensor([1.0, 0.0, -2.0]), normal(2, 3, 4) - 2
    grads = []
    for chunk_tokens in (None, 3):
        loss = linear_grpo_loss(
            hidden, weight, tokens, advantages.double(), old_logprob=old_logprob.double(),
            mask=coin(3, 3, 4), config=config, chunk_tokens=chunk_tokens,
        ).loss  # fmt: skip
        grads += torch.autograd.grad(3.0 * loss, hidden)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-13)
    assert grads[0].abs().max() > 0


def test_compiles_fullgraph(backend):
    case = without_reference(make_linear_case(7, 2, 4))
    hidden, mask = case.pop("hidden").requires_grad_(), coin(1, 2, 4)

    def total(hidden):
        stats = linear_token_stats(hidden, **case, mask=mask, chunk_tokens=3)
        return (stats.logprob * mask).sum() + stats.entropy.detach().sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(hidden), hidden)
    torch.testing.assert_close(ours, torch.autograd.grad(total(hidden), hidden))
