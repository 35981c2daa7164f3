"""TRL's own loss, called on the same tensors, says what ours says: in fp64, option by option."""

import math
import re
from dataclasses import fields, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.trl_parity import __main__ as parity
from benchmarks.trl_parity import oracle as trl_oracle
from benchmarks.trl_parity.__main__ import SIDES, from_trl, make_batch, our_loss, unmeant
from benchmarks.trl_parity.differences import DIFFERS, left_out
from benchmarks.trl_parity.options import OPTIONS, PLAIN, combinations, settings_of
from benchmarks.trl_parity.oracle import GMPO, TrlHasMoved, trl_loss
from grpo_kernels import LossConfig
from grpo_kernels.integrations.trl_loss import OBJECTIVES

pytest.importorskip("trl")

TOLERANCE = 1e-12
FELT = 1e-6  # a difference that is none of rounding
SEEDS = range(12)
COMPARED = [each for each in combinations() if "gradient" not in left_out(each)]


def largest(found):
    return max(value for parts in found.values() for value in parts.values())


def besides(options, name):
    """How many options but this one are not plain."""
    return sum(options[each] != PLAIN[each] for each in options.keys() - {name})


@cache
def plainest(name, value):
    """The combination with this option that has fewest others."""
    return min(
        (each for each in COMPARED if each[name] == value), key=lambda each: besides(each, name)
    )


@pytest.mark.parametrize("loss_type", OPTIONS["loss_type"])
@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_loss_gradients_and_metrics_are_those_of_trl(loss_type, data, seed):
    of_type = [each for each in COMPARED if each["loss_type"] == loss_type]
    found = unmeant(data.draw(st.sampled_from(of_type)), seed)
    assert largest(found) < TOLERANCE, found


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values]
)
def test_an_option_of_trl_is_felt_and_is_the_same_here(name, value):
    options = plainest(name, value)
    assert max(largest(unmeant(options, seed)) for seed in SEEDS) < TOLERANCE
    if value == PLAIN[name] or name == "batch":
        return
    batches = [make_batch(seed, options["batch"]) for seed in SEEDS]
    without = options | {name: PLAIN[name]}
    gradients = [
        [trl_loss(settings_of(each), batch)[1:3] for each in (options, without)]
        for batch in batches
    ]
    changes = [(x - y).abs().max() for two in gradients for x, y in zip(*two, strict=True)]
    assert max(changes) > FELT


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
def test_so_are_other_numbers(options, numbers):
    options = PLAIN | options
    for seed in SEEDS:
        found = from_trl(settings_of(options) | numbers, make_batch(seed, "ragged"))
        for parts in found.values():
            meant = left_out(options)
            assert all(v < TOLERANCE for part, v in parts.items() if part not in meant), parts


def test_the_constructors_have_trl_s_defaults():
    """Beside these, TRL's CISPO falls back to a cap of 0.2, and its DAPO to an epsilon of 0.2."""
    from trl import GRPOConfig
    from trl.experimental.gmpo import GMPOConfig

    for name in ("grpo", "sapo", "vespo", GMPO):
        config = GMPOConfig if name == GMPO else GRPOConfig
        theirs = {each.name: each.default for each in fields(config)}
        theirs["epsilon_high"] = theirs["epsilon_high"] or theirs["epsilon"]
        ours = getattr(LossConfig, name)()
        for of_trl, here in OBJECTIVES[name].items():
            assert getattr(ours, here) == theirs[of_trl], of_trl


# What is meant to differ


@pytest.mark.parametrize("difference", DIFFERS, ids=lambda each: each.where)
def test_what_is_said_to_differ_does(difference):
    options = PLAIN | difference.example
    assert difference.applies(options)
    seen = {side: set() for side in SIDES}
    for seed in range(100):  # some metrics differ rarely
        found = from_trl(settings_of(options), make_batch(seed, options["batch"]))
        for side, sizes in found.items():
            compared = difference.parts & sizes.keys()
            seen[side] |= {part for part in compared if sizes[part] > FELT}
        if all(parts == compared for parts in seen.values()):
            break
    assert compared
    assert seen == dict.fromkeys(SIDES, compared)


def test_the_token_s_own_ratio_corrects_the_kl_of_a_sequence_level_loss():
    options = PLAIN | {"use_bias_correction_kl": True, "beta": 0.04}
    of_sequence = options | {"importance_sampling_level": "sequence"}
    batch = make_batch(0, "ragged")
    by_token, by_sequence = (trl_loss(settings_of(each), batch) for each in (options, of_sequence))
    for side in SIDES:
        ours = our_loss(side, settings_of(of_sequence), batch)
        assert ours.metrics["kl"] == pytest.approx(by_token.metrics["kl"], abs=TOLERANCE)
        assert abs(ours.metrics["kl"] - by_sequence.metrics["kl"]) > FELT


