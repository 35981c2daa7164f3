"""distillation_loss and linear_distillation_loss against autograd of the reference in fp64."""

import pytest
import torch

from grpo_kernels import HeadAdapter, distillation_loss, linear_distillation_loss
from grpo_kernels.ops.distillation_loss import JSD_WEIGHTS
from reference import losses
from tests.helpers.count_flops import count_flops
from tests.helpers.distillation import check_against_fp64, run
from tests.helpers.tensors import coin, normal

KINDS = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
CASES = [
    *((*kind, torch.float32) for kind in KINDS),
    ("reverse", 0.5, torch.bfloat16),
    ("jsd", 0.1, torch.bfloat16),
    ("forward", 0.5, torch.float64),
    ("jsd", 0.1, torch.float64),
]
FP16 = [("reverse", 0.5, torch.float16), ("jsd", 0.1, torch.float16)]
B, T, V, H, TEACHER_H = 2, 3, 37, 6, 5


@pytest.mark.parametrize(("divergence", "jsd_weight", "dtype"), CASES)
def test_logits(backend, divergence, jsd_weight, dtype):
    logits, teacher = normal(1, B, T, V, std=3).to(dtype), normal(2, B, T, V, std=3).to(dtype)
    mask = coin(5, B, T)
    logits[~mask] = torch.nan
    temperature = normal(4, B, T).abs() + 0.5
    check_against_fp64(
        distillation_loss, losses.distillation_loss, logits, teacher, divergence=divergence,
        jsd_weight=jsd_weight, mask=mask, temperature=temperature.to(logits.dtype), softcap=5.0,
    )  # fmt: skip


