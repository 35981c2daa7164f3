"""Distillation from a teacher's K most likely tokens, against autograd of the reference in fp64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_kernels import HeadAdapter, distillation_loss, linear_distillation_loss
from grpo_kernels.ops import top_k_divergence
from reference import losses
from tests.helpers.count_flops import count_flops
from tests.helpers.distillation import check_against_fp64, run
from tests.helpers.peak_memory import peak_memory
from tests.helpers.record_operators import RecordOperators
from tests.helpers.tensors import coin, normal

KINDS = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
B, T, V, H, K = 2, 3, 37, 6, 4
MASK = torch.tensor([[True, True, True], [True, False, True]])


def top_logprobs(seed, *shape, V=V, K=K, dtype=torch.float32, std=3.0):
    """Ids and log-probs of the K most likely of V tokens."""
    logprobs = torch.log_softmax(normal(seed, *shape, V, std=std).double(), dim=-1)
    logprobs, ids = logprobs.topk(K)
    return ids, logprobs.to(dtype)


def ragged(teacher):
    """Lists of 4, 3 and 0 tokens, with what is no entry anywhere."""
    ids, logprobs = (x.clone() for x in teacher)
    ids[0, 1, 1], logprobs[0, 1, 1] = -1, torch.nan
    logprobs[0, 2, 0] = -torch.inf
    ids[1, 0] = -1
    return ids, logprobs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("divergence", "jsd_weight"), KINDS)
def test_logits(backend, divergence, jsd_weight, dtype):
    logits = normal(1, B, T, V, std=3, dtype=dtype)
    logits[~MASK] = torch.nan
    temperature = normal(4, B, T).abs().to(logits.dtype) + 0.5
    check_against_fp64(
        distillation_loss, losses.distillation_loss, logits, mask=MASK, softcap=5.0,
        teacher_top_logprobs=ragged(top_logprobs(2, B, T)), divergence=divergence,
        jsd_weight=jsd_weight, temperature=temperature, token_weights=normal(5, B, T),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(("divergence", "jsd_weight"), KINDS)
def test_hidden_states(backend, divergence, jsd_weight, dtype):
    adapter = HeadAdapter(normal(5, 2, H).to(dtype), normal(6, V, 2).to(dtype), 0.5)
    check_against_fp64(
        linear_distillation_loss, losses.linear_distillation_loss,
        normal(1, B, T, H, dtype=dtype), normal(2, V, H, dtype=dtype), leaves=2,
        teacher_top_logprobs=ragged(top_logprobs(3, B, T)), divergence=divergence,
        jsd_weight=jsd_weight, mask=MASK, temperature=0.7, adapter=adapter,
        softcap=8.0, bias=normal(8, V).to(dtype), chunk_tokens=2, normalizer=3.0,
        token_weights=normal(9, B, T),
    )  # fmt: skip


@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6)),
    kind=st.sampled_from(KINDS),
    dropped=st.integers(0, 6),
)
def test_small_shapes(pytorch_backend, seed, shape, kind, dropped):
    """Against the reference, through logits and hidden states, in fp64."""
    N, K, V = shape
    K, (divergence, jsd_weight) = min(K, V), kind
    ids, logprobs = top_logprobs(seed, N, V=V, K=K, dtype=torch.float64)
    ids[:, K - min(dropped, K) :] = -1
    hidden, weight = normal(seed + 1, N, 2).double(), normal(seed + 2, V, 2, std=2).double()
    keywords = {
        "teacher_top_logprobs": (ids, logprobs), "divergence": divergence,
        "jsd_weight": jsd_weight, "mask": coin(seed + 3, N, p=0.8),
    }  # fmt: skip
    function, oracle = linear_distillation_loss, losses.linear_distillation_loss
    ours, exact = (run(f, hidden, weight, leaves=2, **keywords) for f in (function, oracle))
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)
    logits = hidden @ weight.T
    function, oracle = distillation_loss, losses.distillation_loss
    ours, exact = (run(f, logits, **keywords) for f in (function, oracle))
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


def test_one_listed_token_by_hand(backend):
    """p = (1/2, 1/4, 1/4), and the teacher gives token 1 a probability of 2/3."""
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    teacher = torch.tensor([[1]]), torch.tensor([[2 / 3]], dtype=torch.float64).log()
    p, q = (1 / 4, 3 / 4), (2 / 3, 1 / 3)
    reverse = p[0] * math.log(p[0] / q[0]) + p[1] * math.log(p[1] / q[1])
    forward = q[0] * math.log(q[0] / p[0]) + q[1] * math.log(q[1] / p[1])
    h = [math.log(a / b) - reverse for a, b in zip(p, q, strict=True)]
    expected = {
        "reverse": (reverse, [h[1] / 2, h[0] / 4, h[1] / 4]),
        "forward": (forward, [1 / 2 - 2 / 9, 1 / 4 - 2 / 3, 1 / 4 - 1 / 9]),
    }
    for divergence, (value, gradient) in expected.items():
        ours = run(distillation_loss, logits, teacher_top_logprobs=teacher, divergence=divergence)
        assert ours["loss"].item() == pytest.approx(value, rel=1e-12)
        assert ours["d_0"].tolist()[0] == pytest.approx([2 * x for x in gradient], rel=1e-12)
        assert ours["top_k_mass"].item() == pytest.approx(1 / 4)
        assert ours["teacher_top_k_mass"].item() == pytest.approx(2 / 3)
        assert ours["entropy"].item() == pytest.approx(1.5 * math.log(2))
        assert ours["top1_agreement"].item() == 0


@pytest.mark.parametrize(("divergence", "jsd_weight"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_all_tokens_listed_is_the_full_divergence(backend, dtype, divergence, jsd_weight):
    logits, teacher = normal(1, 3, V, std=3, dtype=dtype), normal(2, 3, V, std=3, dtype=dtype)
    keywords = {"divergence": divergence, "jsd_weight": jsd_weight}
    full = run(distillation_loss, logits, teacher, **keywords)
    logprobs, ids = torch.log_softmax(teacher, dim=-1).sort(descending=True)
    ours = run(distillation_loss, logits, teacher_top_logprobs=(ids, logprobs), **keywords)
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {}
    assert (ours.pop("top_k_mass"), ours.pop("teacher_top_k_mass")) == pytest.approx((1, 1))
    torch.testing.assert_close(ours, full, **tolerance)


@pytest.mark.parametrize(("divergence", "jsd_weight"), KINDS)
def test_student_with_all_its_mass_on_the_list(backend, divergence, jsd_weight):
    """The rest, of e^-40 and e^-120, is the one thing that the gradient is about, and exact."""
    logits = normal(1, 2, V)
    teacher = top_logprobs(2, 2, std=1.0)
    logits[torch.arange(2), teacher[0][:, 0]] += torch.tensor([40.0, 120.0])
    keywords = {"divergence": divergence, "jsd_weight": jsd_weight}
    ours = run(distillation_loss, logits, teacher_top_logprobs=teacher, **keywords)
    keywords["teacher_top_logprobs"] = teacher[0], teacher[1].double()
    exact = run(losses.distillation_loss, logits.double(), **keywords)
    assert ours["top_k_mass"] == 1 and exact["divergence"] > 0.1
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), exact[name].double(), rtol=1e-5, atol=1e-7)
    if divergence == "forward":
        others = torch.ones(2, V, dtype=torch.bool).scatter_(1, teacher[0], False)
        missing = 1 - teacher[1].exp().sum(-1)
        pull = -(ours["d_0"] * others).sum(-1)
        torch.testing.assert_close(pull, missing, rtol=1e-5, atol=0)


@pytest.mark.parametrize("total", [1.0, 1.0000005, 1.005])
@pytest.mark.parametrize(("divergence", "jsd_weight"), KINDS)
def test_list_that_sums_to_one_or_more(backend, divergence, jsd_weight, total):
    """The teacher's rest is then one unit of rounding; both are divided by their sum."""
    logits, probs = normal(1, 1, 5), torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    teacher = torch.tensor([[4, 0, 1]]), (probs * total).log()
    keywords = {"divergence": divergence, "jsd_weight": jsd_weight}
    ours = run(
        distillation_loss, logits, teacher_top_logprobs=(teacher[0], teacher[1].float()), **keywords
    )
    eps = torch.finfo(torch.float32).eps
    q = torch.cat((probs[0] * total, torch.tensor([eps]).double())) / (total + eps)
    p = torch.softmax(logits.double(), -1)[0]
    p = torch.stack([p[4], p[0], p[1], p[2] + p[3]])
    m = p * (1 - jsd_weight) + q * jsd_weight
    expected = {
        "reverse": (p * (p / q).log()).sum(),
        "forward": (q * (q / p).log()).sum(),
        "jsd": (1 - jsd_weight) * (p * (p / m).log()).sum()
        + jsd_weight * (q * (q / m).log()).sum(),
    }[divergence]
    torch.testing.assert_close(ours["loss"].double(), expected, rtol=2e-5, atol=1e-6)
    assert ours["d_0"].isfinite().all()
    assert (ours["d_0"][0, 2:4] > 0).all()  # away from what the teacher excludes


