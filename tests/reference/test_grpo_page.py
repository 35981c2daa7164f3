"""reference/grpo.py, with a small random model and rewards that it can earn."""

import pytest
import torch

from reference import grpo
from reference import losses as plain
from tests.helpers.model_directories import save_family


@pytest.fixture
def page(tmp_path, monkeypatch, pytorch_backend):
    settings = {
        "MODEL": str(save_family(tmp_path / "model", "Llama")),
        "STEPS": 12,
        "PROMPTS": 2,
        "MAX_NEW_TOKENS": 6,
        "LEARNING_RATE": 0.01,
        "reward": lambda completion, answer: sum(map(str.isalnum, completion)) / 6,
    }
    for name, value in settings.items():
        monkeypatch.setattr(grpo, name, value)
    return grpo


def test_reward_rises(page, capsys):
    rewards = page.main()
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.6
    lines = capsys.readouterr().out.strip().split("\n")
    assert len(lines) == 12 and lines[0].startswith("step  1  reward ")


def test_plain_pytorch_gives_the_same_run(page, monkeypatch):
    monkeypatch.setattr(page, "STEPS", 2)
    fused = page.main()
    monkeypatch.setattr(page, "losses", plain)
    assert page.main() == fused


def test_rewards_of_the_dummy_data():
    torch.manual_seed(0)
    questions, answers = grpo.make_questions(3)
    for question, answer in zip(questions, answers, strict=True):
        a, b = (int(word.rstrip("?")) for word in question.split() if word.rstrip("?").isdigit())
        assert int(answer) == a + b
    assert grpo.reward("7", "7") == grpo.reward(" 7. ", "7") == 1.0
    assert grpo.reward("3 + 4 = 7", "7") == 0.5
    assert grpo.reward("17", "7") == grpo.reward("", "7") == 0.0
