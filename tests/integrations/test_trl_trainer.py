"""FusedGRPOTrainer and TRL's GRPOTrainer: same seed, same logs, same weights."""

import re
import textwrap
from copy import deepcopy
from functools import partial

import pytest
import torch

pytest.importorskip("trl")

from peft import LoraConfig, get_peft_model
from trl import GRPOTrainer

from grpo_kernels import linear_token_stats
from grpo_kernels.integrations import transformers
from grpo_kernels.integrations import trl as trl_integration
from grpo_kernels.integrations.transformers import LMHead, forward_to_hidden
from grpo_kernels.integrations.trl import FusedGRPOTrainer, fuse_trainer
from tests.helpers.trl import (
    CASES,
    REUSE,
    REUSED,
    VESPO,
    check_same,
    make_experts,
    make_llama,
    make_trainer,
    model_directory,
    train,
    trained_by_trl,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def covering_pairs():
    """Cover every pair of values of loss_type, level, beta and reuse."""
    values = [("token", "sequence"), (0.0, 0.04), tuple(REUSE)]
    for number, loss_type in enumerate(LOSS_TYPES):
        one = number & 1, number >> 1 & 1, 0
        for indices in (one, [1 - index for index in one]):
            yield loss_type, *(pair[index] for pair, index in zip(values, indices, strict=True))


# fuse_loss is tested on all cases.
FAST = ("grpo, reused", "gspo, delta", "prompt tuning", "experts", "head in fp32")


@pytest.mark.usefixtures("pytorch_backend")
@pytest.mark.parametrize(
    "name", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in CASES]
)
def test_logs_and_weights_match_trl(name):
    settings, (logs, changes) = CASES[name], trained_by_trl(name)
    trained = train(make_trainer(FusedGRPOTrainer, **settings))
    check_same(trained, (logs, changes), loss_type=settings.get("loss_type"))
    assert max(change.abs().max() for change in changes.values()) > 1e-3, "weights change"
    found = {key: [log[key] for log in logs if key in log] for key in logs[0]}
    lengths = zip(*(found[f"completions/{end}_length"] for end in ("min", "max")), strict=True)
    assert any(shortest < longest for shortest, longest in lengths), "there is padding"
    if name == "experts":
        assert min(found["aux_loss"]) > 1
    if settings.get("beta"):
        assert max(found["kl"]) > 1e-5
    if "num_iterations" in settings and "clip_ratio/region_mean" in found:
        assert max(found["clip_ratio/region_mean"]) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("pytorch_backend")
@pytest.mark.parametrize(("loss_type", "level", "beta", "reuse"), list(covering_pairs()))
def test_all_loss_types_match_trl(loss_type, level, beta, reuse):
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta}
    settings |= {"use_bias_correction_kl": level == "token", **REUSE[reuse]}
    settings |= VESPO if loss_type == "vespo" else {}
    expected = train(make_trainer(GRPOTrainer, **settings))
    for fuse_loss in (False, True):
        kind = partial(FusedGRPOTrainer, fuse_loss=fuse_loss)
        check_same(train(make_trainer(kind, **settings)), expected, loss_type=loss_type)


class DoubledLoss(GRPOTrainer):
    """A user's class, which changes another method."""

    def _compute_loss(self, model, inputs):
        return 2 * super()._compute_loss(model, inputs)


class FusedDoubledLoss(DoubledLoss, FusedGRPOTrainer):
    pass


@pytest.mark.usefixtures("pytorch_backend")
@pytest.mark.parametrize(
    ("plain", "fused"), [(GRPOTrainer, FusedGRPOTrainer), (DoubledLoss, FusedDoubledLoss)]
)
def test_fuse_trainer_matches_subclass_bitwise(plain, fused):
    settings = CASES["grpo, reused"]
    trainer = make_trainer(plain, **settings)
    assert fuse_trainer(trainer) is trainer
    (patched, weights), (logs, expected) = train(trainer), train(make_trainer(fused, **settings))
    assert patched == logs
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def batch():
    """Prompts padded on the left, completions on the right; the second completion is empty."""
    ids = torch.randint(2, 16, (3, 9), generator=torch.Generator().manual_seed(0))
    attention = torch.ones(3, 9, dtype=torch.int64)
    attention[0, :2] = attention[0, 7:] = attention[1, 5:] = 0
    return ids, attention


def score(trainer, ids, attention, **keywords):
    function = trainer._get_per_token_logps_and_entropies
    return function(trainer.model, ids, attention, 4, **keywords)


