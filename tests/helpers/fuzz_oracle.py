"""Expected results of a drawn call in float64, and the error that rounding may cause.

The tolerance is a backward error. In the accumulation dtype every logit (relative to its row's
maximum), every log-prob and every advantage carries a few roundings of its size, whatever the
algorithm. The exact function is therefore also evaluated on several randomly perturbed inputs, each
off by one rounding. The error of a result may be MARGIN times the largest change among these, plus
MARGIN roundings of the result itself. A common offset of a row does not count as a logit's size:
it must cost nothing. If a threshold lies within a rounding, the perturbed results differ as well.
"""

from dataclasses import asdict
from types import SimpleNamespace

import torch
from torch import Tensor

import grpo_kernels
from reference import losses
from tests.helpers import advantage_formulas
from tests.helpers.fuzz_cases import LOGITS, OBJECTIVES, Call, Numbers, log_size, with_layout
from tests.helpers.supports import kept_entries

MARGIN = 8
FEW, MANY = 2, 48  # perturbations: a few pass most calls, many decide about the rest
MAX_LOG_RATIO = 20
LOGPROBS = ("old_logprob", "ref_logprob", "sampling_logprob", "logprob", "entropy", "kl")
EXPONENTS = ("k_positive", "lambda_positive", "k_negative", "lambda_negative")  # of "vespo"
REWARDS = ("rewards", "step_rewards", "advantages")


def results(call: Call, device: str = "cpu") -> dict[str, Tensor]:
    """Outputs by name, gradients as "d_<leaf>"; checks that no argument was modified."""
    arguments = {
        name: with_layout(value.to(device), call.layouts.get(name, ""))
        if isinstance(value, Tensor)
        else value
        for name, value in call.arguments.items()
    }
    leaves = {name: arguments[name].requires_grad_() for name in call.leaves}
    function = getattr(grpo_kernels, call.name)
    found = _with_gradients(function(**arguments), call.upstream, leaves)
    for name, value in call.arguments.items():
        overwritten = name == "logits" and call.arguments.get("inplace")
        if isinstance(value, Tensor) and not overwritten:
            assert_same_bits({name: arguments[name].detach().cpu()}, {name: value}, "modified")
    return {name: value.cpu() for name, value in found.items()}


