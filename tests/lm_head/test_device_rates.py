"""The rates of a GPU, found by its name."""

import pytest
import torch

from grpo_kernels.lm_head.device_rates import A100, DEVICES, GB, H100, device_rates, rates_of


@pytest.mark.parametrize(
    ("name", "capability", "multiprocessors", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), 108, "A100"),
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, "H100"),
        ("NVIDIA H200", (9, 0), 132, "H200"),
        ("NVIDIA B200", (10, 0), 148, "B200"),
        ("AMD Instinct MI300X", (9, 4), 304, "MI300X"),
    ],
)
def test_known_devices_are_found_by_name(name, capability, multiprocessors, expected):
    (device,) = (device for device in DEVICES if device.name == expected)
    assert rates_of(name, capability, multiprocessors, device.memory) == device


def test_a_part_of_a_gpu_has_a_part_of_its_rates():
    rates = rates_of("NVIDIA H100 80GB HBM3 MIG 3g.40gb", (9, 0), 66, 40 * GB)
    assert rates.matmul_rate == H100.matmul_rate / 2 and rates.bandwidth == H100.bandwidth / 2
    assert (rates.multiprocessors, rates.memory) == (66, 40 * GB)


@pytest.mark.parametrize(("capability", "like"), [((8, 9), A100), ((9, 0), H100), ((12, 0), H100)])
def test_an_unknown_device_is_planned_as_an_older_one(capability, like):
    rates = rates_of("NVIDIA Unheard-of 1", capability, 2 * like.multiprocessors, 24 * GB)
    assert rates.matmul_rate == 2 * like.matmul_rate and rates.bandwidth == like.bandwidth
    assert (rates.name, rates.memory) == ("NVIDIA Unheard-of 1", 24 * GB)


def test_only_a_gpu_has_rates():
    assert device_rates(torch.device("cpu")) is None
