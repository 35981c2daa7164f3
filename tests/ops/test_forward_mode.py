"""Forward-mode derivatives are refused: the operators would return tangents of 0 without a word."""

import pytest
import torch
from torch.autograd import forward_ad

from grpo_kernels import (
    HeadAdapter,
    LossConfig,
    approximate_kl_divergence,
    distillation_loss,
    grpo_loss,
    linear_distillation_loss,
    linear_grpo_loss,
    linear_token_stats,
    token_stats,
)
from tests.helpers.tensors import normal

V, H = 7, 5
TOKENS, ADVANTAGES = torch.tensor([[1, 6, 2]]), torch.ones(1)
LOGITS, OTHER = normal(1, 1, 3, V), normal(2, 1, 3, V)
HIDDEN, WEIGHT, BIAS = normal(3, 1, 3, H), normal(4, V, H), normal(5, V)
ADAPTER = normal(6, 2, H), normal(7, V, 2)

CALLS = {
    "token_stats": (lambda x: token_stats(x, TOKENS), LOGITS, "logits"),
    "grpo_loss": (lambda x: grpo_loss(x, TOKENS, ADVANTAGES), LOGITS, "logits"),
    "sequences": (
        lambda x: grpo_loss(x, TOKENS, ADVANTAGES, config=LossConfig.gspo()), LOGITS, "logits",
    ),
    "distillation_loss": (lambda x: distillation_loss(x, OTHER), LOGITS, "logits"),
    "approximate_kl_divergence": (
        lambda x: approximate_kl_divergence(OTHER, x, reduction="mean"), LOGITS, "new_logits",
    ),
    "hidden": (lambda x: linear_token_stats(x, WEIGHT, TOKENS), HIDDEN, "hidden"),
    "weight": (lambda x: linear_token_stats(HIDDEN, x, TOKENS), WEIGHT, "weight"),
    "bias": (lambda x: linear_token_stats(HIDDEN, WEIGHT, TOKENS, bias=x), BIAS, "bias"),
    "adapter": (
        lambda x: linear_token_stats(
            HIDDEN, WEIGHT, TOKENS, adapter=HeadAdapter(x, ADAPTER[1], 1.0)
        ),
        ADAPTER[0], "adapter.a",
    ),
    "linear_grpo_loss": (
        lambda x: linear_grpo_loss(x, WEIGHT, TOKENS, ADVANTAGES), HIDDEN, "hidden",
    ),
    "linear_distillation_loss": (
        lambda x: linear_distillation_loss(x, WEIGHT, HIDDEN, WEIGHT), HIDDEN, "hidden",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_dual_tensor_is_refused_by_name(call):
    function, x, name = CALLS[call]
    with forward_ad.dual_level():
        function(x)  # a dual level alone is no reason
        with pytest.raises(NotImplementedError, match=rf"^{name} must carry no forward-mode"):
            function(forward_ad.make_dual(x, torch.ones_like(x)))


def test_jvp_of_torch_func_is_refused():
    with pytest.raises(NotImplementedError, match=r"^logits must carry no forward-mode derivative"):
        torch.func.jvp(lambda x: token_stats(x, TOKENS).logprob, (LOGITS,), (OTHER,))
