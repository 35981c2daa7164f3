"""score_labels: log-probs and entropies match those of the model's own logits."""

import copy
import inspect

import peft
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from grpo_kernels.integrations.score_labels import ScoredOutput, score_labels
from tests.helpers.causal_lms import MODELS, MORE_MODELS, SMALL, V, make_batch, make_model
from tests.helpers.versions import needs_adapters_of_transformers

pytestmark = pytest.mark.usefixtures("pytorch_backend")


def make_labels(ids, attention):
    """Token ids as labels, -100 on padding and on the first two tokens."""
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :2] = -100
    return labels


def logits_scores(logits, targets, temperature):
    """Log-probs and entropies from logits, 0 where the target is -100."""
    logits = logits / temperature
    distribution = torch.distributions.Categorical(logits=logits)
    scored = targets != -100
    logprob = distribution.log_prob(targets.where(scored, 0))
    return [torch.where(scored, x, 0.0) for x in (logprob, distribution.entropy())]


def gradients(model, logprobs, entropy):
    """Gradients of a sum weighted by position, so that swapped tokens differ."""
    model.zero_grad()
    weight = torch.linspace(0.5, 1.5, logprobs.numel(), dtype=logprobs.dtype).view_as(logprobs)
    (weight * (logprobs + 0.3 * entropy)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


SLOW = {"falcon-h1, multiplied": pytest.mark.slow}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW.get(name, ())) for name in MODELS | MORE_MODELS]
)
def test_scores_and_gradients_match_logits(name):
    model, (ids, attention) = make_model(name), make_batch()
    labels, temperature = make_labels(ids, attention), 0.7
    logits = model(ids, attention_mask=attention).logits
    expected = logits_scores(logits[:, :-1], labels[:, 1:], temperature)
    expected_grads = gradients(model, *expected)
    with score_labels(model):
        for _ in range(2):  # the scale is measured, then cached
            output = model(ids, attention_mask=attention, labels=labels, temperature=temperature)
            grads = gradients(model, output.logprobs, output.entropy)
            assert output.logits is None
            torch.testing.assert_close([output.logprobs, output.entropy], expected)
            torch.testing.assert_close(grads, expected_grads, rtol=1e-7, atol=1e-9)


def test_shift_labels():
    model, (ids, attention) = make_model("llama"), make_batch()
    targets = make_labels(ids, attention).roll(-1, 1)
    temperature = torch.linspace(0.5, 2, targets.numel(), dtype=torch.float64).view_as(targets)
    logits = model(ids, attention_mask=attention).logits
    expected = logits_scores(logits, targets, temperature[..., None])
    with score_labels(model):
        output = model(ids, attention, shift_labels=targets, temperature=temperature)
    torch.testing.assert_close([output.logprobs, output.entropy], expected)


@pytest.mark.parametrize("kept", [0, 1, 3, torch.tensor([4, 1])])
def test_logits_to_keep(kept):
    model, (ids, attention) = make_model("llama"), make_batch()
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


def test_generation_without_labels_is_unchanged():
    model, (ids, _) = make_model("llama"), make_batch()
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids[:1], **settings)
    with score_labels(model):
        assert model(ids).logits.shape == (*ids.shape, V)
        assert model.generate(ids[:1], **settings).tolist() == expected.tolist()


def test_labels_and_shift_labels_raise():
    model, (ids, _) = make_model("llama"), make_batch()
    with score_labels(model), pytest.raises(ValueError, match="labels or shift_labels"):
        model(ids, labels=ids, shift_labels=ids)


