"""Options of `pytest benchmarks`, and the one harness of a run."""

from pathlib import Path

import pytest

from benchmarks.core import clock
from benchmarks.core import roofline as roofs
from benchmarks.core.case import cases
from benchmarks.core.harness import Harness
from benchmarks.core.results import ResultFile


def pytest_addoption(parser):
    group = parser.getgroup("grpo_kernels")
    group.addoption("--quick", action="store_true", help="every case once, tiny and unclocked")
    group.addoption("--results", type=Path, metavar="FILE", help="write a result file, as JSON")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        quick = metafunc.config.getoption("quick")
        found = cases(metafunc.module.LEVEL, clock.device(), quick=quick)
        metafunc.parametrize("case", found, ids=str)


@pytest.fixture(scope="session")
def harness(pytestconfig):
    quick, device = pytestconfig.getoption("quick"), clock.device()
    found = {} if quick else roofs.all_roofs(device)
    results = ResultFile(pytestconfig.getoption("results"), device, found)
    return Harness(device, results, quick=quick)