def test_student_without_a_rest(backend):
    """Logits of -inf outside of the list: K outcomes, over which the teacher is renormalised."""
    logits = normal(1, 1, 5)
    logits[0, [1, 3]] = -torch.inf
    ids = torch.tensor([[0, 2, 4]])
    logprobs = torch.tensor([[0.5, 0.2, 0.1]]).log()
    teacher = torch.full((1, 5), -torch.inf).scatter_(1, ids, logprobs)
    for divergence in ("reverse", "forward", "jsd"):
        ours = run(
            distillation_loss, logits, teacher_top_logprobs=(ids, logprobs), divergence=divergence
        )
        full = run(distillation_loss, logits, teacher, divergence=divergence)
        for name in ("loss", "d_0", "entropy", "teacher_entropy"):
            torch.testing.assert_close(ours[name], full[name])


def test_weights_scale_the_terms_and_not_the_denominator(backend):
    logits, teacher = normal(1, B, T, V), normal(2, B, T, V)
    weights = normal(4, B, T)
    weights[~MASK] = torch.nan
    pairs = zip(logits[MASK], teacher[MASK], strict=True)
    terms = torch.stack([distillation_loss(x[None], y[None]).loss for x, y in pairs])
    ours = distillation_loss(logits, teacher, mask=MASK, token_weights=weights)
    torch.testing.assert_close(ours.loss, (terms * weights[MASK]).sum() / MASK.sum())
    torch.testing.assert_close(ours.metrics["divergence"], terms.mean())


