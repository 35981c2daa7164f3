"""FusedGRPOTrainer(fuse_loss=True): TRL's losses with the gradient of linear_grpo_loss."""

import itertools
import random
from functools import cache, partial

import pytest
import torch

from tests.helpers.count_flops import count_flops

pytest.importorskip("trl")

from trl import GRPOTrainer
from trl.experimental.gmpo import GMPOTrainer

from benchmarks.trl_parity.oracle import add_sampler, in_double
from grpo_kernels.integrations import trl_fused_loss
from grpo_kernels.integrations.transformers import forward_to_hidden
from grpo_kernels.integrations.trl import FusedGRPOTrainer, fuse_trainer
from grpo_kernels.lm_head import backward_plan
from tests.helpers.trl import CASES, REUSED, check_same, make_trainer, train, trained_by_trl

FusedLoss = partial(FusedGRPOTrainer, fuse_loss=True)
V, H = 16, 64

pytestmark = pytest.mark.usefixtures("pytorch_backend", "one_thread")

REFUSED = ("gspo, delta",)  # use_bias_correction_kl


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_logs_and_weights_match_trl(name):
    trained = train(make_trainer(FusedLoss, **CASES[name]))
    check_same(trained, trained_by_trl(name), loss_type=CASES[name].get("loss_type"))


# TRL's `_compute_loss` and the fused one on one batch, in fp64.

MAIN = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "beta": (0.0, 0.04),
    "delta": (None, 1.5),
    "entropy": ("none", "bonus", "adaptive", "adaptive, off"),
}
OTHERS = {
    "use_bias_correction_kl": (False, True),
    "top_entropy_quantile": (1.0, 1.0, 0.4),
    "off_policy_mask_threshold": (None, None, 0.1),
    "sampler": (
        *(None, None, "unused", "token_truncate", "token_mask"),
        *("sequence_truncate", "sequence_mask"),
    ),
    "training": (True, True, False),
    "old": (True, True, False),
    "tools": (False, True),
    "masked": (False, True),  # a whole sequence
}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
ENTROPY = {
    "none": {"entropy_coef": 0.0, "use_adaptive_entropy": False},
    "bonus": {"entropy_coef": 0.3, "use_adaptive_entropy": False},
    "adaptive": {"entropy_coef": 0.3, "use_adaptive_entropy": True, "entropy_target": 9.0},
    "adaptive, off": {"entropy_coef": 0.3, "use_adaptive_entropy": True, "entropy_target": 0.1},
}


def options_of(loss_type):
    """Yield the product of MAIN, each with random OTHERS that the fused loss supports."""
    draw = random.Random(loss_type)
    for values in itertools.product(*MAIN.values()):
        options = dict(zip(MAIN, values, strict=True))
        if options["loss_type"] != loss_type or (options["delta"] and loss_type not in CLIPPED):
            continue
        while True:
            others = {name: draw.choice(values) for name, values in OTHERS.items()}
            sampler = others["sampler"]
            if sampler is not None and others["off_policy_mask_threshold"] is not None:
                continue
            of_sequence = options["importance_sampling_level"] == "sequence"
            if options["beta"] and of_sequence and others["use_bias_correction_kl"]:
                continue
            if loss_type != "vespo" or not (sampler or "").startswith("sequence"):
                break
        yield options | others


@cache
def trainer_of(*, fused):
    """Make a trainer in fp64, to be configured later. TRL's own scores would be in fp32."""
    trainer = make_trainer(GRPOTrainer)
    trainer.model.double()
    return fuse_trainer(trainer)


def configure(trainer, options):
    """Give a trainer the settings of these options, and the state of a running training."""
    sampler = options["sampler"]
    settings = {name: options[name] for name in (*MAIN, *OTHERS)} | ENTROPY[options["entropy"]]
    settings |= {
        "use_vllm": sampler is not None,
        "vllm_importance_sampling_correction": sampler != "unused",
        "vllm_importance_sampling_mode": sampler,
        "vllm_importance_sampling_clip_min": 0.5,
        "steps_per_generation": 3,
        "max_completion_length": 9,
    }
    of_trainer = {
        "epsilon_low": 0.1,
        "epsilon_high": 1.1 if options["loss_type"] == "cispo" else 0.15,
        "current_gradient_accumulation_steps": 2,
        "_entropy_bonus_enabled": options["entropy"] != "none",
        "_last_world_entropy": 1.0,
        "_entropy_window_stats": None,
    }
    for name, value in settings.items():
        setattr(trainer.args, name, value)
        if hasattr(trainer, name):
            setattr(trainer, name, value)
    for name, value in of_trainer.items():
        setattr(trainer, name, value)
    trainer.model.train(options["training"])


