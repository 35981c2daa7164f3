"""Our policy losses and advantages inside the real verl equal its own, where nothing says why not.

Without verl these tests are skipped.
"""

import runpy

import pytest

from benchmarks.verl_parity import estimators, losses, page, rejection

pytest.importorskip("verl", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")  # verl's own, when it is imported


@pytest.mark.parametrize("mode", losses.MODES)
@pytest.mark.parametrize("name", losses.NAMES)
def test_losses_equal_verls(name, mode):
    count, largest = losses.largest_differences(name, mode)
    assert count >= 16
    # verl adds 1e-8 to denominators.
    assert max(largest.values()) <= 2e-8


@pytest.mark.parametrize("groups", estimators.GROUPS)
@pytest.mark.parametrize("name", estimators.NAMES)
def test_advantages_equal_verls(name, groups):
    # verl adds 1e-6 to the standard deviation, 0.1 and more here.
    limit = 2e-5 if name == "group" else 1e-7
    assert estimators.largest_difference(name, estimators.GROUPS[groups]) <= limit


@pytest.mark.parametrize(("rollout_rs", "threshold"), rejection.RULES)
def test_rejection_equals_verls(rollout_rs, threshold):
    tokens, kept, different = rejection.kept_tokens(rollout_rs, threshold)
    assert 0.2 * tokens < kept < 0.8 * tokens and different == 0


def test_page_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "SEEDS", range(1))
    monkeypatch.setattr("sys.argv", ["verl_parity", "--out", str(tmp_path / "page.md")])
    runpy.run_module("benchmarks.verl_parity", run_name="__main__")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text.startswith(page.TEMPLATE.split("\n")[0])
    assert "not a number" not in text and text.count("\n| `") == 78
