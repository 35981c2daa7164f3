"""A policy: sampling, its reference policy, and options that change no numbers."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from reference.training.config import ModelSettings
from reference.training.errors import UserError
from reference.training.model import load as models
from reference.training.model import lora
from reference.training.model import policy as policy_module
from reference.training.model.policy import Policy
from reference.training.model.scorers import FusedScorer, PlainScorer
from reference.training.rollout.generate import Completions, encode
from reference.training.rollout.sampler import Sampler
from reference.training.rollout.samplers import SharedPrompt
from reference.training.tasks.tasks import Question
from reference.training.update.micro_batches import MicroBatch
from tests.helpers.rollout import completion_logits

pytestmark = pytest.mark.usefixtures("pytorch_backend")

QUESTIONS = [Question("7+5=", "12"), Question("a longer one: 90+12=", "102")]
CPU = torch.device("cpu")
SCORERS = [PlainScorer(), FusedScorer()]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Register an architecture for --model small --random-weights, with 300 tokens."""
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_dropout": 0.5,
        "initializer_range": 0.3,
    }
    monkeypatch.setitem(models.ARCHITECTURES, "small", sizes)


def load(sampler=None, system=None, **settings) -> Policy:
    torch.manual_seed(0)
    settings = ModelSettings("small", random_weights=True, **settings)
    return Policy.load(settings, CPU, 6, sampler=sampler or SharedPrompt(), system=system)


def perturb(policy: Policy) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def batch(policy: Policy):
    """Make prompts, tokens and a mask that ends some completions early."""
    prompts = encode(policy.tokenizer, [question.text for question in QUESTIONS])
    torch.manual_seed(2)
    tokens = torch.randint(0, 256, (6, 5))
    lengths = torch.tensor([5, 1, 3, 2, 5, 4])
    return prompts, tokens, torch.arange(5) < lengths[:, None]


def logprobs(policy, scorer=SCORERS[0]) -> torch.Tensor:
    """Return the log-probs [6, 5] under a policy, 0 under the mask."""
    prompts, tokens, mask = batch(getattr(policy, "policy", policy))
    return scorer.token_stats(policy, MicroBatch(prompts, tokens, mask, mask)).logprob


def gradients(policy: Policy, scorer=SCORERS[0]) -> dict[str, torch.Tensor]:
    policy.model.zero_grad()
    logprobs(policy, scorer).mul(
        torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    ).sum().backward()
    return {name: p.grad for name, p in policy.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora_rank", [None, 2])
@pytest.mark.parametrize("scorer", SCORERS)
def test_gradient_checkpointing_changes_neither_values_nor_gradients(scorer, lora_rank):
    plain = load(lora_rank=lora_rank)
    checkpointed = load(lora_rank=lora_rank, gradient_checkpointing=True)
    for policy in (plain, checkpointed):
        perturb(policy)
    ours = logprobs(checkpointed, scorer)
    assert torch.allclose(ours, logprobs(plain, scorer), atol=1e-5)
    expected = gradients(plain, scorer)
    for name, gradient in gradients(checkpointed, scorer).items():
        scale = expected[name].abs().max()
        assert torch.allclose(gradient, expected[name], atol=1e-5 * scale.item()), name


@pytest.mark.parametrize("scorer", SCORERS)
def test_gradient_checkpointing_recomputes_in_evaluation_mode(scorer):
    policy = load(gradient_checkpointing=True)
    runs = []
    for layer in policy.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    total = logprobs(policy, scorer).sum()
    assert len(runs) == 2
    total.backward()
    assert len(runs) == 4
    assert not policy.model.training


def test_gradient_checkpointing_saves_fewer_activations():
    kept = {}
    for checkpointed in (False, True):
        policy = load(gradient_checkpointing=checkpointed)
        sizes = []
        inputs = {param.data_ptr() for param in policy.model.parameters()}

        def note(tensor, sizes=sizes, inputs=inputs):
            if tensor.data_ptr() not in inputs:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            with policy.forward_context():
                completion_logits(policy.model, *batch(policy))
        kept[checkpointed] = sum(sizes)
    assert kept[True] < kept[False] / 2


def test_gradient_checkpointing_does_not_change_sampling():
    texts = []
    for checkpointed in (False, True):
        policy = load(gradient_checkpointing=checkpointed)
        torch.manual_seed(4)
        texts.append(policy.sample(QUESTIONS, 3, 1.0).completions.tokens)
    assert torch.equal(*texts)


def test_gradient_checkpointing_without_layers_raises(monkeypatch):
    monkeypatch.setattr(policy_module, "checkpointable_layers", lambda model: [])
    with pytest.raises(UserError, match="--gradient-checkpointing: LlamaForCausalLM has no layers"):
        load(gradient_checkpointing=True)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"lora_rank": 2}])
def test_dropout_is_off_in_every_pass(options):
    policy = load(**options)
    assert torch.equal(logprobs(policy), logprobs(policy))
    again = gradients(policy)
    assert all(torch.equal(gradient, again[name]) for name, gradient in gradients(policy).items())


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"lora_rank": 2}])
@pytest.mark.parametrize("autocast", ["off", "bf16"])
@pytest.mark.parametrize("scorer", SCORERS)
def test_frozen_copy_matches_the_policy_until_it_is_trained(scorer, autocast, options):
    policy = load(autocast=autocast, **options)
    reference = policy.frozen_copy()
    before, counted = logprobs(policy, scorer), batch(policy)[2]
    at_first = logprobs(reference, scorer)
    # A product may be summed in another order where its operands lie elsewhere in memory, and in
    # bf16 one such sum can round the other way; a copy all in bf16 is 3e-2 off.
    assert (at_first - before)[counted].abs().mean() < (1e-6 if autocast == "off" else 1e-3)
    perturb(policy)
    assert (logprobs(policy, scorer) - before)[counted].abs().mean() > 0.1
    assert torch.equal(logprobs(reference, scorer), at_first)


