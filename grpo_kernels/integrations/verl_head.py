"""verl's fused LM heads, computed by grpo_kernels: log-probs, entropies and Σπ².

verl calls `FusedLinearForPPO` (impl_backend "torch", its default, and "liger") or
`linear_cross_entropy` ("triton", and Megatron models). `install_kernel` replaces both.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.linear_token_stats import linear_token_stats
from ..validation import expect_choice

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda logprob: logprob,
    "sum": Tensor.sum,
    "mean": Tensor.mean,
}


@dataclass(eq=False)
class HeadRequest:
    """Settings of one forward of the head; a model passes it on as its `temperature`.

    It is not a tensor, so FSDP neither casts nor copies it.
    """

    temperature: float | Tensor  # a number, one, or one per sequence or token of the labels
    sum_pi_squared: bool = False
    softcap: float | None = None
    result: Tensor | None = None  # Σπ² of each label, once the head ran


class FusedLinearForPPO(torch.nn.Module):
    """Replacement of verl's module of this name: log-probs and entropies from hidden states.

    Both arguments are ignored; verl chooses the chunk and the backend with them.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float | Tensor | HeadRequest = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return (log-probs, entropies), of the shape of input_ids, fp32, differentiable.

        Args:
            hidden_states: [..., H].
            vocab_weights: [V, H].
            input_ids: [...], the tokens that the hidden states predict.
            temperature: > 0; a number, a tensor of one, one per sequence or one per token, or what
                the engine passes in its place.
        """
        return _head_outputs(hidden_states, vocab_weights, input_ids, temperature)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor | HeadRequest = 1.0,
    reduction: str = "none",
    dist_process_group: torch.distributed.ProcessGroup | None = None,
    *,
    impl_backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """Compute log-probs of labels and entropies, like verl's function of this name.

    Args:
        hidden: [..., H].
        weight: [V, H]; with `dist_process_group` the shard [V / ranks, H] of this rank. verl passes
            `lm_head.weight`, also to its own kernel: with a LoRA on the head, this is the frozen
            weight without the adapter, so leave `lm_head` out of `target_modules`.
        labels: [...], the N tokens that `hidden` predicts, in the same order.
        temperature: as in `FusedLinearForPPO`.
        reduction: of the log-probs: "none", "sum" or "mean".
        dist_process_group: the tensor-parallel group that shards the vocabulary.
        impl_backend: ignored; verl chooses among its own kernels with it.

    Returns:
        (log-probs [N], or 0-dim if reduced; entropies [N], never reduced), in nats, fp32 (fp64 for
        fp64), differentiable in `hidden` and `weight`. With `dist_process_group` each rank gets its
        share of the gradient of `hidden`: the sum over ranks is the gradient. verl leaves the sum
        to Megatron's `sequence_parallel`; without that nothing adds them up.

    Raises:
        ValueError, TypeError: as `linear_token_stats`, and for an unknown reduction.
    """
    expect_choice("reduction", reduction, _REDUCTIONS)
    if dist_process_group is not None:
        hidden = _GradientShare.apply(hidden, dist_process_group.size())
    logprob, entropy = _head_outputs(hidden, weight, labels, temperature, dist_process_group)
    return _REDUCTIONS[reduction](logprob.flatten()), entropy.flatten()


class _GradientShare(torch.autograd.Function):
    """Identity whose gradient is divided by the number of ranks: Megatron sums over all ranks."""

    @staticmethod
    def forward(ctx, hidden: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, d_hidden: Tensor) -> tuple[Tensor, None]:
        return d_hidden / ctx.ranks, None


def _head_outputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor | HeadRequest,
    vocab_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    request = temperature
    if not isinstance(request, HeadRequest):
        request = HeadRequest(request)
    given = request.temperature
    stats = linear_token_stats(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.flatten().long(),
        temperature=_per_token(given, labels) if isinstance(given, Tensor) else given,
        softcap=request.softcap,
        vocab_group=vocab_group,
        sum_sq_probs=request.sum_pi_squared,
    )
    assert stats.entropy is not None
    if request.sum_pi_squared:
        assert stats.sum_sq_probs is not None
        request.result = stats.sum_sq_probs.detach().exp().view_as(labels)
    return stats.logprob.view_as(labels), stats.entropy.view_as(labels)


def _per_token(temperature: Tensor, labels: Tensor) -> Tensor:
    """Broadcast temperatures, one, one per sequence or one per token, to [N]."""
    if temperature.numel() == labels.numel():
        return temperature.flatten()
    if labels.dim() > 1 and temperature.numel() == labels.shape[0]:
        return temperature.reshape(-1, 1).expand(-1, labels[0].numel()).flatten()
    return temperature.flatten()  # of one; linear_token_stats refuses any other


def install_kernel() -> None:
    """Put our head behind `use_fused_kernels=True`, whatever `impl_backend` is.

    transformers models look verl's function and module up at each call. Megatron models import the
    function: where they have been imported, it is replaced there too. With the FSDP engine a
    temperature per sample and `calculate_sum_pi_squared` then work with fused kernels; elsewhere
    verl refuses them. The softcap of a model's config is applied there too; verl leaves it out.
    """
    from verl.utils.experimental import torch_functional
    from verl.utils.kernel import linear_cross_entropy as kernel
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    previous = kernel.linear_cross_entropy
    for name, module in list(sys.modules.items()):
        if name.startswith("verl.") and vars(module).get("linear_cross_entropy") is previous:
            vars(module)["linear_cross_entropy"] = linear_cross_entropy
    torch_functional.FusedLinearForPPO = FusedLinearForPPO
    for name, wrap in (
        ("prepare_model_inputs", _wrap_model_inputs),
        ("prepare_model_outputs", _wrap_model_outputs),
    ):
        method = getattr(FSDPEngineWithLMHead, name)
        if not hasattr(method, "__wrapped__"):
            setattr(FSDPEngineWithLMHead, name, wrap(method))


def _wrap_model_inputs(method: Callable[..., Any]) -> Callable[..., Any]:
    """Pass what verl lacks, a temperature per sample, Σπ² and a softcap, in a HeadRequest."""
    from verl.utils import tensordict_utils as tu

    @functools.wraps(method)
    def prepare_model_inputs(self, micro_batch):
        def setting(name: str, default: bool = False) -> bool:
            return tu.get_non_tensor_data(data=micro_batch, key=name, default=default)

        # A subclass with a method of its own has kernels of its own.
        is_ours = type(self).prepare_model_inputs is prepare_model_inputs
        if not is_ours or not setting("use_fused_kernels"):
            return method(self, micro_batch)
        squares = setting("calculate_sum_pi_squared")
        model_config = self.module.config.get_text_config()
        softcap = getattr(model_config, "final_logit_softcapping", None)
        if not (squares or softcap or isinstance(micro_batch["temperature"], Tensor)):
            return method(self, micro_batch)
        unfused = micro_batch.copy()
        tu.assign_non_tensor(unfused, use_fused_kernels=False)
        inputs, output_args = method(self, unfused)
        if setting("use_remove_padding", True):
            request = HeadRequest(output_args["temperature_rmpad"], squares, softcap)
            inputs["shift_labels"] = output_args["input_ids_rmpad_rolled"].unsqueeze(0)
        else:
            request = HeadRequest(output_args["temperature"], squares, softcap)
        output_args["head_request"] = request
        return inputs | {"temperature": request, "return_dict": True}, output_args

    return prepare_model_inputs


def _wrap_model_outputs(method: Callable[..., Any]) -> Callable[..., Any]:
    """Add the Σπ² that the head left in its HeadRequest."""
    from verl.utils import tensordict_utils as tu

    @functools.wraps(method)
    def prepare_model_outputs(self, output, output_args, micro_batch, logits_processor_func):
        request = output_args.get("head_request")
        if request is None or not request.sum_pi_squared:
            return method(self, output, output_args, micro_batch, logits_processor_func)
        if request.result is None:
            raise RuntimeError(
                "calculate_sum_pi_squared with use_fused_kernels needs a model whose forward calls "
                f"FusedLinearForPPO or linear_cross_entropy: {type(self.module).__name__} does not"
            )
        rest = micro_batch.copy()
        tu.assign_non_tensor(rest, calculate_sum_pi_squared=False)
        outputs = method(self, output, output_args, rest, logits_processor_func)
        offsets, squares = micro_batch["input_ids"].offsets(), request.result
        if "temperature_rmpad" in output_args:
            squares = self._gather_and_unpad_packed(squares.flatten(), output_args["pad_size"])
        else:
            positions = torch.arange(squares.shape[1], device=squares.device)
            squares = squares[positions < offsets.diff()[:, None]]
        outputs["sum_pi_squared"] = torch.nested.nested_tensor_from_jagged(squares, offsets)
        return outputs

    return prepare_model_outputs
