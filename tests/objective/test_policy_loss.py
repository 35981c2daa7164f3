"""policy_loss matches the reference implementation for any config, and its invariants hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels.objective import sequences
from grpo_kernels.objective.aggregation import AGGREGATIONS
from grpo_kernels.objective.policy_loss import LossConfig, policy_loss, prepare_loss_inputs
from grpo_kernels.objective.token_gradients import token_gradients
from reference import losses
from tests.helpers.loss_configs import SAMPLED, loss_configs, per_token_configs
from tests.helpers.tensors import normal

CONFIGS = loss_configs()
SEEDS = st.integers(0, 2**31)
quick = settings(max_examples=80, deadline=None)


def make_inputs(seed, config, sequences=4, length=5, spread=0.5):
    """Make padded fp64 inputs that `config` reads, with a ragged mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (sequences, length)
    logprob = -normal(*shape).abs() - 0.1
    inputs = {
        "mask": torch.rand(shape, generator=generator) < 0.7,
        "old_logprob": logprob + spread * normal(*shape),
        "sampling_logprob": logprob + spread * normal(*shape),
        "entropy": normal(*shape).abs(),
        "nll_weight": normal(*shape) * (torch.rand(shape, generator=generator) < 0.5),
    }
    if config.kl_estimator in SAMPLED:
        inputs["ref_logprob"] = logprob + normal(*shape)
    else:
        inputs["kl"] = normal(*shape).abs()
    return logprob, normal(sequences), inputs


def run(loss_function, logprob, advantages, inputs, **keywords):
    """Return the loss, the metrics and the gradients of every differentiable input."""
    leaves = {"logprob": logprob} | {k: inputs[k] for k in ("entropy", "kl") if k in inputs}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    others = {k: v for k, v in inputs.items() if k not in leaves}
    output = loss_function(
        leaves["logprob"],
        advantages,
        **others,
        **{k: v for k, v in leaves.items() if k != "logprob"},
        **keywords,
    )
    output.loss.backward()
    grads = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}
    return output.loss.detach(), output.metrics, grads


