"""Options of `pytest benchmarks`, and the harness of a run."""

from pathlib import Path

import pytest

from benchmarks.core import clock
from benchmarks.core.harness import Harness
from benchmarks.core.results import ResultFile
from benchmarks.core.roofline import measure_roofs


def pytest_addoption(parser):
    group = parser.getgroup("grpo_kernels")
    group.addoption("--quick", action="store_true", help="every case once, tiny and unclocked")
    group.addoption("--results", type=Path, metavar="FILE", help="write a result file, as JSON")


@pytest.fixture(scope="session")
def harness(pytestconfig):
    quick, device = pytestconfig.getoption("quick"), clock.default_device()
    roofs = {} if quick else measure_roofs(device)
    results = ResultFile(pytestconfig.getoption("results"), device, roofs)
    return Harness(device, results, quick=quick)
