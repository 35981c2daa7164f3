"""Random calls of the public functions: sizes, dtypes, strides, masks, extreme values, settings.

Hypothesis draws the choices and a seed; the seed generates the numbers.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

import grpo_kernels
from grpo_kernels import TokenSupport
from reference import losses
from tests.helpers.loss_configs import SAMPLED, loss_configs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OBJECTIVES = ("policy_loss", "grpo_loss", "linear_grpo_loss")
PAIRS = ("cross_entropy_from_logits", "kl_divergence", "approximate_kl_divergence")
ADVANTAGES = (*grpo_kernels.ADVANTAGES.values(), grpo_kernels.pass_at_k_advantage)
FAMILIES = (
    "token_stats", "linear_token_stats", *OBJECTIVES, "grpo_loss", *PAIRS, "entropy_from_logits",
    "advantage", "multi_reward", "process_advantage",
)  # fmt: skip
ROWS = ("logits", "ref_logits", "new_logits", "hidden", "ref_hidden")  # [..., V] or [..., H]
LOGITS = ROWS[:3]
NOT_PER_TOKEN = ("cu_seqlens", "weight", "bias", "ref_weight", "ref_bias")  # in any shape
NORMAL, EXCLUDED = "normal", "excluded"
KINDS = (NORMAL, NORMAL, EXCLUDED, "offset", "one_hot", "negative", "equal", "huge", "tiny")
LAYOUTS = ("contiguous", "contiguous", "sliced", "shifted", "transposed")


@dataclass(frozen=True)
class Call:
    """Name of a public function, its contiguous arguments by name, and the layout of each."""

    name: str
    arguments: dict[str, object]
    leaves: tuple[str, ...] = ()  # arguments whose gradient is compared
    shape: tuple[int, ...] = ()  # of the tokens
    upstream: dict[str, Tensor] = field(default_factory=dict)  # gradient by name of the output
    layouts: dict[str, str] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor | None:
        return self.arguments.get("mask")

    def is_token_level(self, name: str) -> bool:
        value = self.arguments[name]
        if not isinstance(value, Tensor) or name in NOT_PER_TOKEN:
            return False
        shape = value.shape[:-1] if name in ROWS else value.shape
        return len(shape) > 0 and shape == torch.Size(self.shape)

    def with_arguments(self, **changed) -> "Call":
        return replace(self, arguments=self.arguments | changed)

    def __repr__(self) -> str:
        def brief(value):
            if not isinstance(value, Tensor) or value.numel() <= 6:
                return value
            return f"<{value.dtype} {tuple(value.shape)}>"

        parts = {name: brief(value) for name, value in self.arguments.items()}
        upstream = {name: brief(value) for name, value in self.upstream.items()}
        return f"{self.name}({parts}, leaves={self.leaves}, upstream={upstream}, {self.layouts})"


class Numbers:
    """Random tensors from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype=torch.float64, std=1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (drawn * std).to(dtype)

    def coin(self, *shape: int, p=0.7) -> Tensor:
        return torch.rand(shape, generator=self.generator) < p

    def below(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def logits(self, kind: str, *shape: int, dtype: torch.dtype) -> Tensor:
        x, V = self.normal(*shape, std=3.0), shape[-1]
        match kind:
            case "excluded":
                lead = int(self.below(V))
                excluded = ~self.coin(*shape, p=0.8) | (torch.arange(V) < lead)
                excluded[..., int(self.below(V - lead)) + lead] = False
                x = x.masked_fill(excluded, -torch.inf)
            case "offset":
                x = x + 1e4 * self.normal(*shape[:-1], 1).sign()
            case "one_hot":
                x[..., int(self.below(V))] += 80.0
            case "negative":
                x = -50 - x.abs()
            case "equal":
                x = x[..., :1].expand(shape).clone()
            case "huge":
                x = x * (1e3 if dtype == torch.float16 else 1e6)
            case "tiny":
                x = x * 1e-30
        return x.to(dtype)


@st.composite
def calls(draw, families=FAMILIES, most_rows=(4, 5), most_vocabulary=140) -> Call:
    family = draw(st.sampled_from(families))
    numbers = Numbers(draw(st.integers(0, 2**31)))
    padded = st.tuples(st.integers(1, most_rows[0]), st.integers(1, most_rows[1]))
    packed = st.tuples(st.integers(1, most_rows[0] * most_rows[1]))
    empty = st.sampled_from([(0,), (0, 3), (2, 0)])
    shape = draw(st.one_of(padded, padded, packed, empty))
    V = draw(st.one_of(st.integers(1, 4), st.integers(5, most_vocabulary)))
    if family in ("advantage", "multi_reward", "process_advantage"):
        return _advantage_call(draw, family, numbers)
    if family in (*PAIRS, "entropy_from_logits"):
        return _mini_grpo_call(draw, family, numbers, shape, V)
    return _token_call(draw, family, numbers, shape, V)


def _ref_dtype(draw, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the reference policy: the policy's or fp32; only fp64 beside fp64."""
    return dtype if dtype == torch.float64 else draw(st.sampled_from([dtype, torch.float32]))


def _mask(draw, numbers: Numbers, shape) -> Tensor | None:
    kind = draw(st.sampled_from([None, "bool", "bool", "float", "int", "none left"]))
    if kind is None:
        return None
    keep = numbers.coin(*shape) & (kind != "none left")
    return keep.to({"float": torch.float32, "int": torch.int64}.get(kind, torch.bool))


def _layouts(draw, names) -> dict[str, str]:
    return {name: draw(st.sampled_from(LAYOUTS)) for name in names}


def _advantage_call(draw, family: str, numbers: Numbers) -> Call:
    """Rewards are well apart or exactly equal: the size of a rounding depends on the dtype."""
    B, G, dtype = draw(st.integers(0, 4)), draw(st.integers(2, 6)), draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(["normal", "binary", "equal"]))

    def rewards(*leading: int) -> Tensor:
        x = numbers.normal(*leading, B, G).abs()
        x = numbers.coin(*leading, B, G, p=0.5).double() if kind == "binary" else x
        return (x[..., :1].expand(x.shape).clone() if kind == "equal" else x).to(dtype)

    if family == "advantage":
        function = draw(st.sampled_from(ADVANTAGES)).__name__
        arguments = {"rewards": rewards()}
        if function == "pass_at_k_advantage":
            arguments["k"] = draw(st.integers(2, G))
    elif family == "multi_reward":
        K = draw(st.integers(1, 3))
        function = draw(st.sampled_from(["weighted_reward", "multi_reward_advantage"]))
        weights = [1.0, 0.7, 0.45][:K]  # equal rewards do not cancel
        weights = draw(st.sampled_from([weights, torch.tensor(weights), *[None] * (K == 1)]))
        arguments = {"rewards": rewards(K), "weights": weights}
    else:
        S, length, function = draw(st.integers(0, 3)), draw(st.integers(0, 5)), family
        steps = numbers.normal(B, G, S).to(dtype)
        ends = numbers.below(length + 1, B, G, S) - 1
        arguments = {"step_rewards": steps, "step_ends": ends, "length": length}
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    return Call(function, arguments, layouts=_layouts(draw, names))


def _mini_grpo_call(draw, name: str, numbers: Numbers, shape, V: int) -> Call:
    dtype, kind = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(KINDS))
    shape = draw(st.sampled_from([shape, (1, *shape), ()]))
    logits = numbers.logits(kind, *shape, V, dtype=dtype)
    if name == "entropy_from_logits":
        arguments = {"logits": logits, "detach": draw(st.booleans())}
        leaves = () if arguments["detach"] else ("logits",)
    else:
        ref = numbers.logits(kind, *shape, V, dtype=_ref_dtype(draw, dtype))
        arguments = {"ref_logits": ref.masked_fill(logits == -torch.inf, -torch.inf)}
        arguments |= {"new_logits": logits, "eps": draw(st.sampled_from([1e-6, 1e-3, 0.1]))}
        leaves = ("new_logits",)
    if name == "approximate_kl_divergence":
        arguments["reduction"] = draw(st.sampled_from(["none", "mean", "sum"]))
    arguments["mask"] = _mask(draw, numbers, shape) if shape else None
    scale = torch.tensor(draw(st.sampled_from([1.0, -1.7, 0.0])), dtype=torch.float64)
    if arguments.get("reduction") == "none":
        scale = numbers.normal(*shape, V)
    upstream = {"value": scale} if leaves else {}
    names = [name for name in LOGITS if name in arguments]
    return Call(name, arguments, leaves, shape, upstream, _layouts(draw, names))


