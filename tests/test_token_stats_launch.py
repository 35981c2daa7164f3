"""How token_stats is launched: offsets, memory, what may recompile, and the launch table."""

import inspect

import pytest
import torch
from cases import check_against_oracle, exact_results, make_case, normal, results, upstream_like
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import rows, token_stats
from grpo_kernels.eager import token_stats as eager
from grpo_kernels.launch import ACCESS_BYTES, TABLE, pick_row_launch

KERNELS = sorted({entry.kernel for entry in TABLE})


class LargestAllocation(TorchDispatchMode):
    """The bytes of the largest tensor made while it is active; views of `known` are not made."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if not isinstance(each, torch.Tensor):
                continue
            storage = each.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.nbytes = max(self.nbytes, storage.nbytes())
        return made


def test_eager_temporaries_do_not_grow_with_the_tokens(monkeypatch):
    """The room's functions on 400 rows in blocks of 16: no temporary is larger than a block."""
    monkeypatch.setattr(eager, "BLOCK_BYTES", 1 << 16)
    logits, tokens = make_case(1, 4, 100, 1024)
    ref_logits = normal(2, 4, 100, 1024)
    d_logits = torch.empty_like(logits)
    temperature = torch.ones(4, 100)
    ones = torch.ones(4, 100)
    with LargestAllocation(logits, ref_logits, d_logits) as largest:
        _, entropy, kl, normaliser, ref_normaliser = eager.token_stats_forward(
            logits, tokens, temperature, None, ref_logits, 30.0, True, "reverse"
        )
        eager.token_stats_backward(
            logits, tokens, temperature, None, ref_logits, normaliser, ref_normaliser,
            entropy, kl, ones, ones, ones, 30.0, "reverse", d_logits,
        )  # fmt: skip
    exact = exact_results(
        logits,
        tokens,
        {"logprob": ones, "entropy": ones, "kl": ones},
        softcap=30.0,
        kl="reverse",
        ref_logits=ref_logits,
    )
    torch.testing.assert_close(d_logits.double(), exact["d_logits"], rtol=1e-5, atol=1e-5)
    assert 0 < largest.nbytes <= 1 << 16


def test_strided_rows_and_references_are_not_copied_on_the_way_to_the_room(room):
    wide = normal(1, 3, 11, 500)
    logits, tokens = wide[:, :-1].requires_grad_(), torch.zeros(3, 10, dtype=torch.int64)
    ref_logits = normal(2, 3, 11, 500)[:, 1:]
    with LargestAllocation(wide, ref_logits) as largest:
        stats = token_stats(logits, tokens, kl="forward", ref_logits=ref_logits)
    assert largest.nbytes <= 30 * 2 * 8, "something larger than the rows' scalars was made"
    exact = exact_results(logits, tokens, {}, kl="forward", ref_logits=ref_logits)
    torch.testing.assert_close(stats.kl.detach().double(), exact["kl"], rtol=1e-5, atol=1e-5)


def test_offsets_of_rows_pass_2_to_the_31(room):
    """Three rows 2^30 entries apart; of the 4 GiB between them no page is ever touched."""
    V = 40
    stride = 2**30
    memory = torch.empty(2 * stride + V, dtype=torch.float16)
    logits = memory.as_strided((1, 3, V), (3 * stride, stride, 1))
    logits.copy_(normal(1, 1, 3, V, dtype=torch.float16, std=3.0))
    tokens = torch.tensor([[1, 20, 39]])
    check_against_oracle(logits, tokens, upstream_like(5, tokens))


@pytest.mark.gpu
def test_a_tensor_of_more_than_2_to_the_31_entries():
    N, V = 17_000, 128_256
    logits = torch.randn(N, V, device="cuda", dtype=torch.bfloat16)
    tokens = torch.randint(0, V, (N,), device="cuda")
    logits.requires_grad_()
    stats = token_stats(logits, tokens)
    (gradient,) = torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), logits)
    last = results(
        token_stats,
        logits[-2:],
        tokens[-2:],
        {"logprob": torch.ones(2, device="cuda"), "entropy": torch.ones(2, device="cuda")},
    )
    assert torch.equal(stats.logprob[-2:], last["logprob"])
    assert torch.equal(gradient[-2:], last["d_logits"])


@pytest.mark.parametrize("shape", [(1, 70_000), (70_000, 1)])
def test_more_than_65535_tokens_in_either_dimension(shape):
    logits, tokens = make_case(3, *shape, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "HAS_TRITON", False)
        check_against_oracle(logits, tokens, upstream_like(5, tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 70_000), (70_000, 1)])
def test_more_than_65535_tokens_in_either_dimension_on_a_gpu(shape):
    logits, tokens = make_case(3, *shape, 3, device="cuda")
    check_against_oracle(logits, tokens, upstream_like(5, tokens))


def jitted_kernels():
    module = pytest.importorskip("grpo_kernels.kernels.token_stats")
    return [module._token_stats_forward_kernel, module._token_stats_backward_kernel]


@pytest.mark.parametrize("at", [0, 1], ids=["forward", "backward"])
def test_only_settings_of_the_model_and_the_launch_are_constexpr(at):
    """Never a length, a temperature, a stride: each new value would compile again."""
    parameters = inspect.signature(jitted_kernels()[at].fn).parameters.values()
    constant = {each.name for each in parameters if "constexpr" in str(each.annotation)}
    assert constant == {"KL", "SOFTCAP", "ACC", "UNROLL", "LANES", "VEC"}


@pytest.mark.gpu
def test_new_lengths_and_temperatures_compile_nothing():
    forward, backward = jitted_kernels()

    def compiled():
        return [
            len(kernel.device_caches[torch.cuda.current_device()][0])
            for kernel in (forward, backward)
        ]

    def step(T, temperature):
        logits, tokens = make_case(T, 2, T, 4096, device="cuda")
        results(token_stats, logits, tokens, upstream_like(5, tokens), temperature=temperature)

    step(7, 1.0)
    before = compiled()
    for T, temperature in ((1, 0.7), (16, 1.3), (33, 2.0)):
        step(T, temperature)
    assert compiled() == before


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("V", [1, 300, 2047, 2048, 128_256, 262_144])
def test_every_vocabulary_has_a_launch_of_whole_warps_and_full_accesses(kernel, itemsize, V):
    launch = pick_row_launch(kernel, V, itemsize, interpreted=False)
    assert launch.vector * itemsize == ACCESS_BYTES
    assert launch.lanes == 32 * launch.num_warps
    for size in (launch.unroll, launch.lanes, launch.vector):
        assert size & (size - 1) == 0, "Triton's ranges are powers of two"


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_launch_is_pure_and_every_entry_is_reachable(kernel):
    reached = {pick_row_launch(kernel, V, 2, interpreted=False) for V in (1, 2047, 2048, 1 << 20)}
    entries = [entry for entry in TABLE if entry.kernel == kernel]
    assert len(reached) == len(entries)
    assert entries[-1].below == float("inf") and all(entry.reason for entry in entries)
    assert list(entries) == sorted(entries, key=lambda entry: entry.below)
    again = pick_row_launch(kernel, 300, 2, interpreted=False)
    assert again == pick_row_launch(kernel, 300, 2, interpreted=False)


def test_interpreted_rows_of_a_property_test_have_several_tiles():
    launch = pick_row_launch("token_stats_forward", 300, 4, interpreted=True)
    assert 300 / (launch.unroll * launch.lanes * launch.vector) > 4
