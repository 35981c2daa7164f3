"""A training step under torch.compile: model, loss and backward in one graph for any batch."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_kernels import LossConfig, linear_grpo_loss
from grpo_kernels.integrations.transformers import forward_to_hidden
from tests.helpers.tensors import normal, token_ids

V = 53
CONFIGS = {
    "grpo": LossConfig(beta=0.04, entropy_coef=0.01),
    "gspo": LossConfig.gspo(beta=0.04, entropy_coef=0.01),
}
SHAPES = [(3, 9), (4, 12), (2, 17), (5, 6), (6, 21)]
STEPS = [
    ("padded", "grpo", "eager"),
    pytest.param("padded", "gspo", "aot_eager", marks=pytest.mark.slow),
    pytest.param("packed", "grpo", "aot_eager", marks=pytest.mark.slow),
    pytest.param("packed", "gspo", "aot_eager", marks=pytest.mark.slow),
    pytest.param("padded", "grpo", "inductor", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def reset_dynamo(pytorch_backend):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": V}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_implementation": "sdpa"}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).double()


def padded_batch(seed, B, L):
    """Inputs of the model body and of the loss for B completions of 2 to L tokens."""
    lengths = torch.tensor([2 + (seed + 5 * i) % (L - 1) for i in range(B)])
    attention = torch.arange(L) < lengths[:, None]
    ids = token_ids(seed, B, L, V=V)
    mask = attention[:, 1:]
    body = {"input_ids": ids, "attention_mask": attention.long()}
    return body, loss_inputs(seed, ids[:, 1:], mask, B)


def packed_batch(seed, B, L):
    """The same completions packed in one row; each sequence's last token predicts nothing."""
    lengths = torch.tensor([2 + (seed + 5 * i) % (L - 1) for i in range(B)])
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    N = int(cu_seqlens[-1])
    sequence = torch.repeat_interleave(torch.arange(B), lengths)
    position = torch.arange(N) - cu_seqlens[sequence]
    within = (sequence[:, None] == sequence) & torch.ones(N, N).tril().bool()
    ids = token_ids(seed, N, V=V)
    body = {
        "input_ids": ids[None],
        "position_ids": position[None],
        "attention_mask": within[None, None],
    }
    mask = position != lengths[sequence] - 1
    return body, loss_inputs(seed, ids.roll(-1), mask, B) | {"cu_seqlens": cu_seqlens}


def loss_inputs(seed, tokens, mask, B):
    shape = {"dtype": torch.float64, "std": 0.3}
    return {
        "tokens": tokens,
        "mask": mask,
        "advantages": normal(seed, B, dtype=torch.float64),
        "old_logprob": normal(seed + 1, *tokens.shape, **shape) - 4,
        "ref_logprob": normal(seed + 2, *tokens.shape, **shape) - 4,
        "normalizer": torch.tensor(float(B)),
        "entropy_normalizer": mask.sum(),
    }


def compute_loss(model, config, body, inputs):
    hidden = model.model(**body, use_cache=False).last_hidden_state
    hidden = hidden[0] if "cu_seqlens" in inputs else hidden[:, :-1]
    return linear_grpo_loss(hidden, model.lm_head.weight, config=config, **inputs)


def mark_lengths(tensors):
    """Mark every dimension as dynamic, except the leading 1 of packed input."""
    for tensor in tensors.values():
        for dim in (dim for dim, size in enumerate(tensor.shape) if size > 1):
            torch._dynamo.mark_dynamic(tensor, dim)


@pytest.mark.parametrize(("layout", "name", "backend"), STEPS)
def test_compiled_training_step_matches_eager_without_recompiling(layout, name, backend):
    ours = make_model()
    eager = copy.deepcopy(ours)
    compiled = torch.compile(compute_loss, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, eager)]
    make = {"padded": padded_batch, "packed": packed_batch}[layout]
    for seed, (B, L) in enumerate(SHAPES):
        body, inputs = make(seed, B, L)
        mark_lengths(body | inputs)
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            loss, metrics = compiled(ours, CONFIGS[name], body, inputs)
            loss.backward()
        expected, expected_metrics = compute_loss(eager, CONFIGS[name], body, inputs)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(metrics, expected_metrics)
        gradients = [[p.grad for p in model.parameters()] for model in (ours, eager)]
        torch.testing.assert_close(*gradients)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_compiled_model_skips_lm_head_without_recompiling():
    """The hooks are registered again in every call; dynamo must treat them as the same."""
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    for seed, (B, L) in enumerate(SHAPES):
        body, _ = padded_batch(seed, B, L)
        mark_lengths(body)
        stance = "fail_on_recompile" if seed > 1 else "default"  # the first call measures the head
        with torch.compiler.set_stance(stance):
            hidden, _, output = forward_to_hidden(compiled, **body, use_cache=False)
        expected = model.model(**body, use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden, expected)
        assert hidden.requires_grad
    assert output.logits.shape[1] == 0
