"""A patched Hugging Face model: log-probs and entropies as its own logits have them."""

import copy
import inspect

import peft
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo_kernels.backends import use
from grpo_kernels.integrations.score_labels import ScoredOutput, score_labels
from tests.integrations.test_transformers import MODELS, SMALL, V, make_batch

FAMILIES = MODELS | {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "gemma3, softcap": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, head_dim=8, final_logit_softcapping=1.5)
    ),
    "cohere2, multiplied": lambda: Cohere2ForCausalLM(
        Cohere2Config(**SMALL, logit_scale=0.6, layer_types=["full_attention"] * 2)
    ),
    "gpt-j, bias": lambda: GPTJForCausalLM(
        GPTJConfig(vocab_size=V, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    ),
    "falcon-h1, multiplied": lambda: FalconH1ForCausalLM(
        FalconH1Config(
            **SMALL, head_dim=8, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4,
            mamba_n_groups=1, mamba_chunk_size=4, lm_head_multiplier=0.4,
        )
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def eager_rooms(monkeypatch):
    """What is tested here lies above the kernels, which the interpreter makes slow."""
    use("pytorch")


def make(name, seed=0):
    torch.manual_seed(seed)
    model = FAMILIES[name]().double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_labels(ids, attention):
    """Those of the text but for its padding, and for some of the prompt."""
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :2] = -100
    return labels


def by_logits(logits, targets, temperature):
    """(log-probs, entropies) from logits, 0 where the target is -100."""
    logits = logits / temperature
    distribution = torch.distributions.Categorical(logits=logits)
    scored = targets != -100
    logprob = distribution.log_prob(targets.where(scored, 0))
    return [torch.where(scored, each, 0.0) for each in (logprob, distribution.entropy())]


def gradients_of(model, logprobs, entropy):
    """Those of both, weighted by position, so that an exchange of tokens shows."""
    model.zero_grad()
    weight = torch.linspace(0.5, 1.5, logprobs.numel(), dtype=logprobs.dtype).view_as(logprobs)
    (weight * (logprobs + 0.3 * entropy)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


SLOW = {"falcon-h1, multiplied": pytest.mark.slow}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW.get(name, ())) for name in FAMILIES]
)
def test_scores_and_all_gradients_are_those_of_the_model_s_logits(name):
    model, (ids, attention) = make(name), make_batch()
    labels, temperature = make_labels(ids, attention), 0.7
    logits = model(ids, attention_mask=attention).logits
    expected = by_logits(logits[:, :-1], labels[:, 1:], temperature)
    exact = gradients_of(model, *expected)
    with score_labels(model):
        for _ in range(2):  # the scale measured, then remembered
            output = model(ids, attention_mask=attention, labels=labels, temperature=temperature)
            found = gradients_of(model, output.logprobs, output.entropy)
            assert output.logits is None
            torch.testing.assert_close([output.logprobs, output.entropy], expected)
            torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-9)


def test_shifted_labels_are_scored_where_they_stand():
    model, (ids, attention) = make("llama"), make_batch()
    targets = make_labels(ids, attention).roll(-1, 1)
    temperature = torch.linspace(0.5, 2, targets.numel(), dtype=torch.float64).view_as(targets)
    logits = model(ids, attention_mask=attention).logits
    expected = by_logits(logits, targets, temperature[..., None])
    with score_labels(model):
        output = model(ids, attention, shift_labels=targets, temperature=temperature)
    torch.testing.assert_close([output.logprobs, output.entropy], expected)


@pytest.mark.parametrize("kept", [0, 1, 3, torch.tensor([4, 1])])
def test_logits_to_keep_scores_the_positions_kept(kept):
    model, (ids, attention) = make("llama"), make_batch()
    labels = make_labels(ids, attention)
    with score_labels(model):
        whole = model(ids, attention, labels=labels).logprobs
        shifted = model(ids, attention, shift_labels=labels).logprobs
        found = model(ids, attention, shift_labels=labels, logits_to_keep=kept).logprobs
        if isinstance(kept, torch.Tensor):
            torch.testing.assert_close(found, shifted[:, kept])
            with pytest.raises(ValueError, match="logits_to_keep as indices needs shift_labels"):
                model(ids, attention, labels=labels, logits_to_keep=kept)
        else:
            torch.testing.assert_close(found, shifted[:, -kept:])
            few = model(ids, attention, labels=labels, logits_to_keep=kept).logprobs
            torch.testing.assert_close(few, whole if kept == 0 else whole[:, 5 - (kept - 1) :])