def test_nonlinear_head_raises_at_once():
    model = make_model("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match=r"the LM head must be a torch\.nn\.Linear .*\.Sequential"):
        score_labels(model)
    assert "forward" not in vars(model)


def state_of(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return sorted(vars(model)), model.forward, inspect.signature(model.forward), hooks


def test_removed_patch_restores_the_model():
    model, (ids, _) = make_model("llama"), make_batch()
    before = state_of(model)
    outer = score_labels(model)
    with pytest.raises(RuntimeError, match="stop"), score_labels(model):  # nested
        assert inspect.signature(model.forward) == before[2]
        model(ids, labels=ids)
        raise RuntimeError("stop")
    assert model(ids, labels=ids).logits is None, "the outer handle is active"
    with pytest.raises(ValueError, match="temperature"):
        model(ids, labels=ids, temperature=0.0)
    outer.remove()
    outer.remove()  # a second call has no effect
    assert state_of(model) == before
    assert model(ids, labels=ids).logits.shape == (*ids.shape, V)


def test_other_patches_of_forward_are_kept():
    """accelerate patches forward too, around the forward that it finds."""
    model, (ids, _) = make_model("llama"), make_batch()
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


def test_deepcopy_is_not_patched():
    model, (ids, _) = make_model("llama"), make_batch()
    with score_labels(model):
        other = copy.deepcopy(model)
        torch.nn.init.zeros_(other.lm_head.weight)
        output = other(ids, labels=ids)
    assert output.logits.eq(0).all() and not model.lm_head.weight.eq(0).any()


@pytest.mark.parametrize("first", ["patch", "adapter"])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_lora(first, targets):
    model, (ids, attention) = make_model("llama"), make_batch()
    handle = score_labels(model) if first == "patch" else None
    settings = {"target_modules": targets, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)).double()
    handle = handle or score_labels(adapted)
    labels = make_labels(ids, attention)
    output = adapted(ids, attention_mask=attention, labels=labels, temperature=0.7)
    grads = gradients(adapted, output.logprobs, output.entropy)
    handle.remove()
    logits = adapted(ids, attention_mask=attention).logits[:, :-1]
    expected_grads = gradients(adapted, *logits_scores(logits, labels[:, 1:], 0.7))
    assert grads and all("lora" in name for name in grads)
    torch.testing.assert_close(grads, expected_grads)


@pytest.fixture
def one_rank():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrap_ddp(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def wrap_fsdp(model):
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def unshard(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


@pytest.mark.filterwarnings("error:.*returned a view tensor")
@pytest.mark.parametrize("wrap", [wrap_ddp, wrap_fsdp])
@pytest.mark.parametrize("patched_first", [True, False])
def test_ddp_and_fsdp_gradients(one_rank, wrap, patched_first):
    model, (ids, _) = make_model("llama"), make_batch()
    with score_labels(model):
        alone = model(ids, labels=ids)
        expected_grads = gradients(model, alone.logprobs, alone.entropy)
    model.zero_grad()  # FSDP2 shards parameters, not their gradients
    handle = score_labels(model) if patched_first else None
    wrapped = wrap(model)
    handle = handle or score_labels(wrapped)
    output = wrapped(ids, labels=ids)
    assert isinstance(output, ScoredOutput)
    grads = gradients(model, output.logprobs, output.entropy)
    torch.testing.assert_close({name: unshard(x) for name, x in grads.items()}, expected_grads)
    handle.remove()
    assert "forward" not in vars(model)


@needs_adapters_of_transformers
@pytest.mark.parametrize("sharded_alone", [False, True])
def test_fsdp_gradients_of_lora_on_head(one_rank, sharded_alone):
    model, (ids, _) = make_model("llama"), make_batch()
    targets = ["q_proj", "lm_head"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    logits = model.double()(ids).logits[:, :-1]
    expected_grads = gradients(model, *logits_scores(logits, ids[:, 1:], 1.0))
    model.zero_grad()
    if sharded_alone:
        fully_shard(model.lm_head, mesh=init_device_mesh("cpu", (1,)))
    wrapped = wrap_fsdp(model)
    with score_labels(wrapped):
        output = wrapped(ids, labels=ids)
    grads = gradients(model, output.logprobs, output.entropy)
    torch.testing.assert_close({name: unshard(x) for name, x in grads.items()}, expected_grads)


def test_gradient_checkpointing():
    model, (ids, _) = make_model("llama"), make_batch()
    found = []
    with score_labels(model):
        for checkpointing in (False, True):
            if checkpointing:
                model.train().gradient_checkpointing_enable()
            output = model(ids, labels=ids)
            found.append(gradients(model, output.logprobs, output.entropy))
    torch.testing.assert_close(*found)


def test_autocast_is_more_accurate_than_logits():
    model, (ids, _) = make_model("llama").float(), make_batch()
    exact = logits_scores(model(ids).logits[:, :-1], ids[:, 1:], 1.0)[0]
    with torch.autocast("cpu", torch.bfloat16), score_labels(model):
        rounded = logits_scores(model(ids).logits[:, :-1].float(), ids[:, 1:], 1.0)[0]
        found = model(ids, labels=ids).logprobs
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= (rounded - exact).norm()


def test_fp32_head_on_bf16_model():
    """TRL casts the head, and adds a hook that casts its input."""
    model, (ids, _) = make_model("llama").bfloat16(), make_batch()
    model.lm_head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    expected = logits_scores(model(ids).logits[:, :-1], ids[:, 1:], 1.0)
    with score_labels(model):
        output = model(ids, labels=ids)
    torch.testing.assert_close([output.logprobs, output.entropy], expected)


def test_padded_vocabulary():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).double()
    model.resize_token_embeddings(V, pad_to_multiple_of=16, mean_resizing=False)
    ids, _ = make_batch()
    logits = model(ids).logits
    assert logits.shape[-1] == 48
    with score_labels(model):
        output = model(ids, labels=ids)
    expected = logits_scores(logits[:, :-1], ids[:, 1:], 1.0)
    torch.testing.assert_close([output.logprobs, output.entropy], expected)


def test_output_is_pytree_and_tuple():
    model, (ids, _) = make_model("llama"), make_batch()
    with score_labels(model):
        output = model(ids, labels=ids, use_cache=True, output_hidden_states=True)
        again = model(ids, labels=ids, return_dict=False, use_cache=False)
    doubled = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: 2 * x, output)
    assert isinstance(doubled, ScoredOutput)
    torch.testing.assert_close(doubled.logprobs, 2 * output.logprobs)
    assert len(output.hidden_states) == 3 and output.past_key_values.get_seq_length() == 6
    assert type(again) is tuple
    torch.testing.assert_close(again, (output.logprobs, output.entropy))


def test_aux_loss_of_experts():
    torch.manual_seed(0)
    settings = {"num_local_experts": 2, "output_router_logits": True}
    model, (ids, _) = MixtralForCausalLM(MixtralConfig(**SMALL, **settings)), make_batch()
    expected = model(ids).aux_loss
    with score_labels(model):
        torch.testing.assert_close(model(ids, labels=ids).aux_loss, expected)


@pytest.mark.slow
def test_compiled_model():
    model, (ids, _) = make_model("llama"), make_batch()
    compiled = torch.compile(model, backend="eager")
    with score_labels(model):
        expected = model(ids, labels=ids)
        expected_grads = gradients(model, expected.logprobs, expected.entropy)
    with score_labels(compiled):
        output = compiled(ids, labels=ids)
        grads = gradients(model, output.logprobs, output.entropy)
    torch.testing.assert_close(output.logprobs, expected.logprobs)
    torch.testing.assert_close(grads, expected_grads)
    assert compiled(ids).logits.shape == (*ids.shape, V)