def assert_same(actual, expected, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def double(lengths):
    """Make the sequences two per prompt."""
    return [*lengths, *lengths[::-1]]


def pack(inputs, keep):
    return {k: v[keep] for k, v in inputs.items() if k != "mask"}


@quick
@given(CONFIGS, SEEDS, st.booleans(), st.booleans())
def test_matches_reference(config, seed, per_token, normalized):
    logprob, advantages, inputs = make_inputs(seed, config)
    if per_token:
        advantages = advantages[:, None] * inputs["entropy"]
    keywords = {"config": config}
    if normalized:
        keywords |= {"normalizer": 11, "entropy_normalizer": torch.tensor(17), "nll_normalizer": 5}
    ours = run(policy_loss, logprob, advantages, inputs, **keywords)
    theirs = run(losses.policy_loss, logprob, advantages, inputs, **keywords)
    assert_same(ours, theirs)


@quick
@given(CONFIGS, SEEDS, st.booleans(), st.lists(st.integers(0, 4), max_size=5).map(double))
def test_packed_matches_reference_and_padded(config, seed, per_sequence, lengths):
    logprob, advantages, inputs = make_inputs(seed, config, len(lengths), 5)
    keep = torch.arange(5) < torch.tensor(lengths, dtype=torch.long)[:, None]
    inputs["mask"] = keep
    inputs["nll_weight"] = torch.where(keep, inputs["nll_weight"], 0)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed_advantages = advantages[:, None].expand_as(logprob)[keep]
    if per_sequence and cu_seqlens[-1] != len(lengths):
        packed_advantages = advantages
    arguments = (logprob[keep], packed_advantages, pack(inputs, keep))
    ours = run(policy_loss, *arguments, config=config, cu_seqlens=cu_seqlens)
    assert_same(ours, run(losses.policy_loss, *arguments, config=config, cu_seqlens=cu_seqlens))
    loss, metrics, grads = run(policy_loss, logprob, advantages, inputs, config=config)
    assert_same(ours, (loss, metrics, {name: grad[keep] for name, grad in grads.items()}))


def test_packed_token_mean_without_cu_seqlens():
    config = LossConfig(aggregation="token_mean")
    logprob, advantages, inputs = make_inputs(0, config)
    keep = inputs["mask"]
    packed = advantages[:, None].expand_as(logprob)[keep]
    ours = run(policy_loss, logprob[keep], packed, pack(inputs, keep), config=config)
    padded = run(policy_loss, logprob, advantages, inputs, config=config)
    of_sequences = {"clip_ratio/low_min", "clip_ratio/high_max"}
    assert ours[1].keys() == padded[1].keys() - of_sequences
    assert_same(ours[0], padded[0])
    assert_same(ours[1], {name: padded[1][name] for name in ours[1]})


@quick
@given(SEEDS, st.floats(0.1, 10))
def test_gradient_is_linear_in_advantage_inside_clip(seed, scale):
    config = LossConfig()
    logprob, advantages, inputs = make_inputs(seed, config, spread=0.01)
    _, _, one = run(policy_loss, logprob, advantages, inputs, config=config)
    _, _, two = run(policy_loss, logprob, scale * advantages, inputs, config=config)
    assert_same(two["logprob"], scale * one["logprob"], rtol=1e-10)


@pytest.mark.parametrize("log_ratio", [-1e30, -100.0, 100.0, 1e30])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", SAMPLED)
def test_gradient_is_finite_for_extreme_ratios(log_ratio, advantage, level, estimator):
    for dtype in (torch.float32, torch.float64):
        logprob = torch.tensor([[log_ratio, -1.0]], dtype=dtype, requires_grad=True)
        zeros = torch.zeros_like(logprob)
        config = LossConfig(ratio_level=level, beta=0.1, kl_estimator=estimator)
        loss = policy_loss(
            logprob,
            torch.tensor([advantage]),
            old_logprob=zeros,
            ref_logprob=zeros,
            sampling_logprob=-logprob,
            config=config,
        ).loss
        loss.backward()
        assert logprob.grad.isfinite().all()


@quick
@given(CONFIGS, SEEDS, st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_masked_tokens_have_no_effect(config, seed, garbage):
    logprob, advantages, inputs = make_inputs(seed, config)
    advantages = advantages[:, None].expand_as(logprob)
    clean = run(policy_loss, logprob, advantages, inputs, config=config)
    drop = ~inputs["mask"]
    # Of a token outside of the mask with an nll_weight the log-prob alone is read.
    drop_logprob = drop & ((inputs["nll_weight"] == 0) | (config.nll_coef == 0))

    def spoil(x):
        return x.masked_fill(drop, garbage)

    unspoiled = ("mask", "nll_weight")
    spoiled = {k: v if k in unspoiled else spoil(v) for k, v in inputs.items()}
    spoiled_logprob = logprob.masked_fill(drop_logprob, garbage)
    for function in (policy_loss, losses.policy_loss):
        dirty = run(function, spoiled_logprob, spoil(advantages), spoiled, config=config)
        assert_same(dirty, clean)
        for name, grad in dirty[2].items():
            assert (grad[drop_logprob if name == "logprob" else drop] == 0).all()


@quick
@given(loss_configs(filters=("off_policy_threshold", "rejection")), SEEDS)  # others rank tokens
def test_micro_batches_add_up_to_one_batch(config, seed):
    logprob, advantages, inputs = make_inputs(seed, config, sequences=6)
    loss, metrics, grads = run(policy_loss, logprob, advantages, inputs, config=config)
    tokens = inputs["mask"].sum()
    normalizer = {
        "sequence_mean": 6,
        "token_mean": tokens,
        "fixed_length": 6 * 7,
        "sequence_sum_mean": 6,
        "prompt_mean": 3,
    }[config.aggregation]
    parts = [
        run(
            policy_loss,
            logprob[part],
            advantages[part],
            {k: v[part] for k, v in inputs.items()},
            config=config,
            normalizer=normalizer,
            entropy_normalizer=tokens,
            nll_normalizer=(inputs["nll_weight"] != 0).sum(),
        )
        for part in (slice(0, 2), slice(2, 6))
    ]
    assert_same(sum(part[0] for part in parts), loss)
    for name in metrics.keys() & {"policy_loss", "nll_loss"}:
        assert_same(sum(part[1][name] for part in parts), metrics[name])
    for name, grad in grads.items():
        assert_same(torch.cat([part[2][name] for part in parts]), grad)


@pytest.mark.parametrize("aggregation", list(AGGREGATIONS))
@pytest.mark.parametrize("shape", [(4, 3), (0, 4), (4, 0), (0,)])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("normalizer", [None, torch.tensor(0)])
def test_all_masked_or_empty_gives_zero(aggregation, shape, level, normalizer):
    config = LossConfig(
        aggregation=aggregation,
        ratio_level=level,
        max_completion_length=4 if aggregation == "fixed_length" else None,
        completions_per_prompt=2 if aggregation == "prompt_mean" else None,
        beta=0.1,
        entropy_coef=0.1,
    )
    for function in (policy_loss, losses.policy_loss):
        logprob = torch.full(shape, float("nan"), requires_grad=True)
        output = function(
            logprob,
            torch.zeros(shape),
            mask=torch.zeros(shape),
            ref_logprob=torch.zeros(shape),
            entropy=torch.zeros(shape),
            config=config,
            normalizer=normalizer,
            entropy_normalizer=normalizer,
            cu_seqlens=torch.tensor([0]) if len(shape) == 1 else None,
        )
        output.loss.backward()
        assert output.loss == 0
        assert (logprob.grad == 0).all()
        assert all(value == 0 for value in output.metrics.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_fp32(dtype):
    config = LossConfig(beta=0.1, entropy_coef=0.1)
    logprob, advantages, inputs = make_inputs(3, config)
    inputs = {k: v if k == "mask" else v.to(dtype) for k, v in inputs.items()}
    half = policy_loss(logprob.to(dtype), advantages.float(), **inputs, config=config)
    full = {k: v if k == "mask" else v.float() for k, v in inputs.items()}
    single = policy_loss(logprob.to(dtype).float(), advantages.float(), **full, config=config)
    assert_same(half, single, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["off_policy_threshold", "top_entropy", "clip_cov", "second_moment"]
)
def test_nan_logprob_passes_every_filter(name):
    config = LossConfig(**{name: 0.3})
    logprob = torch.tensor([[torch.nan, -1.0, -2.0]])
    entropy = torch.tensor([[0.1, 0.5, 2.0]])
    for advantage in (-1.0, 1.0):
        loss, _ = policy_loss(logprob, torch.tensor([advantage]), entropy=entropy, config=config)
        assert loss.isnan()


def test_differentiable_inputs():
    names = ("old_logprob", "ref_logprob", "sampling_logprob")
    others = {name: torch.zeros(2, 3, requires_grad=True) for name in names}
    advantages = torch.ones(2, requires_grad=True)
    logprob = torch.zeros(2, 3, requires_grad=True)
    policy_loss(logprob, advantages, **others, config=LossConfig(beta=1.0)).loss.backward()
    assert logprob.grad is not None
    assert all(x.grad is None for x in [advantages, *others.values()])


class Waits(TorchDispatchMode):
    """Record operators that make the host wait for a GPU: results that depend on data."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@quick
@given(CONFIGS, SEEDS, st.booleans())
def test_no_device_sync(config, seed, packed):
    logprob, advantages, inputs = make_inputs(seed, config)
    keywords = {}
    if packed:
        keep = inputs.pop("mask")
        logprob, inputs = logprob[keep], pack(inputs, keep)
        keywords["cu_seqlens"] = torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0))
    else:
        inputs["mask"] = inputs["mask"].bool()
    with pytest.MonkeyPatch.context() as patch, Waits() as waits:
        # The checks look at what tensors hold, but only on the CPU.
        patch.setattr(sequences, "values_are_readable", lambda tensor: False)
        run(policy_loss, logprob, advantages, inputs, config=config, **keywords)
    assert waits.found == []


COMPILED = [
    LossConfig(beta=0.1, entropy_coef=0.1, delta=4.0, nll_coef=0.1),
    LossConfig.gspo(beta=0.1, off_policy_threshold=0.1),
    LossConfig.vespo(top_entropy=0.3, entropy_coef=0.1),
    LossConfig.gmpo(importance_level="sequence"),
    LossConfig.dppo(clip_cov=1.0),
    LossConfig.kl_covariance(),
    LossConfig.m2po(
        surrogate="reinforce",
        aggregation="prompt_mean",
        completions_per_prompt=2,
        rejection=("token_k1=2", "seq_max_k3=1", "seq_mean_k2=1"),
    ),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", COMPILED, ids=lambda config: config.surrogate)
def test_compile_dynamic_length(packed, config):
    torch._dynamo.reset()
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(policy_loss, fullgraph=True, dynamic=True, backend=backend)
    for length in (5, 6, 9):
        logprob, advantages, inputs = make_inputs(length, config, length=length)
        keywords = {"config": config, "normalizer": length / 2, "entropy_normalizer": length}
        keywords["nll_normalizer"] = length + 1
        if packed:
            keep = inputs.pop("mask")
            logprob, inputs = logprob[keep], pack(inputs, keep)
            lengths = keep.sum(-1)
            keywords["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        ours = run(compiled, logprob, advantages, inputs, **keywords)
        assert_same(ours, run(policy_loss, logprob, advantages, inputs, **keywords))
    assert len(graphs) == 1


@given(
    seed=st.integers(0, 2**31),
    config=per_token_configs(),
    given_logprobs=st.sets(st.sampled_from(["old_logprob", "sampling_logprob"])),
    spread=st.sampled_from([0.1, 3.0, 40.0]),
)
def test_token_gradients_match_autograd(seed, config, given_logprobs, spread):
    logprob = -normal(seed, 4, 6, dtype=torch.float64).abs().requires_grad_()
    entropy = normal(seed + 1, 4, 6, dtype=torch.float64).abs().requires_grad_()
    if config.needs_sampling:
        given_logprobs = given_logprobs | {"sampling_logprob"}
    others = {
        name: logprob.detach() + normal(seed + i, 4, 6, dtype=torch.float64, std=spread)
        for i, name in enumerate((*sorted(given_logprobs), "ref_logprob"), 2)
    }
    advantages = normal(seed + 9, 4, 6, dtype=torch.float64)
    keywords = {"old_logprob": None, "sampling_logprob": None, **others}
    mask = normal(seed + 10, 4, 6) > -0.5
    nll_weight = normal(seed + 11, 4, 6) * (normal(seed + 12, 4, 6) > 0)
    keywords |= {"mask": mask, "nll_weight": nll_weight}
    prepared = prepare_loss_inputs(
        logprob, torch.float64, advantages, config=config, **keywords,
    )  # fmt: skip
    loss = policy_loss(logprob, advantages, entropy=entropy, config=config, **keywords).loss
    expected = torch.autograd.grad(loss, (logprob, entropy), materialize_grads=True)
    grads = token_gradients(logprob.detach(), prepared.inputs, config)
    assert grads.kl is None
    # Of r·k3 autograd adds two terms of up to e^20, which cancel.
    cancelled = 1e-7 if config.kl_estimator == "k3_corrected" else 1e-14
    torch.testing.assert_close(grads.logprob, expected[0], rtol=1e-12, atol=cancelled)
    of_entropy = torch.zeros(()).expand(4, 6) if grads.entropy is None else grads.entropy
    of_entropy = torch.where(mask, of_entropy, 0.0)  # the fused ops leave out the other tokens
    torch.testing.assert_close(of_entropy.double(), expected[1], rtol=1e-12, atol=1e-14)