def test_without_labels_the_model_generates_as_ever():
    model, (ids, _) = make("llama"), make_batch()
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids[:1], **settings)
    with score_labels(model):
        assert model(ids).logits.shape == (*ids.shape, V)
        assert model.generate(ids[:1], **settings).tolist() == expected.tolist()


def test_both_kinds_of_labels_are_refused():
    model, (ids, _) = make("llama"), make_batch()
    with score_labels(model), pytest.raises(ValueError, match="labels or shift_labels"):
        model(ids, labels=ids, shift_labels=ids)


def test_a_head_that_is_no_linear_layer_is_refused_at_once_and_left_alone():
    model = make("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match="the head of LlamaForCausalLM must be a linear layer"):
        score_labels(model)
    assert "forward" not in vars(model)


def state_of(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return sorted(vars(model)), model.forward, inspect.signature(model.forward), hooks


def test_undone_it_leaves_no_trace():
    model, (ids, _) = make("llama"), make_batch()
    before = state_of(model)
    outer = score_labels(model)
    with pytest.raises(RuntimeError, match="stop"), score_labels(model):  # nested
        assert inspect.signature(model.forward) == before[2]
        model(ids, labels=ids)
        raise RuntimeError("stop")
    assert model(ids, labels=ids).logits is None, "the other handle holds on"
    with pytest.raises(ValueError, match="temperature"):
        model(ids, labels=ids, temperature=0.0)
    outer.remove()
    outer.remove()  # nothing more to undo
    assert state_of(model) == before
    assert model(ids, labels=ids).logits.shape == (*ids.shape, V)


def test_a_forward_put_on_the_model_before_or_after_is_kept():
    """accelerate puts one there, around the one that it finds."""
    model, (ids, _) = make("llama"), make_batch()
    calls = []

    def counted(forward):
        def wrapper(*arguments, **keywords):
            calls.append(1)
            return forward(*arguments, **keywords)

        return wrapper

    model.forward = first = counted(model.forward)
    with score_labels(model):
        expected = model(ids, labels=ids).logprobs
    assert model.forward is first and len(calls) == 1
    handle = score_labels(model)
    model.forward = second = counted(model.forward)
    torch.testing.assert_close(model(ids, labels=ids).logprobs, expected)
    handle.remove()
    assert model.forward is second
    assert model(ids, labels=ids).loss is not None and len(calls) == 5
    with score_labels(model):
        torch.testing.assert_close(model(ids, labels=ids).logprobs, expected)


def test_a_copy_has_parameters_of_its_own_and_no_patch():
    model, (ids, _) = make("llama"), make_batch()
    with score_labels(model):
        other = copy.deepcopy(model)
        torch.nn.init.zeros_(other.lm_head.weight)
        output = other(ids, labels=ids)
    assert output.logits.eq(0).all() and not model.lm_head.weight.eq(0).any()


@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_an_adapted_model_trains_its_adapter(first):
    model, (ids, attention) = make("llama"), make_batch()
    handle = score_labels(model) if first == "patch" else None
    settings = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)).double()
    handle = handle or score_labels(adapted)
    labels = make_labels(ids, attention)
    output = adapted(ids, attention_mask=attention, labels=labels, temperature=0.7)
    found = gradients_of(adapted, output.logprobs, output.entropy)
    handle.remove()
    logits = adapted(ids, attention_mask=attention).logits[:, :-1]
    exact = gradients_of(adapted, *by_logits(logits, labels[:, 1:], 0.7))
    assert found and all("lora" in name for name in found)
    torch.testing.assert_close(found, exact)


