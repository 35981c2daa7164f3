"""plan_backward: what forward leaves for backward, chosen from sizes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from grpo_kernels.lm_head import backward_plan
from grpo_kernels.lm_head.backward_plan import Trained, plan_backward
from grpo_kernels.lm_head.inputs import prepare_inputs

GIB = 1 << 30
V, H = 128_256, 2048
HEAD, LORA, NOTHING = Trained(True, True, False), Trained(True, False, False), Trained(*3 * [False])


def plan(N, trained, chunk_tokens=None, dtype=torch.float32, kl=None):
    """The plan for the head of Llama 3.2 1B."""
    with FakeTensorMode():
        hidden, weight = torch.empty(N, H, dtype=dtype), torch.empty(V, H, dtype=dtype)
        tokens = torch.empty(N, dtype=torch.int64)
        reference = {"kl": kl, "ref_hidden": hidden, "ref_weight": weight} if kl else {}
        inputs = prepare_inputs(hidden, weight, tokens, **reference)
        return plan_backward(inputs, chunk_tokens, trained)


@pytest.fixture(autouse=True)
def large_memory(monkeypatch):
    monkeypatch.setattr(backward_plan, "memory_of", lambda device: 80 * GIB)


@pytest.mark.parametrize(
    ("dtype", "kl", "largest"),
    [
        (torch.float32, None, 1024),
        (torch.bfloat16, None, 1024),
        (torch.float32, "forward", 640),
        (torch.bfloat16, "reverse", 768),
    ],
)
def test_logits_are_kept_if_they_fit_the_workspace(dtype, kl, largest):
    for trained in (HEAD, LORA):
        assert plan(largest, trained, dtype=dtype, kl=kl).logits == (largest, V)
        assert plan(2 * largest, trained, dtype=dtype, kl=kl).logits is None
    kept = plan(largest, HEAD, dtype=dtype, kl=kl).logits
    tensors = 4 * (1 if kl is None else 2) + dtype.itemsize  # logits, and their gradient
    assert kept[0] * kept[1] * tensors <= GIB


def test_several_chunks():
    assert plan(8192, HEAD) == (None, ())
    assert plan(8192, LORA) == (None, ("logprob",))
    assert plan(8192, LORA, kl="forward").statistics == ("logprob", "kl")
    assert plan(8192, LORA._replace(entropy=True)).statistics == ("logprob", "entropy")


def test_nothing_without_a_gradient():
    assert plan(8, NOTHING) == plan(8192, NOTHING) == (None, ())


def test_fixed_chunk_size():
    """A frozen head takes one path for any number of tokens, so that bits do not depend on it."""
    assert plan(8, LORA, chunk_tokens=256) == plan(800, LORA, chunk_tokens=256)
    assert plan(8, HEAD, chunk_tokens=256).logits == (256, V)
    assert plan(800, HEAD, chunk_tokens=256).logits is None
