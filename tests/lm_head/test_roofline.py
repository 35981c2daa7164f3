"""The predicted time of the hidden level, against sums by hand."""

import pytest

from grpo_kernels.lm_head.device_rates import B200, DEVICES, H100
from grpo_kernels.lm_head.roofline import ChunkSizes, HeadWork, predict, product_seconds

V, H = 128_256, 2048
BF16, FP32 = 2, 4


def test_a_product_that_fills_all_waves_takes_its_operations():
    rows, columns, K = 128 * 12, 256 * 11, 1 << 16  # 132 tiles
    seconds = product_seconds(H100, rows, columns, K, BF16, 0)
    assert seconds == pytest.approx(2 * rows * columns * K / H100.matmul_rate)
    results = rows * columns * 4 / (64 * 132 * 1.755e9)
    written = product_seconds(H100, rows, columns, K, BF16, 4)
    assert written == pytest.approx(seconds + results)


def test_a_wave_that_is_not_full_takes_as_long_as_a_full_one():
    one, nearly_two, two = (
        product_seconds(H100, 256 * 12, 256 * columns, 1 << 16, BF16, 0) for columns in (5, 10, 11)
    )
    assert two == nearly_two == pytest.approx(2 * one)


def test_a_product_of_few_rows_takes_as_long_as_reading_the_weight():
    seconds = product_seconds(H100, 16, V, H, BF16, 0)
    moved = BF16 * H * (16 + V)
    assert seconds == pytest.approx(moved / (0.9 * 3.35e12))


@pytest.mark.parametrize("rates", DEVICES, ids=lambda rates: rates.name)
def test_no_product_is_faster_than_the_rate(rates):
    for M in (1, 100, 1280, 8192):
        floor = 2 * M * V * H / rates.matmul_rate
        for shape in ((M, V, H), (M, H, V), (V, H, M)):
            assert product_seconds(rates, *shape, BF16, 4) > floor
            assert product_seconds(rates, *shape, FP32, 4) > 4 * floor


def test_fewer_weight_chunks_move_less():
    """Each product after the first reads and writes the sum."""
    work = HeadWork(8192, V, H, BF16, weight_grad=True, hidden_grad=True)
    few, many = (predict(work, ChunkSizes(1024, size), H100) for size in (8192, 1024))
    port = V * H * 4 / (64 * 132 * 1.755e9)
    assert few.d_weight_traffic == pytest.approx(port)
    assert many.d_weight_traffic == pytest.approx((1 + 2 * 7) * port)
    assert few.logits == many.logits and few.rows == many.rows == 0
    assert few.gaps < many.gaps


def test_rows_are_read_twice_where_they_do_not_fit_the_cache():
    work = HeadWork(8192, V, H, BF16, row_bytes=6, row_again=4)
    sizes = ChunkSizes(2048, 2048)
    for rates, entries, moved in (
        (B200, V, 6), (H100, V, 6), (H100, 151_936, 6), (H100, 32_000, 6), (H100, 4 * V, 10),
    ):  # fmt: skip
        rows = predict(work._replace(V=entries), sizes, rates).rows
        assert rows == pytest.approx(moved * 8192 * entries / (0.9 * rates.bandwidth))


def test_parts_without_work_take_no_time():
    forward = predict(HeadWork(8192, V, H, BF16), ChunkSizes(2048, 2048), H100)
    assert forward.d_hidden == forward.d_weight == forward.d_weight_traffic == 0
    assert forward.total == sum(forward) > 0
    empty = HeadWork(0, V, H, BF16, row_bytes=4, hidden_grad=True)
    assert predict(empty, ChunkSizes(1, 1), H100).total == 0
