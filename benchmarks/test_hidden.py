"""linear_token_stats and linear_grpo_loss from hidden states, beside the reference and the peers.

pytest benchmarks/test_hidden.py             clocks
pytest benchmarks/test_hidden.py --quick     every case once, tiny
"""

import pytest

from benchmarks.core import clock

LEVEL = "hidden"


@pytest.mark.benchmark(timer=clock.now)
def test_hidden(case, harness, request):
    harness.measure(case, request)
