"""Rates of GPUs, from which the chunk sizes are planned. None is measured here.

Bandwidths, clocks, multiprocessors and caches are the vendors' figures. The matmul rate is the part
of the vendor's dense bf16 peak that large products reach: 800 of the H100's 989 TFLOP/s, the rate
that this project's targets assume, and for the others about what is published of their libraries
(A100 80%, B200 75%, MI300X 50%). A plan needs the ratio of the rates more than the rates.
"""

from functools import cache
from typing import NamedTuple

import torch

MEMORY_EFFICIENCY = 0.9  # of the peak bandwidth, as published for kernels that only move bytes
PORT_BYTES = 64  # that a multiprocessor exchanges with the L2 in a clock
GB, MIB = 10**9, 1 << 20


class DeviceRates(NamedTuple):
    """What a GPU multiplies and moves per second, and what it holds."""

    name: str
    bandwidth: float  # bytes/s, peak
    matmul_rate: float  # FLOP/s of large bf16 products
    multiprocessors: int
    clock: float  # Hz
    l2_bytes: int
    memory: int  # bytes

    @property
    def reached_bandwidth(self) -> float:
        """Bytes/s from and to the memory."""
        return MEMORY_EFFICIENCY * self.bandwidth

    @property
    def port_rate(self) -> float:
        """Bytes/s between all multiprocessors and the L2."""
        return PORT_BYTES * self.multiprocessors * self.clock


A100 = DeviceRates("A100", 2.039e12, 250e12, 108, 1.41e9, 40 * MIB, 80 * GB)
H100 = DeviceRates("H100", 3.35e12, 800e12, 132, 1.755e9, 50 * MIB, 80 * GB)
H200 = DeviceRates("H200", 4.8e12, 800e12, 132, 1.755e9, 50 * MIB, 141 * GB)
B200 = DeviceRates("B200", 8.0e12, 1700e12, 148, 1.85e9, 126 * MIB, 180 * GB)
# Its cache is the one beside the memory, which all dies share.
MI300X = DeviceRates("MI300X", 5.3e12, 650e12, 304, 2.1e9, 256 * MIB, 192 * GB)

DEVICES = (A100, H100, H200, B200, MI300X)


def rates_of(
    name: str, capability: tuple[int, int], multiprocessors: int, memory: int
) -> DeviceRates:
    """Find a GPU by its name; an unknown one has the rates of the nearest older design.

    Both rates are scaled with the multiprocessors that it has: a part of a GPU (MIG) and a smaller
    model of it have fewer.
    """
    known = [device for device in DEVICES if device.name in name]
    nearest = known[-1] if known else H100 if capability >= (9, 0) else A100
    part = multiprocessors / nearest.multiprocessors
    return nearest._replace(
        name=nearest.name if known else name,
        bandwidth=min(1.0, part) * nearest.bandwidth,
        matmul_rate=part * nearest.matmul_rate,
        multiprocessors=multiprocessors,
        memory=memory,
    )


@cache
def device_rates(device: torch.device) -> DeviceRates | None:
    """Return the rates of a GPU; None for any other device, whose plan needs none."""
    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_properties(device)
    capability = gpu.major, gpu.minor
    return rates_of(gpu.name, capability, gpu.multi_processor_count, gpu.total_memory)
