"""Memory does not grow over 10,000 calls."""

import gc

import psutil
import pytest
import torch

from tests.helpers.every_op import NUM_OPS, run_every_op

CALLS, WARM_UP = 10_000, 500
MIB = 1 << 20


def count_tensors():
    gc.collect()
    return sum(issubclass(type(obj), torch.Tensor) for obj in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pytorch"], indirect=True)
def test_process_memory_is_steady(backend):
    process = psutil.Process()
    for seed in range(WARM_UP // NUM_OPS):
        run_every_op(seed % 7)
    num_tensors, resident = count_tensors(), process.memory_info().rss
    for seed in range(CALLS // NUM_OPS):
        run_every_op(seed % 7)
    assert count_tensors() <= num_tensors  # fewer: garbage of an earlier test
    assert process.memory_info().rss - resident < 16 * MIB  # 1 KiB leaked per call would be 10 MiB


@pytest.mark.gpu
def test_device_memory_is_steady():
    for seed in range(WARM_UP // NUM_OPS):
        run_every_op(seed % 7, "cuda")
    allocated = torch.cuda.memory_allocated()
    for seed in range(CALLS // NUM_OPS):
        run_every_op(seed % 7, "cuda")
    assert torch.cuda.memory_allocated() == allocated