def make_inputs(options, seed):
    """Inputs of TRL's `_compute_loss`: prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(seed)
    B, P, T = 4, 3, 6

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    lengths = integers(2, T + 1, B, 1)
    lengths[0] = T
    if options["masked"]:
        lengths[-1] = 0
    inputs = {
        "prompt_ids": integers(2, V, B, P),
        "prompt_mask": (torch.arange(P) >= integers(0, P, B, 1)).long(),
        "completion_ids": integers(2, V, B, T),
        "completion_mask": (torch.arange(T) < lengths).long(),
        "advantages": normal(B),
        "num_items_in_batch": torch.tensor(40),
    }
    inputs["advantages"][1] = 0
    if options["tools"]:
        inputs["tool_mask"] = integers(0, 2, B, T)
    with torch.no_grad():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        near, _, _ = trainer_of(fused=False)._get_per_token_logps_and_entropies(
            trainer_of(fused=False).model, ids, attention, T
        )
    old, ref, sampling = (near + 0.2 * normal(B, T) for _ in range(3))
    if options["old"] or options["sampler"] not in (None, "unused"):
        inputs["old_per_token_logps"] = old
    if options["beta"]:
        inputs["ref_per_token_logps"] = ref
    if options["sampler"] is not None:
        sampling[0, 1] = torch.nan  # vLLM did not score it
        inputs["sampling_per_token_logps"] = sampling
        add_sampler(trainer_of(fused=False), inputs)
    return inputs


def compute(trainer, inputs):
    """Return the loss, the gradients by name, and the metrics."""
    trainer.model.zero_grad()
    mode = "train" if trainer.model.training else "eval"
    trainer._metrics[mode].clear()
    with torch.set_grad_enabled(trainer.model.training), in_double():
        loss = trainer._compute_loss(trainer.model, dict(inputs))
    if trainer.model.training:
        loss.backward()
    gradients = {name: x.grad for name, x in trainer.model.named_parameters()}
    state = (trainer.entropy_coef, trainer._last_world_entropy)
    return loss, gradients, dict(trainer._metrics[mode]) | {"controller": state}


@pytest.mark.parametrize("loss_type", MAIN["loss_type"])
def test_loss_gradients_and_metrics_match_trl(loss_type):
    for seed, options in enumerate(options_of(loss_type)):
        plain, fused = trainer_of(fused=False), trainer_of(fused=True)
        configure(plain, options)
        configure(fused, options)
        fuse_trainer(fused, fuse_loss=True)
        inputs = make_inputs(options, seed)
        (loss, gradients, metrics), (expected, exact, expected_metrics) = (
            compute(trainer, inputs) for trainer in (fused, plain)
        )
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9, msg=str(options))
        torch.testing.assert_close(gradients, exact, rtol=1e-8, atol=1e-8, msg=str(options))
        assert metrics.keys() == expected_metrics.keys()
        for name, values in expected_metrics.items():
            assert metrics[name] == pytest.approx(values, rel=1e-8, abs=1e-9, nan_ok=True), options


def test_old_log_probs_of_tool_tokens_have_no_effect():
    options = next(options_of("grpo"))
    options |= {"tools": True, "old": True, "training": True, "sampler": None}
    trainer = trainer_of(fused=True)
    configure(trainer, options)
    fuse_trainer(trainer, fuse_loss=True)
    inputs = make_inputs(options, seed=0)
    loss, gradients, _ = compute(trainer, inputs)
    is_tool = (inputs["completion_mask"] == 1) & (inputs["tool_mask"] == 0)
    assert is_tool.any()
    inputs["old_per_token_logps"][is_tool] = -800  # exp(800) is infinite
    far, same, _ = compute(trainer, inputs)
    assert far == loss
    torch.testing.assert_close(same, gradients, rtol=0, atol=0)


PLAIN = {name: values[0] for name, values in (MAIN | OTHERS).items()}


def head_matmuls(*, fuse_loss, advantages=(1.0, -1.0, 0.5, 2.0), **options):
    """Count the matmuls of the head in a step, in tokens; return them and the lengths."""
    options = PLAIN | {"old": False} | options  # at ratio 1 no token is clipped
    trainer = fuse_trainer(make_trainer(GRPOTrainer), fuse_loss=fuse_loss)
    configure(trainer, options)
    inputs = make_inputs(options, seed=0)
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    inputs["advantages"] = torch.tensor(advantages)

    def body():
        ids, attention = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1)
            for name in ("ids", "mask")
        )
        hidden, _, _ = forward_to_hidden(
            trainer.model, input_ids=ids, attention_mask=attention, use_cache=False
        )
        hidden.sum().backward()

    body()  # the first call measures the head
    step = count_flops(lambda: trainer._compute_loss(trainer.model, inputs).backward())
    return (step - count_flops(body)) / (2 * V * H), inputs["completion_mask"].sum(1).tolist()


@pytest.mark.parametrize(("workspace", "plain"), [(2**30, 3), (0, 4)])
def test_three_head_matmuls_whatever_the_workspace(monkeypatch, workspace, plain):
    monkeypatch.setattr(backward_plan, "workspace_bytes", lambda _: workspace)
    for fuse_loss, expected in ((False, plain), (True, 3)):
        found, lengths = head_matmuls(fuse_loss=fuse_loss)
        assert found == expected * sum(lengths)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_zero_advantages_cost_no_gradient_matmuls(level):
    settings = {"advantages": (1.0, 0.0, 0.0, -1.0), "importance_sampling_level": level}
    fused, lengths = head_matmuls(fuse_loss=True, **settings)
    assert fused == sum(lengths) + 2 * (lengths[0] + lengths[3])
    with_bonus, _ = head_matmuls(fuse_loss=True, entropy="bonus", **settings)
    assert with_bonus == 3 * sum(lengths), "the bonus has a gradient on all tokens"


def test_changing_entropy_coef_keeps_the_operator(monkeypatch):
    trainer, texts, loss_config = trainer_of(fused=True), [], trl_fused_loss.loss_config
    configure(trainer, PLAIN | {"entropy": "adaptive"})

    def record(settings):
        config = loss_config(settings)
        texts.append(config.text)  # the argument of the operator
        return config

    fuse_trainer(trainer, fuse_loss=True)
    monkeypatch.setattr(trl_fused_loss, "loss_config", record)
    coefficients = []
    for _ in range(3):
        compute(trainer, make_inputs(PLAIN, seed=0))
        coefficients.append(trainer.entropy_coef)
    assert len(set(coefficients)) == len(texts) == 3
    assert len(set(texts)) == 1


@pytest.mark.parametrize("seed", range(2))
def test_evaluation_matches_trl(seed):
    found = []
    for kind in (GRPOTrainer, FusedLoss):
        trainer = make_trainer(kind, loss_type="dapo", entropy_coef=0.1, beta=0.04, seed=seed)
        trainer.eval_dataset = trainer.train_dataset.select(range(8))
        torch.manual_seed(seed)
        found.append(trainer.evaluate())
    clocks = ("runtime", "per_second")
    logs, expected = (
        {name: x for name, x in log.items() if not any(clock in name for clock in clocks)}
        for log in found
    )
    assert {"eval_loss", "eval_kl", "eval_policy_loss"} <= expected.keys()
    assert logs == pytest.approx(expected, rel=1e-5, abs=1e-6)


class DoubledLoss(GRPOTrainer):
    """A user's class, which changes the loss."""

    def _compute_loss(self, model, inputs):
        return 2 * super()._compute_loss(model, inputs)