@pytest.fixture
def one_rank():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def in_ddp(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def in_fsdp(model):
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


@pytest.mark.filterwarnings("error:.*returned a view tensor")
@pytest.mark.parametrize("wrap", [in_ddp, in_fsdp])
@pytest.mark.parametrize("patched_first", [True, False])
def test_in_ddp_and_fsdp_every_parameter_has_its_gradient(one_rank, wrap, patched_first):
    model, (ids, _) = make("llama"), make_batch()
    with score_labels(model):
        alone = model(ids, labels=ids)
        exact = gradients_of(model, alone.logprobs, alone.entropy)
    model.zero_grad()  # FSDP2 shards parameters, not their gradients
    handle = score_labels(model) if patched_first else None
    wrapped = wrap(model)
    handle = handle or score_labels(wrapped)
    output = wrapped(ids, labels=ids)
    assert isinstance(output, ScoredOutput)
    found = gradients_of(model, output.logprobs, output.entropy)
    torch.testing.assert_close({name: whole(each) for name, each in found.items()}, exact)
    handle.remove()
    assert "forward" not in vars(model)


def test_gradient_checkpointing_changes_nothing():
    model, (ids, _) = make("llama"), make_batch()
    found = []
    with score_labels(model):
        for checkpointing in (False, True):
            if checkpointing:
                model.train().gradient_checkpointing_enable()
            output = model(ids, labels=ids)
            found.append(gradients_of(model, output.logprobs, output.entropy))
    torch.testing.assert_close(*found)


def test_under_autocast_the_scores_are_nearer_to_fp32_than_the_logits_own():
    model, (ids, _) = make("llama").float(), make_batch()
    exact = by_logits(model(ids).logits[:, :-1], ids[:, 1:], 1.0)[0]
    with torch.autocast("cpu", torch.bfloat16), score_labels(model):
        rounded = by_logits(model(ids).logits[:, :-1].float(), ids[:, 1:], 1.0)[0]
        found = model(ids, labels=ids).logprobs
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= (rounded - exact).norm()


def test_a_head_in_fp32_on_a_body_in_bf16():
    """As TRL makes it: the head cast, and a hook that casts what it reads."""
    model, (ids, _) = make("llama").bfloat16(), make_batch()
    model.lm_head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    expected = by_logits(model(ids).logits[:, :-1], ids[:, 1:], 1.0)
    with score_labels(model):
        output = model(ids, labels=ids)
    torch.testing.assert_close([output.logprobs, output.entropy], expected)


def test_rows_that_only_pad_the_vocabulary_count_as_in_the_model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).double()
    model.resize_token_embeddings(V, pad_to_multiple_of=16, mean_resizing=False)
    ids, _ = make_batch()
    logits = model(ids).logits
    assert logits.shape[-1] == 48
    with score_labels(model):
        output = model(ids, labels=ids)
    expected = by_logits(logits[:, :-1], ids[:, 1:], 1.0)
    torch.testing.assert_close([output.logprobs, output.entropy], expected)


def test_the_output_is_a_tree_and_a_tuple():
    model, (ids, _) = make("llama"), make_batch()
    with score_labels(model):
        output = model(ids, labels=ids, use_cache=True, output_hidden_states=True)
        again = model(ids, labels=ids, return_dict=False, use_cache=False)
    doubled = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: 2 * x, output)
    assert isinstance(doubled, ScoredOutput)
    torch.testing.assert_close(doubled.logprobs, 2 * output.logprobs)
    assert len(output.hidden_states) == 3 and output.past_key_values.get_seq_length() == 6
    assert type(again) is tuple
    torch.testing.assert_close(again, (output.logprobs, output.entropy))


def test_the_auxiliary_loss_of_experts_comes_along():
    torch.manual_seed(0)
    settings = {"num_local_experts": 2, "output_router_logits": True}
    model, (ids, _) = MixtralForCausalLM(MixtralConfig(**SMALL, **settings)), make_batch()
    expected = model(ids).aux_loss
    with score_labels(model):
        torch.testing.assert_close(model(ids, labels=ids).aux_loss, expected)


@pytest.mark.slow
def test_a_compiled_model():
    model, (ids, _) = make("llama"), make_batch()
    compiled = torch.compile(model, backend="eager")
    with score_labels(model):
        expected = model(ids, labels=ids)
        exact = gradients_of(model, expected.logprobs, expected.entropy)
    with score_labels(compiled):
        output = compiled(ids, labels=ids)
        found = gradients_of(model, output.logprobs, output.entropy)
    torch.testing.assert_close(output.logprobs, expected.logprobs)
    torch.testing.assert_close(found, exact)
    assert compiled(ids).logits.shape == (*ids.shape, V)
