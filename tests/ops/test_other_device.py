"""An argument on another device is named in the error, by every public function."""

import inspect

import pytest
import torch

import grpo_kernels
from grpo_kernels import HeadAdapter, LossConfig, TokenSupport, pack_tokens

B, T, V, H, K = 2, 3, 5, 4, 2
PER_TOKEN = torch.zeros(B, T)
TOKENS = torch.zeros(B, T, dtype=torch.int64)
LOGITS, HIDDEN, WEIGHT, BIAS = (torch.ones(size) for size in ((B, T, V), (B, T, H), (V, H), (V,)))
LOSS = {
    "mask": PER_TOKEN == 0,
    "old_logprob": PER_TOKEN,
    "ref_logprob": PER_TOKEN,
    "sampling_logprob": PER_TOKEN,
    "nll_weight": PER_TOKEN,
    "normalizer": torch.tensor(2.0),
    "entropy_normalizer": torch.tensor(2.0),
    "nll_normalizer": torch.tensor(2.0),
    "config": LossConfig(nll_coef=0.1),
}
TEMPERATURE = torch.ones(B, T)
HEAD = {"hidden": HIDDEN, "weight": WEIGHT, "bias": BIAS, "temperature": TEMPERATURE}
REFERENCE = {"ref_hidden": HIDDEN, "ref_weight": WEIGHT, "ref_bias": BIAS}
TEACHER = {"teacher_hidden": HIDDEN, "teacher_weight": WEIGHT, "teacher_bias": BIAS}
TOP_K = torch.tensor([[[0, 1]] * T] * B), torch.full((B, T, K), -1.0)
WEIGHTED = {"mask": PER_TOKEN == 0, "token_weights": PER_TOKEN, "normalizer": torch.tensor(2.0)}
SUPPORT = TokenSupport.from_lists([[0, 1]] * (B * T))
REST = {
    "adapter": HeadAdapter(torch.ones(1, H), torch.ones(V, 1), 1.0),
    "support": SUPPORT,
    "packing": pack_tokens(PER_TOKEN == 0),
}
ADVANTAGES = torch.ones(B)
CALLS = {
    "token_stats": {"logits": LOGITS, "tokens": TOKENS, "temperature": TEMPERATURE,
                    "ref_logits": LOGITS, "kl": "reverse", "mask": PER_TOKEN == 0},
    "linear_token_stats": {**HEAD, "tokens": TOKENS, **REFERENCE, "kl": "reverse",
                           "mask": PER_TOKEN == 0, "adapter": REST["adapter"]},
    "policy_loss": {"logprob": PER_TOKEN, "advantages": ADVANTAGES, **LOSS, "entropy": PER_TOKEN},
    "grpo_loss": {"logits": LOGITS, "tokens": TOKENS, "advantages": ADVANTAGES,
                  "temperature": TEMPERATURE, **LOSS},
    "linear_grpo_loss": {**HEAD, "tokens": TOKENS, "advantages": ADVANTAGES, **LOSS,
                         "adapter": REST["adapter"]},
    "distillation_loss": {"logits": LOGITS, "teacher_logits": LOGITS, **WEIGHTED},
    "linear_distillation_loss": {**HEAD, **TEACHER, **WEIGHTED},
    "kl_divergence": {"ref_logits": LOGITS, "new_logits": LOGITS, "mask": PER_TOKEN == 0},
    "approximate_kl_divergence": {"ref_logits": LOGITS, "new_logits": LOGITS,
                                  "mask": PER_TOKEN == 0},
    "cross_entropy_from_logits": {"ref_logits": LOGITS, "new_logits": LOGITS,
                                  "mask": PER_TOKEN == 0},
    "entropy_from_logits": {"logits": LOGITS, "mask": PER_TOKEN == 0},
}  # fmt: skip
# The other tensors are compared with this one.
FIRST = ("logits", "hidden", "logprob", "new_logits")


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (function, argument)
        for function, arguments in CALLS.items()
        for argument, value in arguments.items()
        if isinstance(value, torch.Tensor) and argument not in FIRST
    ],
)
def test_argument_on_another_device_is_named(function, argument):
    arguments = CALLS[function]
    call = getattr(grpo_kernels, function)
    assert arguments.keys() <= inspect.signature(call).parameters.keys()
    call(**arguments)
    with pytest.raises(ValueError, match=rf"^{argument} must be on cpu, got meta"):
        call(**arguments | {argument: arguments[argument].to("meta")})


@pytest.mark.parametrize("part", ["a", "b"])
def test_adapter_on_another_device_is_named(part):
    adapter = REST["adapter"]._replace(**{part: getattr(REST["adapter"], part).to("meta")})
    with pytest.raises(ValueError, match=rf"^adapter\.{part} must be on cpu, got meta"):
        grpo_kernels.linear_token_stats(HIDDEN, WEIGHT, TOKENS, adapter=adapter)


def test_other_bundles_on_another_device_are_named():
    stats = grpo_kernels.linear_token_stats
    packing = REST["packing"]._replace(order=REST["packing"].order.to("meta"))
    with pytest.raises(ValueError, match=r"^packing must be on cpu, got meta"):
        stats(HIDDEN, WEIGHT, TOKENS, mask=PER_TOKEN == 0, packing=packing)
    support = SUPPORT._replace(token_ids=SUPPORT.token_ids.to("meta"))
    with pytest.raises(ValueError, match=r"^support\.token_ids must be on cpu, got meta"):
        stats(HIDDEN, WEIGHT, TOKENS, support=support)
    for part in (0, 1):
        top_k = [x.to("meta") if i == part else x for i, x in enumerate(TOP_K)]
        with pytest.raises(ValueError, match=r"teacher_top_logprobs must be on cpu, got meta"):
            grpo_kernels.distillation_loss(LOGITS, teacher_top_logprobs=tuple(top_k))
    packed = {"cu_seqlens": torch.tensor([0, 3, 6]).to("meta")}
    with pytest.raises(ValueError, match=r"^cu_seqlens must be on cpu, got meta"):
        grpo_kernels.policy_loss(PER_TOKEN.flatten(), ADVANTAGES, **packed)
