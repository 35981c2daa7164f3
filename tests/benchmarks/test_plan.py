"""The printed plan of the hidden level, and what it promises."""

import pytest

from benchmarks import plan
from grpo_kernels.lm_head.device_rates import DEVICES, H100


def total(name, N, *, is_old=False):
    rates = None if is_old else H100
    return 1e3 * plan.predict_operator(name, N, H100, rates)[1].total


def test_readme_shows_the_plan():
    assert plan.README.read_text(encoding="utf-8") == plan.readme(), "run benchmarks.plan --write"


@pytest.mark.parametrize("name", plan.OPERATORS)
def test_new_plan_is_predicted_faster_than_the_old_one(name):
    for N in plan.TOKENS:
        assert total(name, N) < total(name, N, is_old=True)


def test_loss_on_an_h100():
    """Four milliseconds less than with one chunk size of 1 GiB, and above the bare products."""
    products = 1e3 * 3 * 2 * 8192 * plan.V * plan.H / H100.matmul_rate
    new, old = total("A: loss", 8192), total("A: loss", 8192, is_old=True)
    assert products < new < old - 4


def test_each_device_and_operator_has_a_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks.plan"])
    plan.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum("predicted milliseconds, not measured" in line for line in lines) == len(DEVICES)
    for name in plan.OPERATORS:
        assert sum(line.startswith(f"| {name} |") for line in lines) == 2 * len(DEVICES)
