"""Launches of the row functions: offsets, memory, recompilation, and the launch table."""

import inspect
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import LossConfig, backends, grpo_loss, token_stats, workspace
from grpo_kernels.backends import RowInputs, StatsRequest, pytorch, use
from grpo_kernels.backends.pytorch import softmax
from grpo_kernels.backends.triton.launch_configs import (
    ACCESS_BYTES,
    ROWS_PER_MULTIPROCESSOR,
    TABLE,
    pick_row_launch,
)
from grpo_kernels.objective.token_gradients import TokenGrads
from tests.helpers.tensors import (
    assert_same_bits,
    check_against_oracle,
    exact_results,
    make_case,
    normal,
    results,
    upstream_like,
)

KERNELS = sorted({entry.kernel for entry in TABLE})


class LargestAllocation(TorchDispatchMode):
    """Records the bytes of the largest new tensor; views of `known` are not new."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple | list) else (results,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.nbytes = max(self.nbytes, storage.nbytes())
        return results


def test_pytorch_temporaries_are_at_most_one_block(monkeypatch):
    """400 rows in blocks of 16."""
    monkeypatch.setattr(softmax, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(workspace, "_thread", threading.local())  # earlier tests' may be larger
    logits, tokens = make_case(1, 4, 100, 1024)
    ref_logits = normal(2, 4, 100, 1024)
    d_logits = torch.empty_like(logits)
    ones = torch.ones(4, 100)
    inputs = RowInputs(logits, tokens, ones, None, ref_logits, 30.0, "reverse")
    with LargestAllocation(logits, ref_logits, d_logits) as largest:
        stats = pytorch.token_stats_forward(inputs, StatsRequest(True, True, True, True, 3))
        pytorch.token_stats_backward(inputs, stats, TokenGrads(*[ones] * 5), d_logits)
    exact = exact_results(
        logits,
        tokens,
        dict.fromkeys(TokenGrads._fields, ones),
        softcap=30.0,
        sum_sq_probs=True,
        mean_logit=True,
        kl="reverse",
        ref_logits=ref_logits,
    )
    torch.testing.assert_close(d_logits.double(), exact["d_logits"], rtol=1e-5, atol=1e-5)
    assert 0 < largest.nbytes <= 1 << 16


def test_strided_rows_are_not_copied(backend):
    wide = normal(1, 3, 11, 500)
    logits, tokens = wide[:, :-1].requires_grad_(), torch.zeros(3, 10, dtype=torch.int64)
    ref_logits = normal(2, 3, 11, 500)[:, 1:]
    with LargestAllocation(wide, ref_logits) as largest:
        stats = token_stats(logits, tokens, kl="forward", ref_logits=ref_logits)
    assert largest.nbytes <= 30 * 2 * 8, "something larger than the rows' scalars was made"
    exact = exact_results(logits, tokens, {}, kl="forward", ref_logits=ref_logits)
    torch.testing.assert_close(stats.kl.detach().double(), exact["kl"], rtol=1e-5, atol=1e-5)


def test_row_offsets_beyond_2_to_the_31(backend):
    """Three rows 2^30 entries apart; the 4 GiB between them are never touched."""
    V = 40
    stride = 2**30
    memory = torch.empty(2 * stride + V, dtype=torch.float16)
    logits = memory.as_strided((1, 3, V), (3 * stride, stride, 1))
    logits.copy_(normal(1, 1, 3, V, dtype=torch.float16, std=3.0))
    tokens = torch.tensor([[1, 20, 39]])
    check_against_oracle(logits, tokens, upstream_like(5, tokens))


@pytest.mark.gpu
def test_more_than_2_to_the_31_entries_on_gpu():
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
def test_more_than_65535_tokens(shape):
    logits, tokens = make_case(3, *shape, 3)
    with use("pytorch"):
        check_against_oracle(logits, tokens, upstream_like(5, tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 70_000), (70_000, 1)])
def test_more_than_65535_tokens_on_gpu(shape):
    logits, tokens = make_case(3, *shape, 3, device="cuda")
    check_against_oracle(logits, tokens, upstream_like(5, tokens))


def jitted_kernels():
    launchers = pytest.importorskip("grpo_kernels.backends.triton.launchers")
    return {name: x for name, x in vars(launchers).items() if name.endswith("_kernel")}


SETTINGS = {
    "KL", "SOFTCAP", "HAS_ENTROPY", "HAS_SQUARES", "HAS_MEAN", "FIELDS", "K", "K_BLOCK",
    "ESTIMATOR", "SURROGATE", "LOG2_EPS",
}  # fmt: skip
LAUNCH = {
    "ACC_DTYPE", "PART", "GROUP_PARTS", "GROUP_BLOCK", "SPAN", "UNROLL", "LANES", "VEC",
    "ALIGNMENT",
}  # fmt: skip


@pytest.mark.skipif(not backends.INTERPRETED, reason="reads the decorators in the interpreter")
def test_constexpr_parameters():
    """Settings of the model and of the launch only: a new value of another would compile again."""
    kernels = jitted_kernels()
    assert len(kernels) == 11
    for kernel in kernels.values():
        parameters = inspect.signature(kernel.fn).parameters.values()
        constant = {x.name for x in parameters if "constexpr" in str(x.annotation)}
        assert {"ACC_DTYPE", "LANES"} <= constant <= SETTINGS | LAUNCH
        # Triton also compiles again where a number becomes 1 or a multiple of 16. V never changes.
        numbers = {x.name for x in parameters if not x.name.endswith("_ptr")} - constant
        assert numbers - {"V"} <= set(kernel.kwargs["do_not_specialize"])


@pytest.mark.gpu
def test_new_lengths_and_temperatures_compile_nothing():
    kernels = jitted_kernels().values()

    def compiled():
        device = torch.cuda.current_device()
        return [len(kernel.device_caches[device][0]) for kernel in kernels]

    def step(T, temperature):
        logits, tokens = make_case(T, 2, T, 4096, device="cuda")
        results(token_stats, logits, tokens, upstream_like(5, tokens), temperature=temperature)
        config = LossConfig(beta=0.1 * temperature, epsilon_high=0.1 * T)
        ref_logprob = torch.zeros(2, T, device="cuda")
        advantages = torch.ones(2, device="cuda")
        logits.requires_grad_()
        loss = grpo_loss(logits, tokens, advantages, ref_logprob=ref_logprob, config=config).loss
        (temperature * loss).backward()

    step(7, 1.0)
    before = compiled()
    for T, temperature in ((1, 0.7), (16, 1.3), (33, 2.0)):
        step(T, temperature)
    assert compiled() == before


ARCHITECTURES = [None, 80, 90, 100, 120]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("V", [1, 300, 2047, 2048, 128_256, 262_144])
def test_launch_config_has_whole_warps_and_16_byte_accesses(kernel, itemsize, V):
    for architecture in ARCHITECTURES:
        launch = pick_row_launch(kernel, V, itemsize, architecture=architecture, interpreted=False)
        assert launch.vector * itemsize == ACCESS_BYTES
        assert launch.lanes == 32 * launch.num_warps <= 1024
        for size in (launch.unroll, launch.lanes, launch.vector):
            assert size & (size - 1) == 0, "Triton's ranges are powers of two"
        assert (launch.parts(V) - 1) * launch.part < V <= launch.parts(V) * launch.part


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_table_entry_is_reachable(kernel):
    reached = {
        pick_row_launch(kernel, V, itemsize, architecture=architecture, interpreted=False)
        for V in (1, 2047, 2048, 1 << 20)
        for itemsize in (2, 4)
        for architecture in ARCHITECTURES
    }
    entries = [entry for entry in TABLE if entry.kernel == kernel]
    reached = {(launch.unroll, launch.num_warps) for launch in reached}
    assert len(reached) == len(entries) and all(entry.reason for entry in entries)
    last = entries[-1]
    assert (last.below, last.itemsize, last.architecture) == (float("inf"), None, None)
    again = pick_row_launch(kernel, 300, 2, architecture=90, interpreted=False)
    assert again == pick_row_launch(kernel, 300, 2, architecture=90, interpreted=False)


def test_interpreted_rows_have_several_parts():
    launch = pick_row_launch("token_stats_forward", 300, 4, architecture=None, interpreted=True)
    assert launch.parts(300) >= 3 and launch.part_tiles >= 2


def with_few_rows_below(rows, monkeypatch):
    launchers = pytest.importorskip("grpo_kernels.backends.triton.launchers")
    monkeypatch.setattr(launchers, "INTERPRETED_MULTIPROCESSORS", rows / ROWS_PER_MULTIPROCESSOR)


@pytest.mark.parametrize("kl", [None, "forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not backends.INTERPRETED, reason="a GPU has its own number of multiprocessors")
def test_split_rows_are_bit_identical(monkeypatch, kl, dtype):
    """With excluded entries, a mask, and a V that is no multiple of a part."""
    logits, tokens = make_case(3, 2, 3, 333, dtype=dtype)
    logits[0, 0, :200] = -torch.inf
    case = {"mask": torch.tensor([[1, 1, 0], [1, 1, 1]]), "softcap": 20.0, "temperature": 0.7}
    case |= {"sum_sq_probs": True, "mean_logit": True, "is_top1": True, "top_logprobs": 8}
    names = ["logprob", "entropy", "sum_sq_probs", "mean_logit"]
    if kl:
        case |= {"kl": kl, "ref_logits": normal(9, 2, 3, 333, dtype=dtype)}
        names.append("kl")
    upstream = upstream_like(5, tokens, names)
    found = []
    for few in (0, 100):
        with_few_rows_below(few, monkeypatch)
        found.append(results(token_stats, logits, tokens, upstream, **case))
    assert_same_bits(*found)


@pytest.mark.gpu
def test_split_rows_are_bit_identical_on_gpu():
    logits, tokens = make_case(3, 1, 300, 128_256, dtype=torch.bfloat16, device="cuda")
    upstream = upstream_like(5, tokens)
    many = results(token_stats, logits, tokens, upstream)
    few = results(
        token_stats, logits[:, :7], tokens[:, :7], {name: g[:, :7] for name, g in upstream.items()}
    )
    assert_same_bits(few, {name: value[:, :7] for name, value in many.items()})


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.skipif(not backends.INTERPRETED, reason="a GPU has its own number of multiprocessors")
def test_programs_that_loop_over_rows_give_the_bits_of_one_program_per_row(monkeypatch, inplace):
    """Rows that are masked, or have no gradient, come between others."""
    launchers = pytest.importorskip("grpo_kernels.backends.triton.launchers")
    logits, tokens = make_case(3, 2, 4, 90, dtype=torch.bfloat16)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]])
    advantages = torch.tensor([[1.0, 2.0, 0.0, -1.0], [-2.0, 0.0, 3.0, 1.0]])
    found = []
    for multiprocessors in (1, 3, 100):
        monkeypatch.setattr(launchers, "INTERPRETED_MULTIPROCESSORS", multiprocessors)
        x = logits.clone().requires_grad_()
        loss = grpo_loss(x * 1, tokens, advantages, mask=mask, inplace=inplace).loss
        loss.backward()
        found.append({"loss": loss.detach(), "d_logits": x.grad})
    assert (found[0]["d_logits"][mask.bool() & (advantages != 0)] != 0).any(-1).all()
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


@pytest.mark.skipif(not backends.INTERPRETED, reason="counts programs in the interpreter")
def test_few_rows_are_split_over_programs(monkeypatch):
    launchers = pytest.importorskip("grpo_kernels.backends.triton.launchers")
    launched = []
    launch = launchers._launch

    def record(kernel, *arguments, programs_per_row=1, **keywords):
        launched.append((kernel.fn.__name__, programs_per_row))
        launch(kernel, *arguments, programs_per_row=programs_per_row, **keywords)

    monkeypatch.setattr(launchers, "_launch", record)
    logits, tokens = make_case(3, 1, 2, 300)
    results(token_stats, logits, tokens, upstream_like(5, tokens))
    assert launched == [
        ("_token_stats_part_kernel", 3),
        ("_token_stats_merge_kernel", 1),
        ("_token_stats_backward_kernel", 3),
    ]
