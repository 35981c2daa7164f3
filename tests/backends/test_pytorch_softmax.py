"""The PyTorch backend's exp2 and buffers: results do not depend on neighbours or threads."""

import threading

import pytest
import torch

from grpo_kernels import token_stats
from grpo_kernels.backends.pytorch.softmax import MIN_SHARE, SHARE_UNIT, exp2, largest_id
from tests.helpers.tensors import normal


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("V", [4095, 4096, 49_152, 49_155, 128_256, 151_936])
def test_exp2_is_bit_identical_in_every_block(V, threads):
    rows = normal(0, 12, V) * 5
    alone = [exp2(row[None], torch.empty(1, V))[0] for row in rows]
    for n in (2, 3, 5, 12):
        block = exp2(rows[:n], torch.empty(n, V))
        assert all(map(torch.equal, block, alone)), n
    scale = alone[0].double()
    assert ((scale - torch.exp2(rows[0].double())) / scale).abs().max() < 1e-6


def test_exp2_of_aligned_rows_is_one_call(threads, monkeypatch):
    """Otherwise the test above would not reach the fast path."""
    V, calls = 128_256 // (SHARE_UNIT * threads) * SHARE_UNIT * threads, []
    one = torch.exp2
    monkeypatch.setattr(torch, "exp2", lambda *x, **out: calls.append(x) or one(*x, **out))
    n = MIN_SHARE * threads // V + 2
    exp2(torch.zeros(n, V), torch.empty(n, V))
    assert len(calls) == 1


def test_buffers_from_inference_mode_can_be_written_later(pytorch_backend):
    """Old log-probs first, then training, in a new thread."""
    logits, tokens, failures = normal(1, 1, 3, 50), torch.zeros(1, 3).long(), []

    def work():
        try:
            with torch.inference_mode():
                inside = token_stats(logits, tokens).logprob
            leaf = logits.clone().requires_grad_()
            outside = token_stats(leaf, tokens).logprob
            outside.sum().backward()
            assert torch.equal(inside, outside) and leaf.grad.isfinite().all()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


@pytest.mark.parametrize("V", [5, 511, 512, 768, 1000])
def test_largest_id_is_that_of_argmax(V):
    """Also of ties within and across runs, of NaN, and of -inf alone; one id wherever it lies."""
    rows = normal(1, V + 3, V)
    rows[torch.arange(V), torch.arange(V)] = 9.0
    rows[V] = (rows[V] * 0.7).round()
    rows[V + 1, [V - 1, V // 2]] = torch.nan
    rows[V + 2] = -torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        logits = rows.to(dtype)
        assert torch.equal(largest_id(logits)[:, 0], logits.argmax(-1))
