"""The linear ops in PyTorch: gradcheck, opcheck, compile, autocast, activation checkpointing."""

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

from grpo_kernels import HeadAdapter, LossConfig, linear_grpo_loss, linear_token_stats
from tests.helpers.linear import make_linear_case, relative_error
from tests.helpers.record_operators import RecordOperators
from tests.helpers.tensors import coin, normal

ADVANTAGES = torch.tensor([1.0, -0.5])
CONFIGS = {
    "token": LossConfig(beta=0.1, entropy_coef=0.05, kl_estimator="reverse"),
    "sequence": LossConfig.gspo(beta=0.1),
}


def make_inputs(dtype=torch.float32, bias=True):
    case = make_linear_case(1, 2, 3, V=11, H=4, dtype=dtype, bias=bias)
    leaves = [case.pop(name) for name in ("hidden", "weight")]
    return [leaf.requires_grad_() for leaf in leaves], case.pop("tokens"), case


@pytest.mark.parametrize("kl", [None, "forward", "reverse"])
def test_gradcheck(backend, kl):
    (hidden, weight), tokens, case = make_inputs(torch.float64)
    bias = case.pop("bias").requires_grad_()
    keywords = {"kl": kl, **case} if kl else {}
    keywords |= {"softcap": 3.0, "temperature": 0.8, "mask": coin(5, 2, 3)}

    def outputs(hidden, weight, bias):
        stats = linear_token_stats(hidden, weight, tokens, bias=bias, **keywords)
        return tuple(stat for stat in stats if stat is not None)

    torch.autograd.gradcheck(outputs, (hidden, weight, bias), fast_mode=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradcheck_of_loss(backend, name):
    (hidden, weight), tokens, case = make_inputs(torch.float64)
    bias = case.pop("bias").requires_grad_()
    old_logprob = normal(3, 2, 3, dtype=torch.float64) - 2

    def loss(hidden, weight, bias):
        return linear_grpo_loss(
            hidden, weight, tokens, ADVANTAGES.double(), bias=bias, old_logprob=old_logprob,
            config=CONFIGS[name], chunk_tokens=4, **case,
        ).loss  # fmt: skip

    torch.autograd.gradcheck(loss, (hidden, weight, bias), fast_mode=True)


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence", "frozen"])
def test_opcheck(backend, kl, level):
    (hidden, weight), tokens, case = make_inputs(bias=kl)
    weight.requires_grad_(level != "frozen")
    if not kl:
        b = normal(5, 11, 2).requires_grad_(level != "frozen")
        case = {"adapter": HeadAdapter(normal(4, 2, 4), b, 2.0)}
    config = LossConfig(
        beta=0.1 if kl else 0.0, kl_estimator="reverse", entropy_coef=0.1,
        ratio_level="token" if level == "token" else "sequence",
    )  # fmt: skip
    with RecordOperators() as recorder:
        linear_grpo_loss(
            hidden, weight, tokens, ADVANTAGES, mask=coin(2, 2, 3), config=config,
            chunk_tokens=2 if level == "frozen" else None, **case,
        ).loss.backward()  # fmt: skip
    expected = {
        "token": {"pack_tokens", "linear_grpo_loss_forward", "scale_"},
        "sequence": {
            "pack_tokens", "linear_token_stats_forward", "linear_token_stats_backward",
        },
        "frozen": {
            "pack_tokens", "linear_token_stats_forward", "linear_token_stats_scaled_backward",
        },
    }  # fmt: skip
    assert recorder.calls.keys() == expected[level]
    trained = ((1,) if kl else (1, 4)) if level != "frozen" else ()  # weight, b of the adapter
    recorder.opcheck({"linear_token_stats_forward": (0, *trained)})


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_compiles_fullgraph_for_any_length(backend, name):
    def loss(hidden, weight, tokens, advantages, mask, case, temperature):
        return linear_grpo_loss(
            hidden, weight, tokens, advantages, mask=mask, config=CONFIGS[name],
            temperature=temperature, **case,
        )  # fmt: skip

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for T, temperature in ((3, 1.0), (4, 0.9), (5, 0.8), (6, 0.7)):
        case = make_linear_case(T, 2, T, V=11, H=4)
        hidden, weight = (case.pop(leaf).requires_grad_() for leaf in ("hidden", "weight"))
        tokens, mask = case.pop("tokens"), coin(T, 2, T)
        arguments = (hidden, weight, tokens, ADVANTAGES, mask, case, temperature)
        value, metrics = compiled(*arguments)
        expected, expected_metrics = loss(*arguments)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(metrics, expected_metrics)
        ours = torch.autograd.grad(value, (hidden, weight))
        torch.testing.assert_close(ours, torch.autograd.grad(expected, (hidden, weight)))
    assert counter.frame_count <= 2  # the first shapes, then dynamic shapes


def test_token_stats_compile_fullgraph(backend):
    (hidden, weight), tokens, case = make_inputs()

    def total(hidden, weight):
        stats = linear_token_stats(hidden, weight, tokens, kl="forward", **case)
        return stats.logprob.sum() + stats.entropy.sum() - stats.kl.sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    torch.testing.assert_close(ours, torch.autograd.grad(total(hidden, weight), (hidden, weight)))


def test_compile_with_changing_chunk_size(backend):
    (hidden, weight), tokens, _ = make_inputs(bias=False)

    def logprob(chunk_tokens):
        return linear_token_stats(hidden, weight, tokens, chunk_tokens=chunk_tokens).logprob

    compiled = torch.compile(logprob, fullgraph=True, backend="aot_eager")
    for chunk_tokens in (2, 3, 4):  # from the second on, the size is a symbol
        torch.testing.assert_close(compiled(chunk_tokens), logprob(chunk_tokens))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_autocast_gives_fp32_gradients(backend, level):
    (hidden, weight), tokens, _ = make_inputs(bias=False)
    config = LossConfig(ratio_level=level)
    half = [leaf.detach().bfloat16().float().requires_grad_() for leaf in (hidden, weight)]
    exact = linear_grpo_loss(*half, tokens, ADVANTAGES, config=config)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_grpo_loss(hidden, weight, tokens, ADVANTAGES, config=config)
        mixed = linear_token_stats(hidden.bfloat16(), weight, tokens)
    # Equal to bf16 operands with an unrounded result.
    torch.testing.assert_close(ours.metrics["entropy"], exact.metrics["entropy"])
    assert mixed.logprob.dtype == torch.float32
    gradients = torch.autograd.grad(ours.loss, (hidden, weight))
    for gradient, like in zip(gradients, torch.autograd.grad(exact.loss, half), strict=True):
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, like.double()) < 8e-3


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_activation_checkpointing(backend, level, use_reentrant, is_frozen):
    (hidden, weight), tokens, _ = make_inputs()
    leaves = [hidden] if is_frozen else [hidden, weight]
    weight.requires_grad_(not is_frozen)

    def loss(hidden, weight):
        config = LossConfig(ratio_level=level)
        return linear_grpo_loss(
            hidden, weight, tokens, ADVANTAGES, config=config, chunk_tokens=2 if is_frozen else None
        ).loss

    expected = torch.autograd.grad(loss(hidden, weight), leaves)
    checkpoint(loss, hidden, weight, use_reentrant=use_reentrant).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_inference_mode(backend):
    (hidden, weight), tokens, _ = make_inputs()
    with torch.inference_mode():
        loss, _ = linear_grpo_loss(hidden, weight, tokens, ADVANTAGES)
    torch.testing.assert_close(loss, linear_grpo_loss(hidden, weight, tokens, ADVANTAGES).loss)


def test_token_level_backward_only_scales(backend):
    (hidden, weight), tokens, _ = make_inputs()
    with RecordOperators() as recorder:
        loss = linear_grpo_loss(hidden, weight, tokens, ADVANTAGES).loss
        recorder.calls.clear()
        loss.backward(torch.tensor(0.25))
    assert recorder.calls.keys() == {"scale_"}
