"""How many programs loop over rows that they read twice."""

import pytest

from grpo_kernels.backends.triton.launch_configs import L2_SHARE, looping_programs

MIB = 1 << 20


@pytest.mark.parametrize(
    ("V", "itemsize", "multiprocessors", "l2_bytes", "expected"),
    [
        (128_256, 2, 132, 50 * MIB, 132),  # H100: a row for each multiprocessor fits
        (128_256, 4, 132, 50 * MIB, 71),
        (151_936, 2, 132, 50 * MIB, 120),
        (128_256, 4, 148, 126 * MIB, 148),  # B200
        (128_256, 4, 108, 40 * MIB, 57),  # A100
        (262_144, 4, 132, 50 * MIB, 132),  # 35 rows would leave too few loads in flight
        (128_256, 4, 304, 4 * MIB, 304),
        (37, 4, 2, 0, 2),  # not known
    ],
)
def test_programs_that_have_their_rows_in_the_l2(V, itemsize, multiprocessors, l2_bytes, expected):
    row_bytes = V * itemsize
    programs = looping_programs(row_bytes, multiprocessors, l2_bytes)
    assert programs == expected
    if programs < multiprocessors:
        assert programs * row_bytes <= L2_SHARE * l2_bytes < (programs + 1) * row_bytes
