"""Put our operators behind the fused LM head of TRL's trainers.

`trl.trainer.utils.add_fused_lm_head` runs a model without its head and calls
`_ChunkedLogProbFunction.apply` on the hidden states of the tokens that have a label.
DistillationTrainer calls `ChunkedDivergenceFunction.apply`. The functions here take the same
arguments and return the same results, so everything else is TRL's: models, adapters, vision, FSDP2
and DeepSpeed. What our operators cannot do is left to TRL's own functions, with one warning.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import trl
from torch import Tensor, nn

try:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction
    from trl.trainer import distillation_trainer
    from trl.trainer import utils as trl_utils
except ImportError as error:
    raise ImportError(
        f"grpo_kernels.integrations.trl needs the fused LM head of TRL 1.16, got TRL "
        f"{trl.__version__}: {error}"
    ) from error

from .linear_head import LinearHead, linear_head
from .transformers import LMHead, unwrap

LOGPROB, COMPACTS = "_ChunkedLogProbFunction", "_use_triton"  # names in trl.trainer.utils
TRL_LOGPROB: Any = ChunkedLogProbFunction
TRL_DIVERGENCE: Any = ChunkedDivergenceFunction
_DEVICES = ("cpu", "cuda")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_logger = logging.getLogger(__name__)
_warned: set[str] = set()


def chunked_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    *,
    head_of: nn.Module | None = None,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute what TRL's `ChunkedLogProbFunction.apply` does, by `linear_token_stats`.

    Args:
        hidden: [N, H]; weight: [V, H]; bias: [V]; targets: [N].
        chunk_size: read by TRL's own function only.
        outputs: names of the optional results; the others are None.
        head_of: a model whose head is read through PEFT, instead of `weight` and `bias`.
        entropy_grad: as in `linear_token_stats`.

    Returns:
        (log-prob, entropy, log Σ p², mean logit, whether the target is the argmax), [N] each, the
        first two with gradient. The mean leaves out logits of -inf.
    """
    unsupported = _unsupported((hidden, weight), temperature, final_logit_softcapping, logit_scale)
    if unsupported is not None and head_of is None:
        _warn_once(f"TRL's own log-prob function runs: {unsupported}")
        arguments = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
        return TRL_LOGPROB.apply(hidden, weight, bias, targets, *arguments)
    with lm_head(weight, bias, logit_scale, final_logit_softcapping, head_of) as head:
        stats = head.token_stats(
            hidden,
            targets,
            temperature=temperature,
            entropy="entropy" in outputs,
            sum_sq_probs="log_sum_sq_probs" in outputs,
            mean_logit="mean_logits" in outputs,
            is_top1="is_top1" in outputs,
            entropy_grad=entropy_grad,
        )
    sum_sq_probs, mean_logit, is_top1 = (
        None if x is None else x.detach()
        for x in (stats.sum_sq_probs, stats.mean_logit, stats.is_top1)
    )
    return stats.logprob, stats.entropy, sum_sq_probs, mean_logit, is_top1