def _token_call(draw, name: str, numbers: Numbers, shape, V: int) -> Call:
    dtype = draw(st.sampled_from(DTYPES))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    mask, linear = _mask(draw, numbers, shape), name.startswith("linear")
    arguments: dict[str, object] = {"mask": mask}
    if name != "policy_loss":
        arguments["temperature"] = _temperature(draw, numbers, shape, acc)
        arguments["softcap"] = draw(st.sampled_from([None, None, 3.0, 30.0]))
    if linear:
        arguments |= _head(draw, "", numbers, shape, V, dtype)
        arguments["chunk_tokens"] = draw(st.sampled_from([None, None, 1, 2, 5]))
        hidden, weight, bias = (arguments[n] for n in ("hidden", "weight", "bias"))
        logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
        some = st.sets(st.sampled_from(["hidden", "weight", "bias"]), min_size=1)
        leaves = tuple(n for n in sorted(draw(some)) if arguments.get(n) is not None)
    elif name != "policy_loss":
        logits = numbers.logits(draw(st.sampled_from(KINDS)), *shape, V, dtype=dtype)
        arguments["logits"], leaves = logits, ("logits",)
    else:
        logits, leaves = numbers.logits("normal", *shape, V, dtype=dtype), ("logprob",)
    may_be_excluded = name == "token_stats" and draw(st.integers(0, 4)) == 0
    tokens = numbers.below(V, *shape)
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    excluded = (chosen == -torch.inf) & (not may_be_excluded)
    tokens = torch.where(excluded, logits.argmax(-1), tokens)
    # In fp16, a token's share of d_weight underflows beside one that is 1e8 times larger. Without
    # supports both have the same ids, so that the larger one hides it.
    may_underflow = name == "linear_grpo_loss" and dtype == torch.float16
    if name != "policy_loss" and not may_underflow and draw(st.integers(0, 2)) == 0:
        arguments["support"] = _support(draw, numbers, logits, tokens)
    if name in OBJECTIVES:
        scaling = {n: arguments[n] for n in ("temperature", "softcap", "support") if n in arguments}
        logprob = losses.token_stats(logits.double(), tokens, **scaling).logprob
        arguments |= _objective(draw, name, numbers, shape, acc, logprob)
        estimator = arguments["config"].kl_estimator
        over_vocabulary = None if estimator in SAMPLED else estimator
        if name == "policy_loss":
            arguments["logprob"] = logprob.to(dtype)
            arguments["entropy"] = numbers.normal(*shape, dtype=dtype).abs()
            if over_vocabulary:
                arguments["kl"] = numbers.normal(*shape, dtype=dtype).abs()
            else:
                ref_logprob = logprob + numbers.normal(*shape, std=2.0)
                arguments["ref_logprob"] = ref_logprob.to(dtype)
            leaves = tuple(n for n in ("logprob", "entropy", "kl") if n in arguments)
    else:
        over_vocabulary = draw(st.sampled_from([None, "forward", "reverse"]))
        arguments |= {"kl": over_vocabulary, "entropy": draw(st.booleans())}
    if name != "policy_loss":
        arguments["tokens"] = tokens.to(draw(st.sampled_from([torch.int64, torch.int32])))
        arguments |= _ref_inputs(draw, name, numbers, arguments, logits, over_vocabulary, acc)
    if name == "grpo_loss":
        arguments["inplace"] = draw(st.booleans())
    upstream = _upstream(draw, name, numbers, shape, arguments)
    names = [n for n in sorted(arguments) if isinstance(arguments[n], Tensor)]
    varied = draw(st.sets(st.sampled_from(names), max_size=4))
    return Call(name, arguments, leaves, shape, upstream, _layouts(draw, sorted(varied)))


