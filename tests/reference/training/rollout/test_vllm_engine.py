"""The engine sampler where vLLM is not installed; tests/vllm runs it with a real one."""

import importlib.util
import sys

import pytest

from reference.training.config import SamplingSettings, TrainConfig
from reference.training.errors import UserError
from reference.training.rollout.samplers import pick_sampler


def test_missing_vllm_raises_user_error_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r'vllm: pip install -e "\.\[train,vllm\]"'):
        pick_sampler(SamplingSettings(sampler="vllm"))


def test_options_are_parsed_before_a_model_is_loaded():
    with pytest.raises(UserError, match="--vllm-options must be name=value; got eager"):
        pick_sampler(SamplingSettings(sampler="vllm", vllm_options=("eager",)))


def test_engine_has_one_device(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if it were installed
    with pytest.raises(UserError, match="--vllm-options tensor_parallel_size=2: the engine of"):
        pick_sampler(SamplingSettings(sampler="vllm", vllm_options=("tensor_parallel_size=2",)))


@pytest.mark.parametrize("flags", [{"vllm_memory": 0.5}, {"vllm_options": ("a=1",)}])
def test_settings_of_the_engine_need_it(flags):
    with pytest.raises(UserError, match="concern the engine of --sampler vllm"):
        TrainConfig(**flags)
    TrainConfig(sampler="vllm", **flags)


def test_memory_is_a_share():
    with pytest.raises(UserError, match="--vllm-memory must be above 0 and below 1; got 8"):
        TrainConfig(sampler="vllm", vllm_memory=8.0)