def _with_gradients(output, upstream: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict:
    if isinstance(output, Tensor):
        found = {"value": output}
    elif hasattr(output, "metrics"):
        found = {"loss": output.loss, **output.metrics}
    else:
        found = {name: x for name, x in output._asdict().items() if x is not None}
    if leaves:
        outputs = [found[name] for name in upstream]
        factors = [g.to(y) for g, y in zip(upstream.values(), outputs, strict=True)]
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), factors, materialize_grads=True, allow_unused=True
        )
        found |= {f"d_{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def exact_results(call: Call, numbers: Numbers | None = None, eps: float = 0.0) -> dict:
    """Results of the reference implementation in fp64, on the inputs or perturbed by about eps."""
    arguments = _in_float64(call.arguments)
    leaves = {name: arguments[name].clone().requires_grad_() for name in call.leaves}
    arguments |= leaves
    if arguments.get("softcap") is None:  # a common offset would cost the oracle digits
        arguments |= {n: _subtract_max(arguments[n]) for n in LOGITS if n in arguments}
    name = call.name
    if numbers is not None:
        name, arguments = _perturb(call, arguments, numbers, eps)
    module = advantage_formulas if hasattr(advantage_formulas, name) else losses
    output = getattr(module, name)(**arguments)
    if numbers is not None and name == "approximate_kl_divergence":
        output = _without_rest(output, call)
    return _with_gradients(output, call.upstream, leaves)


def _in_float64(arguments: dict) -> dict:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def _subtract_max(x: Tensor) -> Tensor:
    return x - x.detach().amax(dim=-1, keepdim=True) if x.numel() else x


def _perturb(call: Call, arguments: dict, numbers: Numbers, eps: float) -> tuple[str, dict]:
    """Return the reference function to call and its arguments, each off by about a rounding."""

    def rounded(x: Tensor, size: Tensor | float) -> Tensor:
        return x + (eps * _noise(x, numbers) * size).detach()

    name, arguments = call.name, dict(arguments)
    product_size = dict.fromkeys(LOGITS, torch.zeros(()))
    if name.startswith("linear"):
        name = name.removeprefix("linear_")
        fixed_chunks = arguments.pop("chunk_tokens") is not None
        for prefix, logits in (("", "logits"), ("ref_", "ref_logits")):
            parts = [arguments.pop(prefix + n, None) for n in ("hidden", "weight", "bias")]
            if parts[0] is not None:
                product, size = _product(*parts)
                arguments[logits] = rounded(product, size)
                if not fixed_chunks:  # the backward may repeat it in another shape and rounding
                    product_size[logits] = size.amax(-1, keepdim=True)
        half = call.arguments["hidden"].dtype in (torch.bfloat16, torch.float16)
        if half and arguments["logits"].requires_grad:  # products of the gradient are in bf16
            arguments["logits"].register_hook(lambda g: g * (1 + _noise(g, numbers) * 2**-8))
    support = arguments.pop("support", None)
    if support is not None:  # the rest of the row, added below, is in it
        outside = ~kept_entries(support, call.arguments["tokens"], arguments["logits"].shape[-1])
        for logits in ("logits", "ref_logits"):
            if logits in arguments:
                arguments[logits] = arguments[logits].masked_fill(outside, -torch.inf)
    temperature, softcap = arguments.get("temperature", 1.0), arguments.get("softcap")
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        temperature = temperature.unsqueeze(-1)
    for logits in LOGITS:
        if logits in arguments:
            x = arguments[logits]
            if softcap is not None:
                x = _capped(x, softcap, rounded)
            x = rounded(x, _logit_size(x, temperature, softcap is not None))
            rest = log_size(x.shape[-1]) + product_size[logits] / temperature
            arguments[logits] = _with_rest(x, temperature, eps * rest, numbers)
    if softcap is not None:
        arguments["softcap"] = None
    if arguments.get("reduction") == "mean":
        arguments["reduction"] = "sum"
    for logprob in LOGPROBS:
        x = arguments.get(logprob)
        if isinstance(x, Tensor):
            arguments[logprob] = rounded(x, 1 + x.abs())
    if call.name in OBJECTIVES and arguments["advantages"].shape != torch.Size(call.shape):
        # One per token, because each token rounds its own.
        x, cu_seqlens = arguments["advantages"], arguments.get("cu_seqlens")
        if cu_seqlens is None:
            arguments["advantages"] = x[:, None].expand(call.shape)
        else:
            arguments["advantages"] = x.repeat_interleave(cu_seqlens.diff())
    if "config" in arguments:
        config = arguments["config"]
        exponents = torch.tensor([getattr(config, n) for n in EXPONENTS], dtype=torch.float64)
        fields = dict(zip(EXPONENTS, rounded(exponents, exponents).tolist(), strict=True))
        for bound in ("epsilon_low", "epsilon_high"):  # "dppo" bounds probabilities: they underflow
            tiny = _accumulation(call).tiny * numbers.coin().item()
            fields[bound] = getattr(config, bound) + tiny
        # A plain object: LossConfig rejects settings that its surrogate does not read.
        arguments["config"] = SimpleNamespace(**(asdict(config) | fields))
        if "logits" in arguments and numbers.coin().item():
            vars(arguments["config"]).update(_with_ties(call, arguments, eps))
    for reward in REWARDS:
        if reward in arguments:
            x = arguments[reward]
            largest = x.abs().amax() if reward != "advantages" and x.numel() else x.abs()
            perturbed = rounded(x, largest * (1 + _exponent_size(call)))  # of its VESPO weight
            nonnegative = reward == "rewards" and (x >= 0).all()
            arguments[reward] = perturbed.clamp_min(0) if nonnegative else perturbed
    return name, arguments


def _noise(like: Tensor, numbers: Numbers) -> Tensor:
    return 2 * torch.rand(like.shape, generator=numbers.generator, dtype=like.dtype) - 1


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits, and the sum of the absolute values of their terms."""
    logits, size = hidden @ weight.T, hidden.abs() @ weight.abs().T
    if bias is None:
        return logits, size
    return logits + bias, size + torch.where(bias.isinf(), 0, bias.abs())


def _capped(x: Tensor, softcap: float, rounded) -> Tensor:
    """Apply the softcap; its gradient 1 - tanh² is a difference of numbers near 1."""
    excluded = x == -torch.inf
    plain = x.masked_fill(excluded, 0)
    grad_error = rounded(torch.zeros_like(plain), 1.0)
    capped = softcap * (plain / softcap).tanh() + grad_error * (plain - plain.detach())
    return capped.masked_fill(excluded, -torch.inf)


def _logit_size(x: Tensor, temperature: float | Tensor, capped: bool) -> Tensor:
    """Size of the intermediate values between a row's logits and a log-prob."""
    x = x.detach()
    if x.numel() == 0:
        return torch.zeros_like(x)
    size = x.amax(dim=-1, keepdim=True) - x + temperature * log_size(x.shape[-1])
    size = size + x.abs() if capped else size
    return torch.where(x.isfinite(), size, 0.0)


def check_accuracy(call: Call, ours: dict[str, Tensor], seed: int = 0) -> None:
    """Compare the results of the package with the exact ones, within the rounding."""
    exact, eps = exact_results(call), _accumulation(call).eps
    assert ours.keys() == exact.keys(), f"{sorted(ours)}, not {sorted(exact)}"
    for name, value in ours.items():
        assert value.shape == exact[name].shape, f"{name}: {tuple(value.shape)}"
    numbers, spread = Numbers(seed), {name: torch.zeros_like(x) for name, x in exact.items()}
    floor = eps * _gate_size(call) + torch.finfo(torch.float64).eps * _kl_size(call, exact) + eps**2
    for name, x in exact.items():
        if name.startswith("vespo/"):
            spread[name] += eps * _exponent_size(call) * x.abs()
    wrong: dict[str, str] = {}
    for count in (FEW, MANY):
        for _ in range(count):
            for name, x in exact_results(call, numbers, eps).items():
                distance = (x - exact[name]).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
                spread[name] = torch.maximum(spread[name], distance)
        wrong = {
            name: message
            for name, x in ours.items()
            if (message := _excess(name, x, exact[name], spread[name] + floor, eps))
        }
        if not wrong:
            return
    raise AssertionError("; ".join(f"{name}: {message}" for name, message in wrong.items()))


def _with_ties(call: Call, arguments: dict, eps: float) -> dict[str, float]:
    """Settings that rank tokens, set to select all tokens if the ranked values may be equal."""
    config = arguments["config"]
    if config.top_entropy is None and config.kl_cov is None:
        return {}
    x, temperature = arguments["logits"].detach(), arguments.get("temperature", 1.0)
    keep = torch.ones(call.shape, dtype=torch.bool) if call.mask is None else call.mask != 0
    tokens = torch.where(keep, arguments["tokens"], 0)
    stats = losses.token_stats(x, tokens, temperature=temperature)
    entropy, logprob = (x[keep].sort().values for x in (stats.entropy, stats.logprob))
    rounding, fields = 64 * eps * log_size(x.shape[-1]), {}
    if config.top_entropy is not None and (entropy.diff() < rounding).any():
        fields["top_entropy"] = 1.0
    if config.kl_cov is not None and (logprob[-1:] - logprob[:1] < rounding).any():
        fields["kl_cov"] = 1.0
    return fields


def _gate_size(call: Call) -> float:
    """Size of SAPO's 4 A r, whose factor 1 - gate is a difference until the gate rounds to 1.

    In fp32 the gate rounds to 1 at tau (r - 1) = 17, with tau >= 0.2 at r = 86.
    """
    config, advantages = call.arguments.get("config"), call.arguments.get("advantages")
    if config is None or config.surrogate != "sapo" or advantages.numel() == 0:
        return 0.0
    return 4 * 86 * float(advantages.abs().max() * call.upstream["loss"].abs())


def _kl_size(call: Call, exact: dict[str, Tensor]) -> float:
    """Size of the terms r·e^d of k3_corrected, which cancel in the gradient by autograd."""
    config = call.arguments.get("config")
    if config is None or config.kl_estimator != "k3_corrected" or "kl" not in exact:
        return 0.0
    tokens = torch.Size(call.shape).numel()
    return float(config.beta * tokens * exact["kl"].abs() * call.upstream["loss"].abs())


def _exponent_size(call: Call) -> float:
    """Size of the exponent of VESPO's weight of a sequence, a sum of bounded log-ratios."""
    config, old = call.arguments.get("config"), call.arguments.get("old_logprob")
    if config is None or config.surrogate != "vespo" or old is None:
        return 0.0
    sampling = call.arguments.get("sampling_logprob")
    log_ratios = [old.double() - _logprob(call)]
    log_ratios += [] if sampling is None else [old.double() - sampling.double()]
    size = sum(x.abs().clamp(max=MAX_LOG_RATIO) for x in log_ratios)
    keep = call.mask is None or call.mask != 0
    summed = torch.where(torch.as_tensor(keep), size, 0.0).sum(-1)
    largest = float(summed.max()) if summed.numel() else 0.0
    return largest * max(getattr(config, name) for name in EXPONENTS)


def _logprob(call: Call) -> Tensor:
    """Exact log-probs of the policy."""
    if "logprob" in call.arguments:
        return call.arguments["logprob"].double()
    linear = call.name.startswith("linear")
    function, first = ("linear_token_stats", "hidden") if linear else ("token_stats", "logits")
    names = (first, "weight", "bias", "tokens", "mask", "temperature", "softcap", "support")
    arguments = {name: call.arguments[name] for name in names if name in call.arguments}
    return getattr(losses, function)(**_in_float64(arguments)).logprob


def _with_rest(x: Tensor, temperature: float | Tensor, most: Tensor, numbers: Numbers) -> Tensor:
    """Append an entry with the rounding of the row's sum, so that no log p is exact.

    Its probability is at most `most`.
    """
    share = torch.rand((*x.shape[:-1], 1), generator=numbers.generator, dtype=x.dtype)
    total = (x.detach() / temperature).logsumexp(dim=-1, keepdim=True)
    rest = temperature * (total + (most.detach() * share).log())
    return torch.cat((x, rest), dim=-1)


def _without_rest(output: Tensor, call: Call) -> Tensor:
    """Remove the entry of `_with_rest`: it adds 0 to a sum, but 1 to the count of a mean."""
    if call.arguments["reduction"] == "none":
        return output[..., :-1]
    numel = max(1, call.arguments["new_logits"].numel())
    return output / numel if call.arguments["reduction"] == "mean" else output


def _accumulation(call: Call) -> torch.finfo:
    dtypes = [x.dtype for x in call.arguments.values() if isinstance(x, Tensor)]
    return torch.finfo(torch.float64 if torch.float64 in dtypes else torch.float32)


def _excess(name: str, ours: Tensor, exact: Tensor, spread: Tensor, eps: float) -> str | None:
    size = exact.abs().nan_to_num(nan=0.0, posinf=0.0)
    if name == "value" and size.numel():  # terms of about 1 cancel in it
        size = size.amax().clamp_min(1.0)
    if name.startswith("d_") and size.dim() > 1 and size.shape[-1]:
        size = size.amax(dim=-1, keepdim=True).expand_as(size)
    info = torch.finfo(ours.dtype)
    allowed = MARGIN * (spread + eps * size) + info.eps * (exact.abs() + info.tiny)
    error = (ours.double() - exact).abs()
    overflows = exact.abs() + allowed >= info.max * (1 - info.eps)
    fine = (error <= allowed) | (ours == exact)
    fine |= overflows & (ours == torch.inf * exact.sign())
    fine |= ~exact.isfinite() & (ours.isnan() if not name.startswith("d_") else True)
    if fine.all():
        return None
    excess = torch.where(fine, -1.0, (error - allowed).nan_to_num(nan=torch.inf))
    worst = int(excess.argmax())
    numbers = (x.flatten()[worst].item() for x in (ours, exact, error, allowed))
    return "{:.9g}, exactly {:.9g}, off by {:.3g}, allowed {:.3g}".format(*numbers)


def assert_same_bits(ours: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert ours.keys() == expected.keys()
    for name, x in ours.items():
        other = expected[name]
        same = x.shape == other.shape and bool(((x == other) | (x.isnan() & other.isnan())).all())
        assert same, f"{name} {what}: {x} and {other}"