def test_jsd_of_disjoint_supports_is_finite(backend):
    logits, teacher = normal(1, 2, 8), normal(2, 2, 8)
    logits[:, :4], teacher[:, 4:] = -torch.inf, -torch.inf
    logits[1, 3] = 0.0
    ours = run(distillation_loss, logits, teacher, divergence="jsd", normalizer=1)
    exact = run(
        losses.distillation_loss, logits.double(), teacher.double(), divergence="jsd", normalizer=1
    )
    for name in ("loss", "entropy", "teacher_entropy"):
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-6, atol=1e-6)
    assert ours["d_0"].isfinite().all() and not ours["d_0"][:, :3].any()
    single = distillation_loss(logits[:1], teacher[:1], divergence="jsd").loss
    torch.testing.assert_close(single.double(), torch.tensor(2.0).double().log(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("jsd_weight", JSD_WEIGHTS)
def test_jsd_at_the_bounds_of_its_weight(backend, jsd_weight):
    """The mixture is (1 - w) p where the teacher excludes a token; fp32 must not round it to 0."""
    logits, teacher = normal(1, 2, 8), normal(2, 2, 8)
    logits[:, 0], teacher[:, 1] = -torch.inf, -torch.inf
    keywords = {"divergence": "jsd", "jsd_weight": jsd_weight}
    ours = run(distillation_loss, logits, teacher, **keywords)
    exact = run(losses.distillation_loss, logits.double(), teacher.double(), **keywords)
    assert exact["loss"] > 1e-6
    torch.testing.assert_close(ours["loss"].double(), exact["loss"], rtol=0, atol=5e-8)
    assert ours["d_0"].isfinite().all() and ours["d_0"].any()


def test_jsd_of_nearly_equal_distributions(backend):
    logits = normal(1, 2, V, std=3)
    teacher = logits + normal(2, 2, V, std=1e-3)
    check_against_fp64(
        distillation_loss, losses.distillation_loss, logits, teacher, divergence="jsd"
    )


def heads(dtype=torch.float32):
    return [
        normal(1, B, T, H).to(dtype),
        normal(2, V, H).to(dtype),
        normal(3, B, T, TEACHER_H).to(dtype),
        normal(4, V, TEACHER_H).to(dtype),
    ]


@pytest.mark.parametrize(("divergence", "jsd_weight", "dtype"), [*CASES, *FP16])
def test_hidden_states(backend, divergence, jsd_weight, dtype):
    adapter = HeadAdapter(normal(5, 2, H).to(dtype), normal(6, V, 2).to(dtype), 0.5)
    check_against_fp64(
        linear_distillation_loss, losses.linear_distillation_loss, *heads(dtype), leaves=2,
        divergence=divergence, jsd_weight=jsd_weight, mask=coin(7, B, T), temperature=0.7,
        bias=normal(8, V).to(dtype), teacher_bias=normal(9, V).to(dtype), adapter=adapter,
        chunk_tokens=2,
    )  # fmt: skip


@pytest.mark.parametrize("divergence", ["reverse", "jsd"])
def test_gradients_of_bias_and_adapter_and_softcap(pytorch_backend, divergence):
    def results(function):
        tensors = [x.double().requires_grad_(i < 2) for i, x in enumerate(heads())]
        bias, a, b = (
            normal(i, *shape).double().requires_grad_()
            for i, shape in ((5, (V,)), (6, (2, H)), (7, (V, 2)))
        )
        loss = function(
            *tensors, bias=bias, adapter=HeadAdapter(a, b, 2.0), softcap=2.0, divergence=divergence
        ).loss
        return [loss, *torch.autograd.grad(loss, [*tensors[:2], bias, a, b])]

    ours, exact = (
        results(module) for module in (linear_distillation_loss, losses.linear_distillation_loss)
    )
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
def test_flops(pytorch_backend, divergence):
    hidden, weight, teacher_hidden, teacher_weight = (
        normal(1, 1, 64, 32), normal(2, 300, 32), normal(3, 1, 64, 32), normal(4, 300, 32),
    )  # fmt: skip
    product = 2 * 64 * 300 * 32

    def flops(*trained):
        for x in (hidden, weight):
            x.requires_grad_(any(x is leaf for leaf in trained))

        def call():
            loss = linear_distillation_loss(
                hidden, weight, teacher_hidden, teacher_weight, divergence=divergence
            ).loss
            if trained:
                loss.backward()

        return count_flops(call)

    assert flops(hidden, weight) == 4 * product
    assert flops(hidden) == 3 * product
    assert flops() == 2 * product


def test_all_masked_and_no_tokens(backend):
    masked = torch.zeros(B, T, dtype=torch.bool)
    for divergence in ("forward", "jsd"):
        ours = run(linear_distillation_loss, *heads(), leaves=2, divergence=divergence, mask=masked)
        assert ours["loss"] == 0 and not ours["d_0"].any() and not ours["d_1"].any()
        for shape in ((0,), (2, 0), (0, 3)):
            logits, hidden = torch.zeros(*shape, V), torch.zeros(*shape, H)
            weight = normal(1, V, H)
            for empty in (
                run(distillation_loss, logits, logits, divergence=divergence),
                run(
                    linear_distillation_loss, hidden, weight, hidden, weight, leaves=2,
                    divergence=divergence,
                ),
            ):  # fmt: skip
                assert not any(value.any() for value in empty.values())


def test_gradcheck_and_compile(pytorch_backend):
    hidden, weight, *teacher = (x.double() for x in heads())
    logits = normal(1, B, T, 5).double().requires_grad_()
    teacher_logits = normal(2, B, T, 5).double()

    def of_logits(x):
        return distillation_loss(x, teacher_logits, divergence="jsd", jsd_weight=0.3).loss

    torch.autograd.gradcheck(of_logits, logits)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def of_hidden(hidden, weight):
        return linear_distillation_loss(hidden, weight, *teacher, divergence="jsd").loss

    for function, tensors in ((of_logits, [logits]), (of_hidden, leaves)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        ours = torch.autograd.grad(compiled(*tensors), tensors)
        torch.testing.assert_close(ours, torch.autograd.grad(function(*tensors), tensors))


@pytest.mark.parametrize("setting", ["jsd_weight", "softcap"])
def test_compile_with_another_value_of_a_setting(pytorch_backend, setting):
    """The second value makes the number a symbol, whose bounds are checked."""
    logits, teacher = normal(1, 2, 5), normal(2, 2, 5)

    def loss(value):
        return distillation_loss(logits, teacher, divergence="jsd", **{setting: value}).loss

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for value in (0.3, 0.4, 0.7):
        assert compiled(value) == loss(value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"divergence": "js"}, "divergence must be one of 'reverse', 'forward', 'jsd', got 'js'"),
        ({"jsd_weight": 1.0}, "jsd_weight must be at most 0.999999, got 1.0"),
        ({"jsd_weight": 1e-9}, "jsd_weight must be at least 1e-06, got 1e-09"),
        ({"normalizer": 0}, "normalizer must be greater than 0, got 0"),
        (
            {"mask": torch.ones(T + 1), "token_weights": torch.ones(B, T)},
            f"mask must have shape {(B, T)}, got shape {(T + 1,)}",
        ),
    ],
)
def test_errors(keywords, message):
    with pytest.raises(ValueError) as error:
        linear_distillation_loss(*heads(), **keywords)
    assert str(error.value) == message


def test_teacher_of_another_vocabulary_is_refused():
    hidden, weight, teacher_hidden, teacher_weight = heads()
    with pytest.raises(ValueError, match=r"^teacher_weight must have the vocabulary of weight, 37"):
        linear_distillation_loss(hidden, weight, teacher_hidden, teacher_weight[1:])
    with pytest.raises(
        ValueError, match=r"^weight must be \[V, 6\], where 6 is the size of hidden"
    ):
        linear_distillation_loss(hidden, weight.t(), teacher_hidden, teacher_weight)
    with pytest.raises(ValueError, match=r"^teacher_logits must have shape"):
        distillation_loss(torch.zeros(2, 5), torch.zeros(2, 4))