def _support(draw, numbers: Numbers, logits: Tensor, tokens: Tensor) -> TokenSupport:
    """Ids at random, among them the token and the largest logit; none for some tokens."""
    kept = numbers.coin(*logits.shape, p=draw(st.sampled_from([0.0, 0.1, 0.6, 1.0])))
    for ids in (tokens, logits.argmax(-1)):
        kept.scatter_(-1, ids.unsqueeze(-1), True)
    kept &= numbers.coin(*tokens.shape, 1, p=0.8)
    return TokenSupport.from_lists([row.nonzero()[:, 0] for row in kept.flatten(0, -2)])


def _temperature(draw, numbers: Numbers, shape, acc: torch.dtype) -> float | Tensor:
    kind = draw(st.sampled_from([1.0, 0.7, 100.0, "0-dim", "per token", "column"]))
    if isinstance(kind, float):
        return kind
    sizes = {"0-dim": (), "per token": shape, "column": (*shape[:-1], 1)}[kind]
    return (numbers.normal(*sizes).abs() + 0.3).to(acc)


def _head(draw, prefix: str, numbers: Numbers, shape, V: int, dtype: torch.dtype) -> dict:
    H, std = draw(st.integers(1, 9)), draw(st.sampled_from([1.0, 1.0, 30.0]))
    bias = numbers.logits(draw(st.sampled_from([NORMAL, EXCLUDED])), V, dtype=dtype)
    return {
        prefix + "hidden": numbers.normal(*shape, H, dtype=dtype),
        prefix + "weight": numbers.normal(V, H, dtype=dtype, std=std),
        prefix + "bias": draw(st.sampled_from([None, bias])),
    }


