"""Rows that start anywhere in memory: the same bits, and nothing beside them is used or changed."""

import functools

import pytest
import torch

from grpo_kernels import LossConfig, backends
from grpo_kernels.backends import RowInputs, StatsRequest
from grpo_kernels.backends.interface import accumulation_dtype
from grpo_kernels.backends.triton.launch_configs import ACCESS_BYTES
from grpo_kernels.objective.ratios import LossInputs
from grpo_kernels.objective.token_gradients import TokenGrads
from tests.helpers.tensors import assert_same_bits, make_case, normal

CONFIG = LossConfig(beta=0.1, entropy_coef=0.01)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Rows:
    """Rows [1, N, V] in a buffer of NaN, the first one `offset` entries behind 16 bytes."""

    def __init__(self, values, offset=0, stride=None):
        _, N, V = values.shape
        stride, before = stride or V, ACCESS_BYTES // values.element_size()
        self.buffer = values.new_full((2 * before + offset + N * stride,), torch.nan)
        assert self.buffer.data_ptr() % ACCESS_BYTES == 0
        view = values.shape, (N * stride, stride, 1), before + offset
        self.rows = self.buffer.as_strided(*view)
        self.rows.copy_(values)
        self.is_beside = torch.ones_like(self.buffer, dtype=torch.bool)
        self.is_beside.as_strided(*view).fill_(False)

    def check_beside(self):
        assert self.buffer[self.is_beside].isnan().all()