class FusedDoubledLoss(DoubledLoss, FusedGRPOTrainer):
    pass


class DoubledLossBehind(FusedGRPOTrainer, DoubledLoss):
    """`_compute_loss` of DoubledLoss would change the value, and not the gradient."""


class FusedGMPOTrainer(FusedGRPOTrainer, GMPOTrainer):
    pass


class OwnMask(GRPOTrainer):
    def get_high_entropy_mask(self, entropies, mask, threshold):
        return mask.bool()


class FusedOwnMask(OwnMask, FusedGRPOTrainer):
    pass


class OwnScores(FusedGRPOTrainer):
    def _get_per_token_logps_and_entropies(self, *arguments, **keywords):
        return super()._get_per_token_logps_and_entropies(*arguments, **keywords)


def test_fuse_trainer_twice_matches_subclass_bitwise():
    settings = CASES["grpo, reused"]
    trainer = make_trainer(GRPOTrainer, **settings)
    assert fuse_trainer(fuse_trainer(trainer, fuse_loss=True), fuse_loss=True) is trainer
    (patched, weights), (logs, expected) = (
        train(trainer),
        train(make_trainer(FusedLoss, **settings)),
    )
    assert patched == logs
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_subclass_that_changes_the_loss():
    settings = CASES["grpo, reused"]
    doubled = partial(FusedDoubledLoss, fuse_loss=True)
    trained, expected = (train(make_trainer(kind, **settings)) for kind in (doubled, DoubledLoss))
    check_same(trained, expected)


