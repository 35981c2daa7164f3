"""TRL's own loss and ours agree on the same tensors, in fp64, for every option of TRL."""

import math
import re
import runpy
from dataclasses import fields, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.trl_parity import options as trl_options
from benchmarks.trl_parity import oracle, page
from benchmarks.trl_parity.compare import (
    IMPLEMENTATIONS,
    differences_from_trl,
    make_batch,
    our_loss,
    unintended_differences,
)
from benchmarks.trl_parity.differences import DIFFERENCES, excluded_parts
from benchmarks.trl_parity.options import OPTIONS, PLAIN, combinations, settings_of
from benchmarks.trl_parity.oracle import GMPO, TrlChanged, trl_loss
from grpo_kernels import LossConfig
from grpo_kernels.integrations.trl_loss import OBJECTIVES

pytest.importorskip("trl")

TOLERANCE = 1e-12
NOT_ROUNDING = 1e-6  # a difference larger than rounding
SEEDS = range(12)
COMPARED = [options for options in combinations() if "gradient" not in excluded_parts(options)]


def largest(differences):
    return max(value for parts in differences.values() for value in parts.values())


@cache
def plainest(name, value):
    """Return the combination with this option and the fewest others that are not plain."""

    def others(options):
        return sum(options[other] != PLAIN[other] for other in options.keys() - {name})

    return min((options for options in COMPARED if options[name] == value), key=others)


@pytest.mark.parametrize("loss_type", OPTIONS["loss_type"])
@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_loss_gradients_and_metrics_match_trl(loss_type, data, seed):
    candidates = [options for options in COMPARED if options["loss_type"] == loss_type]
    differences = unintended_differences(data.draw(st.sampled_from(candidates)), seed)
    assert largest(differences) < TOLERANCE, differences


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values]
)
def test_every_option_changes_the_gradient_and_matches(name, value):
    options = plainest(name, value)
    assert max(largest(unintended_differences(options, seed)) for seed in SEEDS) < TOLERANCE
    if value == PLAIN[name] or name == "batch":
        return
    batches = [make_batch(seed, options["batch"]) for seed in SEEDS]
    without = options | {name: PLAIN[name]}
    gradients = [
        [trl_loss(settings_of(chosen), batch)[1:3] for chosen in (options, without)]
        for batch in batches
    ]
    changes = [(x - y).abs().max() for two in gradients for x, y in zip(*two, strict=True)]
    assert max(changes) > NOT_ROUNDING


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, {"epsilon": 0.0, "epsilon_high": 5.0}),
        ({}, {"delta": 1.5}),
        ({"loss_type": "cispo"}, {"epsilon_high": 0.9}),
        ({"loss_type": "sapo"}, {"sapo_temperature_pos": 3.0, "sapo_temperature_neg": 0.2}),
        (
            {"loss_type": "vespo"},
            {
                **{"vespo_k_pos": 0.5, "vespo_lambda_pos": 1.5},
                **{"vespo_k_neg": 1.0, "vespo_lambda_neg": 0.3},
            },
        ),
        ({"loss_type": "dr_grpo"}, {"max_completion_length": 3}),
        ({"top_entropy_quantile": 0.55, "entropy_coef": -0.5}, {}),
        ({"off_policy_mask_threshold": -0.2, "beta": 2.0}, {}),
    ]
    + [
        (
            {"vllm_importance_sampling_mode": mode},
            {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high},
        )
        for mode in OPTIONS["vllm_importance_sampling_mode"][1:]
        for low, high in [(None, 0.7), (1.1, None)]
    ],
)
def test_other_numbers_match(options, numbers):
    options = PLAIN | options
    excluded = excluded_parts(options)
    for seed in SEEDS:
        batch = make_batch(seed, "ragged")
        for parts in differences_from_trl(settings_of(options) | numbers, batch).values():
            assert all(v < TOLERANCE for part, v in parts.items() if part not in excluded), parts


def test_constructors_have_the_defaults_of_trl():
    """TRL's CISPO falls back to a cap of 0.2 and its DAPO to an epsilon of 0.2; ours do not."""
    from trl import GRPOConfig
    from trl.experimental.gmpo import GMPOConfig

    for name in ("grpo", "sapo", "vespo", GMPO):
        config = GMPOConfig if name == GMPO else GRPOConfig
        defaults = {item.name: item.default for item in fields(config)}
        defaults["epsilon_high"] = defaults["epsilon_high"] or defaults["epsilon"]
        ours = getattr(LossConfig, name)()
        for trl_name, our_name in OBJECTIVES[name].items():
            assert getattr(ours, our_name) == defaults[trl_name], trl_name


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.where)
def test_intended_difference_exists(difference):
    options = PLAIN | difference.example
    assert difference.applies(options)
    seen = {implementation: set() for implementation in IMPLEMENTATIONS}
    for seed in range(100):  # some metrics differ rarely
        batch = make_batch(seed, options["batch"])
        found = differences_from_trl(settings_of(options), batch)
        for implementation, parts in found.items():
            compared = difference.parts & parts.keys()
            seen[implementation] |= {part for part in compared if parts[part] > NOT_ROUNDING}
        if all(parts == compared for parts in seen.values()):
            break
    assert compared
    assert seen == dict.fromkeys(IMPLEMENTATIONS, compared)


