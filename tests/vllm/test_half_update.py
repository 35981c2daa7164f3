"""A vLLM engine that takes over all weights but some stops the run, which names them."""

import pytest

from reference import train
from reference.training.rollout import vllm_engine
from tests.helpers.vllm import needs_vllm, save_tied_llama

pytestmark = needs_vllm

FLAGS = ("--sampler", "vllm", "--vllm-memory", "0.02", "--steps", "3", "--prompts", "2")
FLAGS += ("--group-size", "4", "--learning-rate", "1e-3", "--warmup-steps", "0")
FLAGS += ("--eval-questions", "4", "--loss-impl", "reference", "--no-tensorboard")
FLAGS += (
    "--entropy-coef",
    "0.01",
)  # every group has a gradient


@pytest.mark.parametrize(
    ("left_old", "named", "flags", "when"),
    [
        ("lm_head", "the tied LM head (lm_head)", (), "step 2"),
        ("layers.1.", "model.layers.1", ("--async-rollout",), "before step 2"),
    ],
)
def test_half_update_stops_the_run(tmp_path, monkeypatch, capsys, left_old, named, flags, when):
    whole, syncs = vllm_engine.synced_weights, []

    def half(policy):
        syncs.append(None)
        is_first = len(syncs) == 1
        return (pair for pair in whole(policy) if is_first or left_old not in pair[0])

    monkeypatch.setattr(vllm_engine, "synced_weights", half)
    model = save_tied_llama(tmp_path / "llama")
    command = [*FLAGS, "--model", str(model), "--output-dir", str(tmp_path / "run"), *flags]
    assert train.main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {when}: the log-probs of the sampler differ")
    assert f"These look old: {named}; without the last update" in error
