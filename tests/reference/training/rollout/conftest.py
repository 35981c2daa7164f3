"""A server for the sampler and what it is made of."""

import pytest

from reference.training.rollout import server
from tests.helpers.vllm_emulator import emulate


@pytest.fixture
def emulator(monkeypatch):
    monkeypatch.setattr(server, "BACK_OFF_S", 0.001)
    monkeypatch.setattr(server, "RETRY_S", 0.1)
    with emulate() as emulated:
        yield emulated
