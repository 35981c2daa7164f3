"""token_stats, the KLs and grpo_loss on logits, beside the reference and the peers.

pytest benchmarks/test_logits.py             clocks
pytest benchmarks/test_logits.py --quick     every case once, tiny
"""

import pytest

from benchmarks.core import clock

LEVEL = "logits"


@pytest.mark.benchmark(timer=clock.now)
def test_logits(case, harness, request):
    harness.measure(case, request)