def test_a_sampler_s_nan_shows_where_trl_gives_the_weight_one():
    options = settings_of(PLAIN | {"vllm_importance_sampling_mode": "token_truncate"})
    batch = make_batch(0, "not scored")
    sampling = batch.sampling_logprob
    scored = replace(batch, sampling_logprob=sampling.where(~sampling.isnan(), batch.old_logprob))
    theirs, repaired = trl_loss(options, batch), trl_loss(options, scored)
    assert theirs.loss == repaired.loss
    for side in SIDES:
        assert math.isnan(our_loss(side, options, batch).loss)
        assert our_loss(side, options, scored).loss == pytest.approx(theirs.loss, abs=TOLERANCE)


def test_gmpo_s_masked_sequence_adds_its_advantage_to_the_loss_of_trl():
    options, batch = settings_of(PLAIN | {"loss_type": GMPO}), make_batch(0, "one sequence masked")
    extra = -batch.advantages[-1].item() / len(batch.mask)
    theirs = trl_loss(options, batch)
    for side in SIDES:
        ours = our_loss(side, options, batch).loss
        assert theirs.loss == pytest.approx(ours + extra, abs=TOLERANCE)


def test_policy_loss_is_the_policy_term_alone():
    bonus = PLAIN | {"entropy_coef": 0.01, "beta": 0.04}
    batch, plain = make_batch(0, "ragged"), settings_of(PLAIN)
    four = settings_of(bonus | {"gradient_accumulation_steps": 4})
    with_kl = trl_loss(settings_of(bonus | {"entropy_coef": 0.0}), batch).loss
    assert trl_loss(four, batch).metrics["policy_loss"] == pytest.approx(with_kl, abs=TOLERANCE)
    for side in SIDES:
        alone = our_loss(side, plain, batch).loss
        ours = our_loss(side, four, batch).metrics["policy_loss"]
        assert ours == pytest.approx(alone / 4, abs=TOLERANCE)


# The oracle, and the page


@pytest.mark.parametrize(
    "body",
    ["return self.some_new_attribute", "return inputs['some_new_input']", "some_new_name"],
)
def test_a_trl_that_has_moved_is_named(monkeypatch, body):
    from trl import GRPOTrainer

    names = {}
    exec(f"def moved(self, model, inputs):\n    {body}", names)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", names["moved"])
    with pytest.raises(TrlHasMoved, match=r"made for TRL 1\.16.*some_new"):
        trl_loss(settings_of(PLAIN), make_batch(0, "ragged"))


def test_statements_of_a_sampler_that_are_not_found_are_missed(monkeypatch):
    monkeypatch.setattr(trl_oracle, "SAMPLER_CONDITION", "self.use_something_else")
    trl_oracle._sampler_statements.cache_clear()
    options = PLAIN | {"vllm_importance_sampling_mode": "token_mask"}
    with pytest.raises(TrlHasMoved, match="use_something_else"):
        trl_loss(settings_of(options), make_batch(0, "ragged"))


def test_the_default_dtype_is_left_as_it_was():
    trl_loss(settings_of(PLAIN), make_batch(0, "ragged"))
    assert torch.get_default_dtype() == torch.float32


def test_the_page_has_a_row_for_every_option_and_no_difference_to_speak_of():
    text = parity.RESULTS.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", text, re.M))
    assert list(rows) == ["all", *parity.option_names()]
    for row in rows.values():
        count, *figures = row.split(" | ")
        assert int(count.replace(",", "")) > 0
        assert len(figures) == len(parity.KINDS)
        assert max(map(float, figures)) < TOLERANCE
    assert int(rows["all"].split(" | ")[0].replace(",", "")) == len(COMPARED)
    assert re.findall(r"^\* \*\*(.+?)\*\* \(", text, re.M) == [each.where for each in DIFFERS]


def test_a_page_is_written_from_what_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "combinations", lambda: COMPARED[::4000])
    monkeypatch.setattr(parity, "EXAMPLES", 1)
    monkeypatch.setattr("sys.argv", ["parity", "--out", str(tmp_path / "page.md")])
    parity.main()
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert f"| `all` | {len(COMPARED[::4000])} |" in text
