"""Checks of a loaded model: its sampler, its positions, its questions."""

from dataclasses import replace

import pytest
import torch

from reference.training.distributed import Ranks
from reference.training.errors import UserError
from reference.training.model import load as models
from reference.training.model.check import check_questions, choose_sampler, learned_positions
from reference.training.model.policy import Policy
from reference.training.rollout.samplers import Generate, SharedPrompt
from reference.training.tasks.questions import Question
from tests.helpers.model_directories import FAMILIES, make_family
from tests.helpers.rollout import completion_logits

WITH_GENERATE = {"Mamba", "OpenAIGPT"}  # their cache has another name, or they have none
WITH_EITHER = {"Mamba2"}  # by the version of Transformers
REFUSED = {"RecurrentGemma", "Rwkv", "MiniMax"}
QUESTIONS = [Question("7+5="), Question("a longer one: 90+12=")]


def make_policy(family, max_new_tokens=6, **options) -> Policy:
    model, tokenizer = make_family(family)
    device = torch.device("cpu")
    eos_ids = models.end_of_sequence_ids(model, tokenizer)
    return Policy(model, tokenizer, device, eos_ids, max_new_tokens, **options)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - REFUSED))
def test_chosen_sampler_and_the_trainer_agree(family):
    policy = make_policy(family)
    policy = replace(policy, sampler=choose_sampler(policy))
    if family not in WITH_EITHER:
        assert isinstance(policy.sampler, Generate if family in WITH_GENERATE else SharedPrompt)
    torch.manual_seed(0)
    samples = policy.sample(QUESTIONS, 3, 1.0)
    tokens, mask = samples.completions.tokens, samples.completions.mask
    with torch.no_grad():
        logits = completion_logits(policy.model, samples.prompts, tokens, mask)
    expected = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    difference = (samples.completions.logprob - expected)[mask].abs()
    assert difference.max() < 1e-4


def test_change_of_the_sampler_is_printed_in_one_line(capsys):
    choose_sampler(make_policy("Mamba"))
    assert capsys.readouterr().out.startswith(
        "--sampler generate: MambaForCausalLM cannot share the prompt of a group: "
    )
    choose_sampler(make_policy("Mamba", sampler=Generate()))
    assert capsys.readouterr().out == ""


def test_several_ranks_cannot_sample_with_generate(capsys):
    with pytest.raises(UserError, match="--sampler generate draws on each rank alike"):
        choose_sampler(make_policy("Mamba", ranks=Ranks(0, 2)))
    assert "MambaForCausalLM cannot share" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["RecurrentGemma", "Rwkv"])
def test_model_that_reads_padding_is_refused(family):
    with pytest.raises(UserError, match=f"^{family}ForCausalLM cannot be trained here: beside pad"):
        choose_sampler(make_policy(family))


def test_model_without_a_working_sampler_is_refused():
    with pytest.raises(UserError, match=r"^MiniMaxForCausalLM cannot be sampled here: its log-"):
        choose_sampler(make_policy("MiniMax"))


def test_cache_that_is_silently_wrong_is_noticed(monkeypatch):
    def repeat_the_first(cache, rows):
        for layer in cache.layers:
            layer.reorder_cache(torch.zeros_like(rows))

    monkeypatch.setattr("transformers.DynamicCache.reorder_cache", repeat_the_first)
    assert isinstance(choose_sampler(make_policy("Llama")), Generate)


def test_choice_does_not_draw_from_the_rng_of_the_run():
    policy, before = make_policy("Llama"), torch.get_rng_state()
    choose_sampler(policy)
    assert torch.equal(torch.get_rng_state(), before)


def test_token_that_a_model_never_writes_is_no_difference():
    def forbid(_, __, logits):
        return logits.index_fill(-1, torch.tensor([5]), -torch.inf)

    policy = make_policy("Llama")
    policy.model.lm_head.register_forward_hook(forbid)
    assert isinstance(choose_sampler(policy), SharedPrompt)


def test_lack_of_memory_is_one_line(monkeypatch):
    def fails(*_, **__):
        raise MemoryError("out of memory")

    policy = make_policy("Llama")
    monkeypatch.setattr(type(policy.model), "forward", fails)
    with pytest.raises(UserError, match=r"cannot be sampled here: MemoryError: out of memory$"):
        choose_sampler(policy)


def test_nan_in_the_weights_is_refused():
    policy = make_policy("Llama")
    torch.nn.init.constant_(policy.model.lm_head.weight, float("nan"))
    with pytest.raises(UserError, match=r"^LlamaForCausalLM cannot be sampled here: .* `nan`"):
        choose_sampler(policy)


@pytest.mark.parametrize(
    ("family", "expected"),
    [("GPT2", 64), ("OPT", 64), ("GPTJ", 64), ("OpenAIGPT", 64), ("Llama", None), ("Mamba", None)],
)
def test_learned_positions(family, expected):
    changes = {} if family == "Mamba" else {"max_position_embeddings": 64}
    assert learned_positions(make_family(family, **changes)[0]) == expected


@pytest.mark.parametrize(("new", "fits"), [(30, True), (31, False)])
def test_completions_must_fit_the_learned_positions(new, fits):
    policy = make_policy("Llama", new, max_positions=64)
    question = Question("x" * (35 - len("user: \nassistant: ")))
    if fits:
        assert policy.sample([question], 2, 1.0).prompts.ids.shape == (1, 35)
        return
    with pytest.raises(
        UserError,
        match=r"^LlamaForCausalLM has 64 positions: .* got a prompt of 35 tokens and "
        "--max-new-tokens 31",
    ):
        policy.sample([QUESTIONS[0], question], 2, 1.0)


def test_longest_question_is_checked_at_the_start(capsys):
    questions = [QUESTIONS[0]] * 50 + [Question("x" * 3000)] + [QUESTIONS[0]] * 50
    with pytest.raises(UserError, match=r"got a prompt of 30.. tokens and --max-new-tokens 6"):
        check_questions(make_policy("Llama", max_positions=64), questions)
    check_questions(make_policy("Llama"), questions)
    assert "warning: a prompt of 30" in capsys.readouterr().out
    length = check_questions(make_policy("Llama"), questions[:50])
    assert length == make_policy("Llama").encode([QUESTIONS[0].prompt]).ids.shape[1]
    assert capsys.readouterr().out == ""
