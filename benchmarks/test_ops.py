"""Every function from logits and from hidden states, beside the reference and the peers.

pytest benchmarks/test_ops.py                 clocked
pytest benchmarks/test_ops.py::test_hidden    one level
pytest benchmarks/test_ops.py --quick         every case once, tiny
"""

import pytest

from benchmarks.core import clock
from benchmarks.core.case import cases


def pytest_generate_tests(metafunc):
    level = metafunc.function.__name__.removeprefix("test_")
    quick = metafunc.config.getoption("quick")
    found = list(cases(level, clock.default_device(), quick=quick))
    metafunc.parametrize("case", found, ids=str)


@pytest.mark.benchmark(timer=clock.now)
def test_logits(case, harness, request):
    harness.measure(case, request)


@pytest.mark.benchmark(timer=clock.now)
def test_hidden(case, harness, request):
    harness.measure(case, request)