def test_all_masked_and_no_tokens(backend):
    masked, ids = torch.zeros(B, T, dtype=torch.bool), torch.full((B, T, K), -100)
    ours = run(
        linear_distillation_loss, normal(1, B, T, H), normal(2, V, H), leaves=2, mask=masked,
        teacher_top_logprobs=(ids, torch.full((B, T, K), torch.nan)),
    )  # fmt: skip
    assert ours["loss"] == 0 and not ours["d_0"].any() and not ours["d_1"].any()
    none = torch.zeros(0, K, dtype=torch.int64), torch.zeros(0, K)
    for empty in (
        run(distillation_loss, torch.zeros(0, V), teacher_top_logprobs=none),
        run(
            linear_distillation_loss, torch.zeros(0, H), normal(2, V, H), leaves=2,
            teacher_top_logprobs=none,
        ),
    ):  # fmt: skip
        assert not any(value.any() for value in empty.values())


def test_gradcheck_and_compile(pytorch_backend):
    hidden, weight = normal(1, B, T, H).double(), normal(2, 5, H).double()
    logits = normal(3, B, T, 5).double().requires_grad_()
    teacher = ragged(top_logprobs(4, B, T, V=5, dtype=torch.float64))

    def of_logits(x, divergence="jsd"):
        return distillation_loss(x, teacher_top_logprobs=teacher, divergence=divergence).loss

    for divergence in ("reverse", "forward", "jsd"):
        torch.autograd.gradcheck(
            lambda x, kind=divergence: of_logits(x, kind), logits, fast_mode=True
        )
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def of_hidden(hidden, weight):
        return linear_distillation_loss(
            hidden, weight, teacher_top_logprobs=teacher, divergence="reverse"
        ).loss

    for function, tensors in ((of_logits, [logits]), (of_hidden, leaves)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        ours = torch.autograd.grad(compiled(*tensors), tensors)
        torch.testing.assert_close(ours, torch.autograd.grad(function(*tensors), tensors))


def test_opcheck(pytorch_backend):
    logits, weight = normal(1, 2, 5).requires_grad_(), normal(2, 5, H).requires_grad_()
    keywords = {"teacher_top_logprobs": top_logprobs(4, 2, V=5), "divergence": "jsd"}
    with RecordOperators() as recorded:
        distillation_loss(logits, **keywords).loss.backward()
        linear_distillation_loss(normal(3, 2, H), weight, **keywords)
    ours = (
        "top_k_divergence_forward",
        "top_k_divergence_backward",
        "linear_distillation_loss_forward",
    )
    recorded.calls = {name: recorded.calls[name] for name in ours}
    recorded.opcheck({"top_k_divergence_forward": [0]})


def test_flops_and_memory(pytorch_backend, one_thread):
    """One product less than with the teacher's hidden states; memory does not grow with N."""
    weight = normal(2, 300, 32)

    def call(N, *, train_hidden=True, train_weight=True):
        hidden = normal(1, N, 32).requires_grad_(train_hidden)
        weight.requires_grad_(train_weight)
        teacher = top_logprobs(3, N, V=300, K=2)

        def run():
            loss = linear_distillation_loss(
                hidden, weight, teacher_top_logprobs=teacher, chunk_tokens=64
            ).loss
            if loss.requires_grad:
                loss.backward()

        return run

    product = 2 * 128 * 300 * 32
    assert count_flops(call(128)) == 3 * product
    assert count_flops(call(128, train_weight=False)) == 2 * product
    assert count_flops(call(128, train_hidden=False, train_weight=False)) == product
    small, large = (peak_memory(call(N)) for N in (128, 1024))
    per_token = 4 * (2 * 32 + 4 * 3 + 30)  # d_hidden twice, lists, results
    assert large - small < 896 * per_token < 896 * 300 * 4


def test_logits_are_copied_in_blocks(pytorch_backend, one_thread, monkeypatch):
    """Never a tensor of their size; the results are those of one block."""
    logits, teacher = normal(1, 512, 300), top_logprobs(2, 512, V=300)
    whole = run(distillation_loss, logits, teacher_top_logprobs=teacher)
    monkeypatch.setattr(top_k_divergence, "BLOCK_BYTES", 50 * 300 * 4)
    with torch.no_grad():
        peak = peak_memory(lambda: distillation_loss(logits, teacher_top_logprobs=teacher))
    assert peak < 300 * 300 * 4
    blocks = run(distillation_loss, logits, teacher_top_logprobs=teacher)
    torch.testing.assert_close(blocks, whole, rtol=1e-6, atol=1e-8)


def test_wrong_list_whose_values_are_not_readable_is_nan(pytorch_backend, monkeypatch):
    """Lists on a GPU are not read: no error, no access beyond the vocabulary, other rows right."""
    monkeypatch.setattr(top_k_divergence, "values_are_readable", lambda x: False)
    ids, logprobs = top_logprobs(1, 4)
    ids[0, 1], ids[1, 1], logprobs[2] = ids[0, 0], V, 0.0
    ours = run(distillation_loss, normal(2, 4, V), teacher_top_logprobs=(ids, logprobs))
    alone = run(
        distillation_loss, normal(2, 4, V)[3:], teacher_top_logprobs=(ids[3:], logprobs[3:])
    )
    assert ours["loss"].isnan()
    torch.testing.assert_close(ours["d_0"].isnan().all(-1), torch.tensor([True] * 3 + [False]))
    torch.testing.assert_close(ours["d_0"][3], alone["d_0"][0] / 4)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "teacher_hidden and teacher_weight, or teacher_top_logprobs, must be given, got none"),
        (
            {"top": top_logprobs(1, B, T), "teacher_hidden": torch.zeros(B, T, 2)},
            "teacher_top_logprobs replaces teacher_hidden and teacher_weight, got it together with "
            "teacher_hidden",
        ),
        ({"top": torch.zeros(2)}, r"teacher_top_logprobs must be a pair \(ids, logprobs\), got Te"),
        ({"top": (1, 2, 3)}, r"must be a pair \(ids, logprobs\), got tuple of length 3"),
        (
            {"top": top_logprobs(1, T)},
            r"the ids of teacher_top_logprobs must have shape \(2, 3, 'K'\), .* got shape \(3, 4\)",
        ),
        (
            {"ids": 5},
            r"the ids of teacher_top_logprobs must be different for each token, got \[5, 5, 5, 5\]",
        ),
        ({"ids": V}, r"the ids of teacher_top_logprobs must be in \[0, 37\), or -1 where"),
        ({"ids": -2}, r"the ids of teacher_top_logprobs must be in \[0, 37\), or -1 where"),
        ({"shift": 2.0}, "the logprobs of teacher_top_logprobs must be of probabilities whose sum"),
        (
            {"top": top_logprobs(1, B, T), "token_weights": torch.ones(T)},
            "token_weights must have shape",
        ),
    ],
)
def test_errors(keywords, message):
    keywords = dict(keywords)
    top = keywords.pop("top", None)
    if "ids" in keywords or "shift" in keywords:
        ids, logprobs = top_logprobs(1, B, T)
        if "ids" in keywords:
            ids[1, 2] = keywords.pop("ids")
        top = ids, logprobs + keywords.pop("shift", 0.0)
    with pytest.raises((ValueError, TypeError), match=message):
        linear_distillation_loss(
            normal(1, B, T, H), normal(2, V, H), teacher_top_logprobs=top, **keywords
        )


def test_weight_of_zero_has_no_gradient_beside_a_nan(backend):
    hidden, weight = normal(1, 1, 2, H), normal(2, V, H)
    hidden[0, 0, 0] = torch.nan
    hidden.requires_grad_()
    ids, logq = torch.tensor([[[3, 4], [5, 6]]]), torch.tensor([[[0.6, 0.2], [0.5, 0.3]]]).log()
    loss, _ = linear_distillation_loss(
        hidden, weight, teacher_top_logprobs=(ids, logq), token_weights=torch.tensor([[0.0, 1.0]])
    )
    loss.backward()
    assert (hidden.grad[0, 0] == 0).all() and hidden.grad.isfinite().all()