def test_overridden_methods_raise():
    for kind, owner in ((DoubledLoss, "DoubledLoss"), (DoubledLossBehind, "DoubledLoss")):
        with pytest.raises(TypeError, match=rf"_compute_loss to GRPOTrainer, .* that of {owner}"):
            fuse_trainer(make_trainer(kind), fuse_loss=True)
    with pytest.raises(TypeError, match=r"_compute_loss to GRPOTrainer, .* that of DoubledLoss"):
        make_trainer(partial(DoubledLossBehind, fuse_loss=True))
    with pytest.raises(
        TypeError, match=r"_entropies to GRPOTrainer, got OwnScores with that of Own"
    ):
        make_trainer(partial(OwnScores, fuse_loss=True))
    make_trainer(OwnScores)
    for kind in (OwnMask, partial(FusedOwnMask, fuse_loss=True)):
        with pytest.raises(TypeError, match="must leave get_high_entropy_mask to "):
            fuse_trainer(make_trainer(kind), fuse_loss=True)
    fuse_trainer(make_trainer(OwnMask))


@pytest.mark.parametrize("fused", [False, True])
def test_gmpo_matches_trl(fused):
    settings = {"beta": 0.04, "entropy_coef": 0.3, "off_policy_mask_threshold": 0.0, **REUSED}
    expected = train(make_trainer(GMPOTrainer, **settings))
    if fused:
        trainer = make_trainer(partial(FusedGMPOTrainer, fuse_loss=True), **settings)
    else:
        trainer = fuse_trainer(make_trainer(GMPOTrainer, **settings), fuse_loss=True)
    check_same(train(trainer), expected)
    trainer.top_entropy_quantile = 0.4
    with pytest.raises(
        ValueError, match=r"top_entropy_quantile=0\.4 drops tokens from the geometric"
    ):
        fuse_trainer(trainer, fuse_loss=True)


def test_vespo_lambda_has_trl_s_minimum():
    options = PLAIN | {"loss_type": "vespo", "old": True}
    inputs, found = make_inputs(options, seed=0), []
    inputs["old_per_token_logps"] = (
        inputs["old_per_token_logps"] - 2
    )  # a ratio of e^12 per sequence
    for trainer in (trainer_of(fused=False), fuse_trainer(trainer_of(fused=True), fuse_loss=True)):
        configure(trainer, options)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("vespo_lambda_pos", "vespo_lambda_neg"):
                patch.setattr(trainer.args, name, 0.0)
            found.append(compute(trainer, inputs)[1])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"importance_sampling_level": "sequence", "beta": 0.04, "use_bias_correction_kl": True},
            "use_bias_correction_kl at importance_sampling_level='sequence'.*leave fuse_loss out",
        ),
        ({"delta": 1.1}, "no such setting, delta must be .*: leave fuse_loss out"),
    ],
)
def test_unsupported_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(FusedLoss, **settings)
    make_trainer(FusedGRPOTrainer, **settings)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"loss_type": "gmp"}, "needs a loss_type of grpo, .*got 'gmp': leave fuse_loss out"),
        ({"use_vllm": True, "off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold with a"),
        ({"rollout_func": print, "off_policy_mask_threshold": 0.1}, "ignores their NaN"),
    ],
)
def test_unsupported_attributes_raise(attributes, message):
    trainer = make_trainer(GRPOTrainer)
    vars(trainer).update(attributes)
    with pytest.raises(ValueError, match=message):
        fuse_trainer(trainer, fuse_loss=True)