def exact_scores(model, ids, attention, temperature):
    """Log-probs and entropies of the last 4 tokens, from the logits of a model in fp64."""
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -5:-1] / temperature
    logprobs = logits.log_softmax(-1)
    mask = attention[:, -4:] != 0
    token_logprobs = logprobs.gather(-1, ids[:, -4:, None])[..., 0]
    return token_logprobs * mask, -(logprobs.exp() * logprobs).sum(-1) * mask


@pytest.mark.usefixtures("backend")
def test_scores_and_gradients_match_logits():
    trainer, (ids, attention) = make_trainer(FusedGRPOTrainer, temperature=0.7), batch()
    found = score(trainer, ids, attention, batch_size=2, compute_entropy=True)
    assert found[2] is None and all(x.dtype == torch.float32 for x in found[:2])
    exact_model = make_llama().double()
    expected = exact_scores(exact_model, ids, attention, 0.7)
    (found[0].sum() - 3 * found[1].sum()).backward()
    (expected[0].sum() - 3 * expected[1].sum()).backward()
    for score_, exact in zip(found[:2], expected, strict=True):
        torch.testing.assert_close(score_.double(), exact, rtol=1e-5, atol=1e-5)
    for one, other in zip(trainer.model.parameters(), exact_model.parameters(), strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-4)
    logprobs, entropies, _ = score(trainer, ids, attention)
    assert entropies is None
    torch.testing.assert_close(logprobs, found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("pytorch_backend")
def test_only_completion_tokens_reach_the_head_on_a_cpu_too(monkeypatch):
    trainer, seen, (ids, attention) = make_trainer(FusedGRPOTrainer), [], batch()
    token_stats = LMHead.token_stats

    def spy(self, hidden, *arguments, **keywords):
        seen.append(hidden.shape)
        return token_stats(self, hidden, *arguments, **keywords)

    monkeypatch.setattr(LMHead, "token_stats", spy)
    trainer.model.lm_head.register_forward_hook(lambda *_: seen.append("logits"))
    score(trainer, ids, attention)
    assert seen == [(int(attention[:, -4:].sum()), 64)]


@pytest.mark.usefixtures("pytorch_backend")
def test_all_masked():
    trainer, (ids, attention) = make_trainer(FusedGRPOTrainer), batch()
    attention[:, -4:] = 0
    logprobs, entropies, _ = score(trainer, ids, attention, compute_entropy=True)
    (logprobs.sum() + entropies.sum()).backward()
    assert all((param.grad == 0).all() for param in trainer.model.parameters())


@pytest.mark.usefixtures("pytorch_backend")
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_precision_of_head_matmul(autocast, cast):
    def make_model():
        return make_llama() if autocast else make_llama().bfloat16()

    settings = {"bf16": autocast, "cast_lm_head_to_fp32": cast, "make_model": make_model}
    trainer, (ids, attention) = make_trainer(FusedGRPOTrainer, **settings), batch()
    found = score(trainer, ids, attention)[0]
    with trainer.accelerator.autocast():
        hidden, head, _ = forward_to_hidden(
            trainer.model, input_ids=ids, attention_mask=attention, use_cache=False
        )
    hidden, weight = (
        x.to(torch.float32 if cast else torch.bfloat16).double()
        for x in (hidden[:, -5:-1], head.weight)
    )
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[:, -4:, None])[..., 0]
    exact = logprobs * (attention[:, -4:] != 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("pytorch_backend")
def test_docstring_example(tmp_path):
    (example,) = re.findall(r"(    from datasets.*?\.train\(\)\n)", trl_integration.__doc__, re.S)
    code = textwrap.dedent(example)
    for shown, here in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", model_directory()),
        ('"run",', f'"{tmp_path}", use_cpu=True, bf16=False, report_to="none",'),
    ):
        assert code.count(shown) == 1
        code = code.replace(shown, here)
    exec(code, namespace := {})
    assert namespace["trainer"].state.global_step == 2


def test_cast_lm_head_to_fp32_of_bf16_model():
    """An evaluation with bf16_full_eval casts the model to bf16."""
    settings = {"cast_lm_head_to_fp32": True, "make_model": lambda: make_llama().bfloat16()}
    fused, plain = (make_trainer(kind, **settings) for kind in (FusedGRPOTrainer, GRPOTrainer))
    for trainer in (fused, plain):
        trainer.model.bfloat16()
    ids, attention = batch()
    found, expected = (score(trainer, ids, attention)[0] for trainer in (fused, plain))
    counts = attention[:, -4:] != 0
    torch.testing.assert_close(found[counts], expected[counts], rtol=1e-5, atol=1e-5)