def _objective(draw, name: str, numbers: Numbers, shape, acc, logprob: Tensor) -> dict:
    config = draw(loss_configs())
    arguments: dict[str, object] = {"config": config}
    sequences = shape[0]
    if len(shape) == 1 and (config.reads_sequences or draw(st.booleans())):
        cuts = draw(st.lists(st.integers(0, shape[0]), max_size=3))
        cu_seqlens = sorted([0, *cuts, shape[0]])
        arguments["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        sequences = len(cu_seqlens) - 1
    if config.aggregation == "prompt_mean":
        divisors = [n for n in range(1, max(sequences, 1) + 1) if sequences % n == 0]
        completions = draw(st.sampled_from(divisors))
        arguments["config"] = config = replace(config, completions_per_prompt=completions)
    per_sequence = draw(st.booleans()) and (len(shape) == 2 or "cu_seqlens" in arguments)
    advantages = numbers.normal(*((sequences,) if per_sequence else shape), dtype=acc)
    arguments["advantages"] = advantages * numbers.coin(*advantages.shape, p=0.8)
    spread = draw(st.sampled_from([0.1, 3.0, 40.0, 100.0]))
    for given in ("old_logprob", "sampling_logprob"):
        needed = given == "sampling_logprob" and config.needs_sampling
        if draw(st.booleans()) or needed:
            arguments[given] = (logprob + numbers.normal(*shape, std=spread)).to(acc)
    normalizer = draw(st.sampled_from([None, 11, torch.tensor(13), torch.tensor(0), 2.5]))
    if normalizer is not None:
        names = ("normalizer", "entropy_normalizer", "nll_normalizer")
        arguments |= dict.fromkeys(names, normalizer)
    arguments["nll_weight"] = numbers.normal(*shape, dtype=acc) * numbers.coin(*shape, p=0.3)
    return arguments


def _ref_inputs(draw, name: str, numbers, arguments, logits: Tensor, over_vocabulary, acc) -> dict:
    """Inputs of the KL; none if the call needs none."""
    is_objective = name in OBJECTIVES
    needed = arguments["config"].beta != 0 if is_objective else over_vocabulary is not None
    if not needed and (not is_objective or draw(st.booleans())):
        return {}
    shape, V = logits.shape[:-1], logits.shape[-1]
    inputs = {}
    if is_objective and not over_vocabulary and draw(st.booleans()):
        inputs["ref_logprob"] = -numbers.normal(*shape, dtype=acc, std=3.0).abs()
        if draw(st.booleans()):
            return inputs
    if name.startswith("linear"):
        dtype = _ref_dtype(draw, arguments["hidden"].dtype)
        inputs |= _head(draw, "ref_", numbers, shape, V, dtype)
        bias = torch.where(logits.reshape(-1, V).isinf().any(0), -torch.inf, 0.0)
        if bias.isinf().any():  # the KL is infinite unless both exclude these entries
            inputs["ref_bias"] = bias.to(dtype)
        elif inputs["ref_bias"] is not None:
            inputs["ref_bias"] = inputs["ref_bias"].clamp_min(-20)
        return inputs
    kind = draw(st.sampled_from([k for k in KINDS if k != EXCLUDED]))
    dtype = _ref_dtype(draw, arguments["logits"].dtype)
    ref_logits = numbers.logits(kind, *logits.shape, dtype=dtype)
    same_support = draw(st.integers(0, 5)) > 0
    inputs["ref_logits"] = ref_logits.masked_fill((logits == -torch.inf) & same_support, -torch.inf)
    return inputs


def _upstream(draw, name: str, numbers: Numbers, shape, arguments: dict) -> dict[str, Tensor]:
    if name in OBJECTIVES:
        factor = draw(st.sampled_from([1.0, 1.0, -1.7, 0.0, 1024.0]))
        return {"loss": torch.tensor(factor, dtype=torch.float64)}
    outputs = ["logprob"]
    outputs += ["entropy"] if arguments["entropy"] else []
    outputs += ["kl"] if arguments["kl"] else []
    chosen = draw(st.sets(st.sampled_from(outputs), min_size=1))
    expanded = draw(st.booleans())
    drawn = {n: numbers.normal(*(() if expanded else shape)) for n in sorted(chosen)}
    return {name: gradient.expand(shape) for name, gradient in drawn.items()}


def with_layout(x: Tensor, layout: str) -> Tensor:
    """Copy x to other strides; the memory between its entries is NaN, or an id out of range."""
    poison = torch.nan if x.is_floating_point() else False if x.dtype == torch.bool else 10**6
    rows = x.dim() > 1
    match layout:
        case "sliced" if x.dim() > 0:
            wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), poison)[..., : x.shape[-1]]
        case "shifted" if rows:
            wide = x.new_full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1]), poison)[..., 1:, :]
        case "transposed" if x.dim() > 2:
            wide = x.new_empty((x.shape[1], x.shape[0], *x.shape[2:])).transpose(0, 1)
        case _:
            return x.clone()
    return wide.copy_(x)


def log_size(V: int) -> float:
    """Size of the log-probs of a uniform row, plus 1 for the rounding of its sum."""
    return 1.0 + math.log(max(1, V))