def chunked_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    beta: float,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_final_logit_softcapping: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what TRL's `ChunkedDivergenceFunction.apply` does, by `linear_token_stats`.

    Args:
        student_hidden: [N, H]; student_weight: [V, H]; the teacher's hidden size may differ.
        beta: 0 is KL(teacher‖student), 1 is KL(student‖teacher). Between them TRL's own function
            computes the generalised Jensen-Shannon divergence.

    Returns:
        (divergence [N], the student's entropy [N] without gradient).
    """
    student = (student_logit_scale, student_final_logit_softcapping)
    teacher = (teacher_logit_scale, teacher_final_logit_softcapping)
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    unsupported = _unsupported(tensors, temperature, student[1], student[0])
    if 0 < beta < 1:
        unsupported = f"beta={beta} is a generalised Jensen-Shannon divergence"
    elif student != teacher:
        unsupported = "student and teacher scale or softcap their logits differently"
    if unsupported is not None:
        _warn_once(f"TRL's own divergence function runs: {unsupported}")
        heads = (student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
        return TRL_DIVERGENCE.apply(student_hidden, *heads, beta, temperature, *student, *teacher)
    # The log-prob of some token is computed too, and not read.
    tokens = torch.zeros(len(student_hidden), dtype=torch.int64, device=student_hidden.device)
    params = (student_weight, student_bias, teacher_weight, teacher_bias)
    with _gather(*params), _gathered_in_backward(params):
        stats = LMHead(student_weight, student_bias, None, *student).token_stats(
            student_hidden,
            tokens,
            temperature=temperature,
            ref_head=LMHead(teacher_weight, teacher_bias, None, *teacher),
            ref_hidden=teacher_hidden,
            kl="forward" if beta == 0 else "reverse",
        )
    assert stats.kl is not None and stats.entropy is not None
    return stats.kl, stats.entropy.detach()


@contextmanager
def lm_head(
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    head_of: Any = None,
) -> Iterator[LMHead]:
    """Make the LMHead of TRL's arguments, or that of the model `head_of`.

    TRL has gathered the former where ZeRO-3 shards them. Backward gathers what it reads again.
    """
    params = (weight, bias)
    if head_of is not None:
        params = tuple(head_of.get_output_embeddings().parameters())
    with _gather(*params), _gathered_in_backward(params):
        head = LinearHead(weight, bias, None) if head_of is None else linear_head(head_of)
        yield LMHead(*head, scale, softcap)


def _gather(*params: Any) -> AbstractContextManager[Any]:
    """Gather the parameters that ZeRO-3 shards, but for those that are gathered already."""
    return trl_utils.maybe_gather_lm_head_ctx(*params)


@contextmanager
def _gathered_in_backward(params: Iterable[Tensor | None]) -> Iterator[None]:
    """Make backward gather the parameters that ZeRO-3 shards, which forward would save."""
    sharded = [x for x in params if x is not None and hasattr(x, "ds_status")]
    if not sharded:
        yield
        return

    def pack(x: Tensor) -> Tensor:
        for param in sharded:  # x is an alias of one, which would keep the gathered memory
            if x.data_ptr() == param.data_ptr() and x.shape == param.shape:
                return param
        return x

    def unpack(x: Tensor) -> Tensor:
        if not any(x is param for param in sharded):
            return x
        with _gather(x):
            return x.detach()  # keeps the gathered memory until the operator has read it

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _unsupported(
    tensors: tuple[Tensor, ...], temperature: float, softcap: float | None, scale: float
) -> str | None:
    """Say why our operators cannot take these arguments; None if they can."""
    for name, x in (("temperature", temperature), ("logit_scale", scale), ("softcap", softcap)):
        if x is not None and not (0 < x < math.inf):
            return f"{name} must be positive, got {x}"
    for x in tensors:
        if x.dtype not in _DTYPES:
            return f"the head and its hidden states must be fp16, bf16, fp32 or fp64, got {x.dtype}"
        if x.device.type not in _DEVICES:
            return f"the device must be one of {', '.join(_DEVICES)}, got {x.device}"
    return None


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        _logger.warning(message)


class _Function:
    """An object with the one method of an autograd function that TRL calls."""

    def __init__(self, apply: Callable[..., Any]) -> None:
        self.apply = apply


def _compacts(device: torch.device) -> bool:
    """Tell TRL to pass on only the tokens that have a label; its own function does so on a GPU."""
    return device.type in _DEVICES or _TRL_COMPACTS(device)


_TRL_COMPACTS = getattr(trl_utils, COMPACTS)
_OURS = {TRL_LOGPROB: _Function(chunked_logprob), TRL_DIVERGENCE: _Function(chunked_divergence)}
_active: set["Patch"] = set()


class Patch:
    """The handle that `patch` returns; leaving its `with` block undoes the patch."""

    def undo(self) -> None:
        """Give TRL its own functions back, unless another patch is active; twice is as once."""
        if self in _active:
            _active.remove(self)
            if not _active:
                _exchange({ours: theirs for theirs, ours in _OURS.items()}, _TRL_COMPACTS)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch() -> Patch:
    """Make TRL compute the log-probs and divergences of its fused heads by our operators.

        patch()                  until the end of the process
        with patch(): ...        inside the block

    SFT, DPO, KTO, RLOO, GRPO, AsyncGRPO and Distillation trainers are covered, made before or
    after, on text and images, with PEFT, FSDP2 and DeepSpeed as in TRL. Experimental trainers that
    compute logits, such as ORPO and GKD, are not. Patches may be nested.
    """
    handle = Patch()
    if not _active:
        _exchange(_OURS, _compacts)
    _active.add(handle)
    return handle


def _exchange(new_of: Mapping[Any, Any], compacts: Callable[[torch.device], bool]) -> None:
    """Replace objects in all modules of TRL that are loaded, by whatever name."""
    modules = [x for name, x in list(sys.modules.items()) if name.split(".")[0] == "trl"]
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, (type, _Function)) and value in new_of:
                setattr(module, name, new_of[value])
    for module in (trl_utils, distillation_trainer):
        setattr(module, COMPACTS, compacts)


@contextmanager
def scored_by(apply: Callable[..., Any], head_of: Any = None) -> Iterator[None]:
    """Call `apply` in place of TRL's log-prob function in the models that run inside the block.

    head_of: the model that runs if PEFT wraps its head.
    """
    head: Any = None if head_of is None else head_of.get_output_embeddings()
    lacks_bias = head_of is not None and not hasattr(head, "bias")
    if lacks_bias:  # trainable_token_indices; TRL reads it
        head.bias = None
    before = {name: getattr(trl_utils, name) for name in (LOGPROB, COMPACTS)}
    setattr(trl_utils, LOGPROB, _Function(apply))
    setattr(trl_utils, COMPACTS, _compacts)
    try:
        yield
    finally:
        if lacks_bias:
            del head.bias
        for name, value in before.items():
            setattr(trl_utils, name, value)


def scored_by_stats(model: nn.Module, *, entropy_grad: bool) -> Any:
    """Compute the log-probs of a model by `chunked_logprob`, with the adapters on its head."""
    head_of = adapted_model(model)
    apply = partial(chunked_logprob, head_of=head_of, entropy_grad=entropy_grad)
    return scored_by(apply, head_of)


def adapted_model(model: nn.Module) -> nn.Module | None:
    """Return the transformers model inside wrappers if PEFT wraps its head, else None."""
    inner: Any = unwrap(model)
    bases = type(inner.get_output_embeddings()).__mro__
    return inner if any(base.__module__.startswith("peft.") for base in bases) else None