ADAPTERS_ON_HEAD = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
    "tokens": LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 5]}
    ),
}


@pytest.mark.usefixtures("pytorch_backend")
@pytest.mark.parametrize("adapter", ADAPTERS_ON_HEAD.values(), ids=ADAPTERS_ON_HEAD)
def test_adapter_on_head(adapter):
    """GRPOTrainer cannot train it, so the ground truth is the logits of the model in fp64."""
    settings = {"peft_config": adapter, "beta": 0.04, "learning_rate": 0.05, **REUSED}
    trainer = make_trainer(FusedGRPOTrainer, **settings)
    logs, changes = train(trainer)
    for name, change in changes.items():
        is_trained = "lora_" in name or "trainable_tokens_delta" in name
        assert is_trained == bool(change.any()), name

    fused = train(make_trainer(partial(FusedGRPOTrainer, fuse_loss=True), **settings))
    check_same(fused, (logs, changes))
    ids, attention = batch()
    found = score(trainer, ids, attention, compute_entropy=True)
    exact_model = get_peft_model(make_llama(), deepcopy(adapter))
    exact_model.load_state_dict(trainer.model.state_dict())
    exact_model.double()
    expected = exact_scores(exact_model, ids, attention, 1.0)
    trainer.model.zero_grad()
    (found[0].sum() - 3 * found[1].sum()).backward()
    (expected[0].sum() - 3 * expected[1].sum()).backward()
    for score_, exact in zip(found[:2], expected, strict=True):
        torch.testing.assert_close(score_.double(), exact, rtol=1e-5, atol=1e-5)
    for one, other in zip(trainer.model.parameters(), exact_model.parameters(), strict=True):
        if other.requires_grad:
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "cast", "error", "message"),
    [
        ({"lora_dropout": 0.5}, False, TypeError, "lora_dropout=0.5 in training mode: set lora_"),
        ({"use_dora": True}, False, TypeError, r"got the adapter 'default' with peft\..*Dora"),
        ({}, True, ValueError, "cast_lm_head_to_fp32 must be False with a LoRA on the head"),
    ],
)
def test_unsupported_adapters_on_head_raise_at_construction(config, cast, error, message):
    adapter = LoraConfig(r=2, target_modules=["lm_head"], **config)
    settings = {"peft_config": adapter, "make_model": make_experts, "cast_lm_head_to_fp32": cast}
    with pytest.raises(error, match=message):
        make_trainer(FusedGRPOTrainer, **settings)
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        make_trainer(GRPOTrainer, **settings)


@pytest.mark.parametrize(
    ("settings", "has_bonus"),
    [({}, False), ({"entropy_coef": 0.1}, True), ({"use_adaptive_entropy": True}, True)],
)
def test_frozen_head_prepares_for_the_gradient_of_an_entropy_bonus(
    pytorch_backend, monkeypatch, settings, has_bonus
):
    calls = []

    def recorded(*arguments, **keywords):
        calls.append(keywords["entropy_grad"])
        return linear_token_stats(*arguments, **keywords)

    monkeypatch.setattr(transformers, "linear_token_stats", recorded)
    fused = make_trainer(FusedGRPOTrainer, **settings)
    for trainer in (fused, fuse_trainer(make_trainer(GRPOTrainer, **settings))):
        score(trainer, *batch(), compute_entropy=True)
    assert calls == [has_bonus] * 2


class OwnScores(GRPOTrainer):
    def _get_per_token_logps_and_entropies(self, *arguments, **keywords):
        logprobs, *others = super()._get_per_token_logps_and_entropies(*arguments, **keywords)
        return 2 * logprobs, *others


class FusedOwnScores(FusedGRPOTrainer, OwnScores):
    pass


@pytest.mark.usefixtures("pytorch_backend")
def test_a_subclass_with_its_own_scores():
    ids, attention = batch()
    found = [
        score(trainer, ids, attention)[0]
        for trainer in (
            make_trainer(FusedOwnScores),
            fuse_trainer(fuse_trainer(make_trainer(OwnScores))),
            make_trainer(GRPOTrainer),
        )
    ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    counts = attention[:, -4:] != 0
    torch.testing.assert_close(found[0][counts], 2 * found[2][counts], rtol=1e-5, atol=1e-5)


def test_fuse_trainer_refuses_other_classes():
    with pytest.raises(TypeError, match=r"a trl.GRPOTrainer or .*patch\(\) .*got Linear"):
        fuse_trainer(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"must be a trl\.GRPOTrainer, got Linear"):
        fuse_trainer(torch.nn.Linear(1, 1), fuse_loss=True)