def test_frozen_copy_with_lora_shares_the_model():
    policy = load(lora_rank=2)
    assert policy.frozen_copy().model is policy.model


@pytest.mark.parametrize("checkpointed", [False, True])
def test_reference_pass_before_backward_preserves_lora_gradients(checkpointed):
    policy = load(lora_rank=2, gradient_checkpointing=checkpointed)
    perturb(policy)
    expected = gradients(policy)
    policy.model.zero_grad()
    total = (logprobs(policy) * torch.randn(6, 5, generator=torch.Generator().manual_seed(3))).sum()
    assert not logprobs(policy.frozen_copy()).requires_grad
    total.backward()
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize(
    ("autocast", "device", "dtype"),
    [
        ("auto", "cpu", None),
        ("auto", "cuda", torch.bfloat16),
        ("bf16", "cpu", torch.bfloat16),
        ("off", "cuda", None),
    ],
)
def test_autocast_is_bf16_on_a_gpu_by_default(autocast, device, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    policy = Policy(None, None, torch.device(device), [], 1, precision=autocast)
    with policy.autocast():
        assert torch.is_autocast_enabled(device) == (dtype is not None)
        assert dtype is None or torch.get_autocast_dtype(device) == dtype


def test_weights_stay_fp32_under_autocast():
    policy = load(autocast="bf16")
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert {g.dtype for g in gradients(policy).values()} == {torch.float32}


@pytest.mark.parametrize("scorer", SCORERS)
def test_tied_head_and_embedding_share_their_gradient(scorer):
    policy = load()
    embedding, head = policy.model.model.embed_tokens, policy.model.lm_head
    tied = gradients(policy, scorer)["model.embed_tokens.weight"]

    untied = load()
    untied.model.lm_head.weight = torch.nn.Parameter(head.weight.detach().clone())
    apart = gradients(untied, scorer)
    parts = apart["model.embed_tokens.weight"], apart["lm_head.weight"]
    assert all(part.abs().max() > 0 for part in parts)
    assert torch.allclose(tied, sum(parts), rtol=1e-4, atol=1e-5)

    before = embedding.weight.detach().clone()
    torch.optim.AdamW(policy.model.parameters(), lr=1e-3, fused=True).step()
    assert head.weight is embedding.weight
    assert not torch.equal(embedding.weight, before)


def test_system_prompt_is_before_every_question():
    policy = load(system="Add.")
    prompts = policy.sample(QUESTIONS, 1, 1.0).prompts
    rows = zip(prompts.ids, prompts.mask, strict=True)
    texts = [policy.tokenizer.decode(ids[mask]) for ids, mask in rows]
    assert texts == [f"system: Add.\nuser: {each.text}\nassistant: " for each in QUESTIONS]


def test_beginning_of_text_token_is_added_once():
    policy = load()
    tokenizer = policy.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", begin)]
    )
    tokenizer.chat_template = "<begin>" + tokenizer.chat_template
    assert tokenizer.encode("7")[0] == begin
    prompts = policy.sample(QUESTIONS, 1, 1.0).prompts
    assert (prompts.ids == begin).sum(-1).tolist() == [1, 1]


def test_sample_with_another_sampler():
    policy = load()
    given = []

    class Fixed(Sampler):
        def sample(self, policy, prompts, group_size, temperature):
            given.append((policy, group_size, temperature))
            tokens = torch.tensor([list(b"12"), list(b"13"), list(b"14"), list(b"15")])
            tokens = torch.tensor([policy.tokenizer.encode(bytes(row).decode()) for row in tokens])
            mask = torch.ones_like(tokens, dtype=torch.bool)
            return Completions(tokens, mask, torch.zeros(4, 2), torch.ones(4, dtype=torch.bool))

    answers = policy.sample(QUESTIONS, 2, 0.7, Fixed())
    assert given == [(policy, 2, 0.7)]
    assert answers.texts == ["12", "13", "14", "15"]
    assert len(answers.prompts.ids) == 2


def test_chat_reply_to_one_message_matches_sample():
    policy = load(system="Add.")
    messages = [{"role": "user", "content": QUESTIONS[1].text}]
    expected = policy.sample(QUESTIONS[1:], 1, 0.0).texts[0]
    assert policy.chat_reply(messages, 0.0, 6) == expected != ""
    assert len(messages) == 1


def test_chat_reply_encodes_the_whole_conversation():
    seen = []

    class Noting(SharedPrompt):
        def sample(self, policy, prompts, *settings):
            assert policy.max_new_tokens == 3
            seen.append(policy.tokenizer.decode(prompts.ids[0]))
            return super().sample(policy, prompts, *settings)

    policy = load(system="Add.", sampler=Noting())
    turns = [("user", "7+5"), ("assistant", "12"), ("user", "and 1 more")]
    messages = [{"role": role, "content": content} for role, content in turns]
    policy.chat_reply(messages, 1.0, 3)
    own = [{"role": "system", "content": "Multiply."}, *messages]
    policy.chat_reply(own, 1.0, 3)
    conversation = "user: 7+5\nassistant: 12\nuser: and 1 more\nassistant: "
    assert seen == ["system: Add.\n" + conversation, "system: Multiply.\n" + conversation]


def test_merged_policy_has_no_adapter():
    policy = load(lora_rank=2)
    perturb(policy)
    saved = lora.merged(policy.model)
    assert type(saved).__name__ == "LlamaForCausalLM"
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        expected = policy.model(input_ids=ids).logits
        assert torch.allclose(saved.eval()(input_ids=ids).logits, expected, atol=1e-4)