def test_k3_corrected_uses_the_token_ratio_at_sequence_level():
    options = PLAIN | {"use_bias_correction_kl": True, "beta": 0.04}
    at_sequence = options | {"importance_sampling_level": "sequence"}
    batch = make_batch(0, "ragged")
    by_token, by_sequence = (
        trl_loss(settings_of(chosen), batch) for chosen in (options, at_sequence)
    )
    for implementation in IMPLEMENTATIONS:
        ours = our_loss(implementation, settings_of(at_sequence), batch)
        assert ours.metrics["kl"] == pytest.approx(by_token.metrics["kl"], abs=TOLERANCE)
        assert abs(ours.metrics["kl"] - by_sequence.metrics["kl"]) > NOT_ROUNDING


def test_nan_sampling_logprob_makes_our_loss_nan():
    options = settings_of(PLAIN | {"vllm_importance_sampling_mode": "token_truncate"})
    batch = make_batch(0, "not scored")
    sampling = batch.sampling_logprob
    scored = replace(batch, sampling_logprob=sampling.where(~sampling.isnan(), batch.old_logprob))
    trl, repaired = trl_loss(options, batch), trl_loss(options, scored)
    assert trl.loss == repaired.loss
    for implementation in IMPLEMENTATIONS:
        assert math.isnan(our_loss(implementation, options, batch).loss)
        ours = our_loss(implementation, options, scored).loss
        assert ours == pytest.approx(trl.loss, abs=TOLERANCE)


def test_gmpo_of_trl_adds_the_advantage_of_a_masked_sequence():
    options, batch = settings_of(PLAIN | {"loss_type": GMPO}), make_batch(0, "one sequence masked")
    extra = -batch.advantages[-1].item() / len(batch.mask)
    trl = trl_loss(options, batch)
    for implementation in IMPLEMENTATIONS:
        ours = our_loss(implementation, options, batch).loss
        assert trl.loss == pytest.approx(ours + extra, abs=TOLERANCE)


def test_policy_loss_metric_is_the_policy_term_alone():
    bonus = PLAIN | {"entropy_coef": 0.01, "beta": 0.04}
    batch, plain = make_batch(0, "ragged"), settings_of(PLAIN)
    four = settings_of(bonus | {"gradient_accumulation_steps": 4})
    with_kl = trl_loss(settings_of(bonus | {"entropy_coef": 0.0}), batch).loss
    assert trl_loss(four, batch).metrics["policy_loss"] == pytest.approx(with_kl, abs=TOLERANCE)
    for implementation in IMPLEMENTATIONS:
        alone = our_loss(implementation, plain, batch).loss
        ours = our_loss(implementation, four, batch).metrics["policy_loss"]
        assert ours == pytest.approx(alone / 4, abs=TOLERANCE)


@pytest.mark.parametrize(
    "body",
    ["return self.some_new_attribute", "return inputs['some_new_input']", "some_new_name"],
)
def test_changed_loss_of_trl_is_reported(monkeypatch, body):
    from trl import GRPOTrainer

    names = {}
    exec(f"def changed(self, model, inputs):\n    {body}", names)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", names["changed"])
    with pytest.raises(TrlChanged, match=r"made for TRL 1\.16.*some_new"):
        trl_loss(settings_of(PLAIN), make_batch(0, "ragged"))


def test_changed_sampler_statements_of_trl_are_reported(monkeypatch):
    monkeypatch.setattr(oracle, "SAMPLER_CONDITION", "self.use_something_else")
    oracle.sampler_statements.cache_clear()
    options = PLAIN | {"vllm_importance_sampling_mode": "token_mask"}
    with pytest.raises(TrlChanged, match="use_something_else"):
        trl_loss(settings_of(options), make_batch(0, "ragged"))


def test_default_dtype_is_restored():
    trl_loss(settings_of(PLAIN), make_batch(0, "ragged"))
    assert torch.get_default_dtype() == torch.float32


def test_written_page_has_every_option_and_no_large_difference():
    text = page.RESULTS.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", text, re.M))
    assert list(rows) == ["all", *page.option_names()]
    for row in rows.values():
        count, *figures = row.split(" | ")
        assert int(count.replace(",", "")) > 0
        assert len(figures) == len(page.KINDS)
        assert max(map(float, figures)) < TOLERANCE
    assert int(rows["all"].split(" | ")[0].replace(",", "")) == len(COMPARED)
    where = [difference.where for difference in DIFFERENCES]
    assert re.findall(r"^\* \*\*(.+?)\*\* \(", text, re.M) == where


def test_command_writes_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(trl_options, "combinations", lambda: COMPARED[::4000])
    monkeypatch.setattr(page, "EXAMPLES", 1)
    monkeypatch.setattr("sys.argv", ["trl_parity", "--out", str(tmp_path / "page.md")])
    runpy.run_module("benchmarks.trl_parity", run_name="__main__")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert f"| `all` | {len(COMPARED[::4000])} |" in text