def check_addresses(monkeypatch, lowest=0, highest=0):
    """Fail where a GPU would: entries must lie at multiples of their size, vectors of theirs.

    Addresses in [lowest, highest) must not be read.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self, pointers, mask, *arguments):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[mask.data]
        assert (addresses % max(size, 1) == 0).all()
        assert not ((addresses >= lowest) & (addresses < highest)).any()
        return load(self, pointers, mask, *arguments)

    def checked_store(self, pointers, values, mask, *arguments):
        if pointers.data.ndim == 3:  # [UNROLL, LANES, VEC]
            vector = pointers.get_element_ty().primitive_bitwidth // 8 * pointers.data.shape[2]
            assert (mask.data == mask.data[..., :1]).all()
            assert (pointers.data[..., 0][mask.data[..., 0]] % vector == 0).all()
        return store(self, pointers, values, mask, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)


def all_results(launchers, tokens, rows, ref_rows, gradient_rows):
    """Results of every function of rows.

    gradient_rows(): the Rows that a gradient is computed from, and those that it is written to.
    """
    x, y = rows.rows, ref_rows.rows
    dtype = accumulation_dtype(x.dtype)
    a, b, c, d, e = (normal(i, *tokens.shape, dtype=dtype, device=x.device) for i in range(5))
    mask = torch.arange(tokens.numel(), device=x.device)[None] != 1  # one gradient is zeros
    inputs = RowInputs(x, tokens, b.exp(), mask, y, None, "reverse")
    stats = launchers.token_stats_forward(inputs, StatsRequest(True, True, True, True, 2))
    kl = launchers.approximate_kl_forward(x, y, mask, -20.0)
    jsd, kl_policy = launchers.jsd_forward(inputs, stats, 0.3)
    found = stats._asdict() | {"total": kl.total, "weight_sum": kl.weight_sum}
    found |= {"jsd": jsd, "kl_policy": kl_policy}

    def add_gradient(name, function):
        source, result = gradient_rows()
        function(inputs._replace(logits=source.rows), result.rows)
        found[f"{name} gradient"] = result.rows.clone()
        result.check_beside()

    def one_launch(inputs, d_logits):
        loss_inputs = LossInputs(a, mask * d.abs(), c[0, 0], a, b, None)
        inputs = inputs._replace(ref_logits=None, kl=None)
        found["logprob of one launch"], _ = launchers.grpo_loss(
            inputs, loss_inputs, CONFIG, d_logits
        )

    grads = TokenGrads(a, b, c, d, e)
    add_gradient("stats", lambda rows, out: launchers.token_stats_backward(rows, stats, grads, out))
    add_gradient("one launch", one_launch)
    add_gradient(
        "approximate KL",
        lambda rows, out: launchers.approximate_kl_backward(
            rows.logits, y, mask, kl, a, -20.0, out
        ),
    )
    add_gradient(
        "jsd",
        lambda rows, out: launchers.jsd_backward(rows, stats, kl_policy, a, 0.3, out),
    )
    add_gradient("scaled", lambda _, out: launchers.scale_(out.copy_(x), c[0, 0]))
    return {name: result for name, result in found.items() if result is not None}


@pytest.mark.parametrize(
    ("dtype", "V", "split"),
    [
        (BF16, 2, False),  # less than a vector
        (BF16, 147, False),
        (BF16, 147, True),
        (FP16, 147, False),
        (FP32, 147, True),
        (FP64, 147, False),
    ],
)
def test_bits_do_not_depend_on_addresses(monkeypatch, device, dtype, V, split):
    """A gradient goes to rows that start elsewhere, or at the same place, or to the logits."""
    launchers = pytest.importorskip("grpo_kernels.backends.triton.launchers")
    if device == "cpu" and not backends.INTERPRETED:
        pytest.skip("on the CPU the kernels need Triton's interpreter, which a GPU turns off")
    monkeypatch.setattr(launchers, "ROWS_PER_MULTIPROCESSOR", 1000 if split else 0)
    if backends.INTERPRETED:
        check_addresses(monkeypatch)
    V *= 1 if device == "cpu" else 99  # several parts
    x, tokens = make_case(1, 1, 2, V, dtype=dtype, device=device)
    x[0, 0, : V // 2] = -torch.inf
    y = normal(2, 1, 2, V, dtype=dtype, device=device)
    aligned = functools.partial(Rows, stride=V + -V % ACCESS_BYTES)
    run = functools.partial(all_results, launchers, tokens)
    expected = run(aligned(x), aligned(y), lambda: (aligned(x), aligned(y)))
    for offset in range(ACCESS_BYTES // x.element_size()):
        rows = Rows(x, offset)

        def gradient_rows(offset=offset, rows=rows):
            if offset % 3 == 0:
                return rows, Rows(y, offset + 1)
            if offset % 3 == 1:
                return rows, Rows(y, offset)
            rows = Rows(x, offset)
            return rows, rows

        actual = run(rows, Rows(y, offset // 2), gradient_rows)
        assert_same_bits(actual, expected)
        rows.check_beside()


@pytest.mark.skipif(not backends.INTERPRETED, reason="the interpreter shows every address")
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_one_launch_reads_nothing_before_its_row(monkeypatch, dtype):
    """Another program may be overwriting the row before."""
    from grpo_kernels.backends.triton import launchers

    x, tokens = make_case(1, 1, 1, 147, dtype=dtype, device="cpu")
    for offset in range(ACCESS_BYTES // x.element_size()):
        rows = Rows(x, offset)
        begin = rows.rows.data_ptr()
        one = torch.ones(tokens.shape)
        with monkeypatch.context() as patch:
            check_addresses(patch, rows.buffer.data_ptr(), begin)
            launchers.grpo_loss(
                RowInputs(rows.rows, tokens, one, None, None, None, None),
                LossInputs(one, one, one[0, 0], one, one, None),
                CONFIG,
                rows.rows,
            )
        assert rows.rows.isfinite().all()


def test_alignment_of_rows():
    launchers = pytest.importorskip("grpo_kernels.backends.triton.launchers")
    launch = launchers.RowLaunch(unroll=1, lanes=32, vector=8)
    x = torch.zeros(3, 2, 16, dtype=torch.bfloat16)
    buffer = torch.zeros(200, dtype=torch.bfloat16)
    odd = buffer[:90].view(3, 2, 15)
    assert launchers._alignment(launch, x, None, x[:, 1:]) == "vector"
    assert launchers._alignment(launch, x, x.float()) == "vector"
    assert launchers._alignment(launch, x[..., 1:]) == "equal"
    assert launchers._alignment(launch, odd, torch.zeros_like(odd)) == "equal"
    assert launchers._alignment(launch, odd, buffer[8:98].view(3, 2, 15)) == "equal"
    assert launchers._alignment(launch, odd, buffer[1:91].view(3, 2, 15)) == "any"
    assert launchers._alignment(launch, odd, x) == "any"
    # The lengths B and T do not count: a new batch would compile again.
    assert launchers._alignment(launch, odd[:1, :1]) == "equal"
