"""`linear_grpo_loss`: the objective from hidden states, with its gradient ready when the loss is.

The operator walks over the chunks once. Of each it makes the logits, their statistics, the loss of
its tokens and that loss's gradient, which goes back through the logits at once, while they exist:
three matrix products, nothing computed twice. Backward only scales.
"""

import ast
import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import checks
from ..linear_rows import HeadGradient, Inputs, LinearRows, Stats, Upstream, done_dtype
from ..objective import LossConfig, LossOutput, loss_constants, policy_loss
from ..terms import VOCABULARY_KL, Constants, saturated_exp, token_terms, weighted_sum
from .linear_inputs import operator_inputs
from .linear_token_stats import (
    _linear_token_stats,
    linear_token_stats,
    stats_outputs,
    token_stats_of,
)
from .packing import TokenPacking, pack_tokens
from .token_stats import TokenStats


@torch.library.custom_op("grpo_kernels::linear_grpo_loss_forward", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    softcap: float | None,
    entropy: bool,
    kl: str | None,
    dtype: torch.dtype,
    order: Tensor,
    counts: Tensor,
    chunk_tokens: int | None,
    skip_inert: bool,
    advantage: Tensor,
    token_weight: Tensor,
    entropy_weight: Tensor | None,
    old_logprob: Tensor | None,
    ref_logprob: Tensor | None,
    sampling_logprob: Tensor | None,
    config: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(
        hidden, weight, bias, tokens, temperature, ref_hidden, ref_weight, ref_bias,
        softcap, entropy, kl, dtype,
    )  # fmt: skip
    constants = Constants(
        advantage, token_weight, entropy_weight, old_logprob, ref_logprob, sampling_logprob
    )
    live, inert = counts.tolist()
    order = order[: live + inert]
    checks.check_token_ids(tokens[order], None, weight.shape[0])
    stats, loss = Stats.zeros(inputs), temperature.new_zeros(())
    with torch.autocast(hidden.device.type, enabled=False):
        rows = LinearRows(inputs, len(order), chunk_tokens, gradient=True)
        with_gradient = live if skip_inert else len(order)
        gradient = HeadGradient(rows, with_gradient, wanted)
        for at in rows.chunks(order[:with_gradient]):
            rows.write_logits(at)
            chunk = rows.forward(at)
            stats.write(at, chunk)
            chunk_loss, upstream = _chunk_loss(chunk, constants.at(at), _config_of(config))
            loss += chunk_loss
            gradient.add(at, rows.backward(at, chunk, upstream))
        for at in rows.chunks(order[with_gradient:]):
            rows.write_logits(at)
            stats.write(at, rows.forward(at))
    found = (stats.logprob, stats.entropy, stats.kl, *gradient.total())
    return (loss, *(loss.new_empty(0) if each is None else each for each in found))


@_forward.register_fake
def _(*arguments):
    inputs, wanted = Inputs(*arguments[: len(Inputs._fields)]), arguments[-1]
    new, done = inputs.temperature.new_empty, done_dtype(inputs)
    stats = stats_outputs(inputs.temperature, inputs.entropy, inputs.kl is not None)[:3]
    gradients = (
        new(each.shape if want else (0,), dtype=done if each.dim() == 2 else None)
        for each, want in zip((*inputs[:2], inputs.weight[:, 0]), wanted, strict=True)
    )
    return (new(()), *stats, *gradients)


def _chunk_loss(stats: Stats, constants: Constants, config: LossConfig) -> tuple[Tensor, Upstream]:
    """A chunk's part of the loss, and its gradient in the chunk's statistics."""
    with _recording():
        leaves = {"logprob": stats.logprob}
        if config.entropy_coef != 0:
            leaves["entropy"] = stats.entropy
        if config.beta != 0 and stats.kl is not None:
            leaves["kl"] = stats.kl
        leaves = {name: each.detach().requires_grad_() for name, each in leaves.items()}
        logprob, kl = leaves["logprob"], leaves.get("kl")
        constants = constants.with_old(logprob)
        ratio = saturated_exp(logprob - constants.old_logprob)
        policy, kl = token_terms(logprob, kl, ratio, constants, config)
        loss = weighted_sum(policy, kl, leaves.get("entropy"), constants, config)
        found = torch.autograd.grad(loss, list(leaves.values()))
    by_name = dict(zip(leaves, found, strict=True))
    return loss.detach(), Upstream(*(by_name.get(name) for name in Upstream._fields))


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd, inside an operator, which the dispatcher enters with it switched off.

    The operator's own autograd formula is not concerned: what is recorded here is used up here.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


FIELDS = tuple(field.name for field in dataclasses.fields(LossConfig))


def _as_text(config: LossConfig) -> str:
    """An operator takes no objects, and torch.compile traces no serialisers."""
    return "(" + ", ".join([repr(getattr(config, name)) for name in FIELDS]) + ")"


@functools.cache
def _config_of(text: str) -> LossConfig:
    return LossConfig(**dict(zip(FIELDS, ast.literal_eval(text), strict=True)))


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias = inputs[:3]
    ctx.wanted = inputs[-1]
    ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
    ctx.save_for_backward(*output[4:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, d_loss, *unused):
    if d_loss is None:
        return (None,) * 24
    gradients = (
        (each * d_loss).to(dtype) if want else None
        for each, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    )
    return (*gradients, *(None,) * 21)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    sampling_logprob: Tensor | None = None,
    config: LossConfig = LossConfig(),
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    packing: TokenPacking | None = None,
) -> LossOutput:
    """`grpo_loss` of logits = hidden @ weight.T + bias, which never exist but for a chunk.

    A token-level objective computes its gradient with the loss: 6·n·V·H floating-point operations
    for n tokens, three matrix products, and a backward that only scales by the gradient that comes
    in. A sequence-level ratio needs a sequence's log-probs before the first gradient, so its
    logits are made twice: 8·n·V·H. Under torch.no_grad it is 2·n·V·H.

    Masked tokens are in no product. Tokens without a learning signal (advantage 0, with neither KL
    nor entropy in the loss: every group whose rewards are all equal) are in that of the statistics,
    for the metrics, and in no other.

    The memory taken beside the results is about 1 GiB of workspace and the gradients in fp32,
    whatever the number of tokens.

    Args:
        hidden: [B, T, H] or packed [N, H]; weight: [V, H]; bias: [V].
        ref_hidden, ref_weight, ref_bias: the reference's, for config.kl_estimator as `ref_logits`
            in `grpo_loss`; a KL over the vocabulary is computed in the same pass.
        packing: `pack_tokens(mask, advantages)`, made in advance, so that nothing waits for the
            device.
        chunk_tokens, temperature, softcap: as in `linear_token_stats`.
        Others: as in `policy_loss`.

    Returns:
        LossOutput(loss, metrics); the loss is 0-dim, fp32 (fp64 for fp64 hidden), differentiable
        in `hidden`, `weight` and `bias`.

    Raises:
        ValueError, TypeError: as `linear_token_stats` and `policy_loss`.

    Shao et al., 2024 (arXiv:2402.03300).
    """
    over_vocabulary = config.kl_estimator in VOCABULARY_KL
    reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    has_reference = any(each is not None for each in reference.values())
    checks.check_linear_kl_input(
        config.kl_estimator, config.beta, over_vocabulary, ref_logprob, has_reference
    )
    checks.check_hidden(hidden)
    checks.check_tokens(tokens, hidden, "hidden")
    checks.check_chunk_tokens(chunk_tokens)
    objective = {
        "mask": mask,
        "old_logprob": old_logprob,
        "sampling_logprob": sampling_logprob,
        "config": config,
        "normalizer": normalizer,
        "entropy_normalizer": entropy_normalizer,
        "cu_seqlens": cu_seqlens,
    }
    asked = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "mask": mask,
        "entropy": True,
        "kl": config.kl_estimator if over_vocabulary and has_reference else None,
        **(reference if over_vocabulary else dict.fromkeys(reference)),
    }
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    keep, constants = loss_constants(
        tokens.shape, acc, advantages, ref_logprob=ref_logprob, **objective
    )
    if packing is None:
        packing = pack_tokens(keep, constants.advantage)
    checks.check_packing(packing, mask, tokens)
    checks.check_packed_advantages(packing, constants.advantage)
    chunking = {"chunk_tokens": chunk_tokens, "packing": packing}
    if has_reference and not over_vocabulary and ref_logprob is None:
        checks.check_reference_head(hidden, weight, reference)
        with torch.no_grad():
            ref_logprob = linear_token_stats(
                ref_hidden, ref_weight, tokens, bias=ref_bias, temperature=temperature,
                softcap=softcap, entropy=False, mask=mask, **chunking,
            ).logprob  # fmt: skip
        constants = constants._replace(ref_logprob=ref_logprob)

    wanted = [each is not None and each.requires_grad for each in (hidden, weight, bias)]
    # A ratio of whole sequences hands the gradient of one token's term to all of its sequence.
    alone = config.ratio_level == "token" or advantages.shape != tokens.shape
    skip_inert = alone and config.beta == 0 and config.entropy_coef == 0
    if not _gradient_comes_with_the_loss(config, wanted):
        stats = _linear_token_stats(
            hidden, weight, tokens, skip_inert=skip_inert, **chunking, **asked
        )
        return _policy_loss(stats, advantages, ref_logprob, objective)

    outputs = _forward(
        *operator_inputs(hidden, weight, tokens, **asked),
        *packing,
        chunk_tokens,
        skip_inert,
        *(each if each is None or each.dim() == 0 else each.flatten() for each in constants),
        _as_text(config),
        wanted,
    )
    stats = token_stats_of(outputs[1:], tokens.shape, True, asked["kl"])
    with torch.no_grad():
        metrics = _policy_loss(stats, advantages, ref_logprob, objective).metrics
    return LossOutput(outputs[0], metrics)


def _gradient_comes_with_the_loss(config: LossConfig, wanted: list[bool]) -> bool:
    """Whether a gradient is wanted, and every token's loss is known when its logits are."""
    return config.ratio_level == "token" and torch.is_grad_enabled() and any(wanted)


def _policy_loss(
    stats: TokenStats, advantages: Tensor, ref_logprob: Tensor | None, objective: dict
) -> LossOutput:
    return policy_loss(
        stats.logprob,
        advantages,
        entropy=stats.entropy,
        kl=stats.kl,
        ref_logprob=ref_logprob,
        **objective,
    )
