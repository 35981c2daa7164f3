"""10,000 calls hold no more memory than the first few did."""

import gc

import psutil
import pytest
import torch

from tests.ops.test_threads import work

CALLS, WARM_UP = 10_000, 500
OPERATORS = 3  # that each `work` calls
MIB = 1 << 20


def tensors():
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pytorch"], indirect=True)
def test_memory_of_the_process_is_steady(backend):
    process = psutil.Process()
    for seed in range(WARM_UP // OPERATORS):
        work(seed % 7)
    held, resident = tensors(), process.memory_info().rss
    for seed in range(CALLS // OPERATORS):
        work(seed % 7)
    assert tensors() == held
    assert process.memory_info().rss - resident < 16 * MIB  # a kept tensor of 1 KiB a call is 10


@pytest.mark.gpu
def test_memory_of_the_device_is_steady():
    for seed in range(WARM_UP // OPERATORS):
        work(seed % 7, "cuda")
    held = torch.cuda.memory_allocated()
    for seed in range(CALLS // OPERATORS):
        work(seed % 7, "cuda")
    assert torch.cuda.memory_allocated() == held
