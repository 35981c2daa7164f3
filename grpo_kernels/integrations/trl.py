"""TRL's trainers on our operators.

`patch()` serves the trainers of TRL that have a fused head: log-probs and entropies of SFT, DPO,
KTO, RLOO, GRPO and AsyncGRPO, and the KL divergence of Distillation.

    from grpo_kernels.integrations.trl import patch

    patch()

FusedGRPOTrainer, and `fuse_trainer` for an existing trainer, do the same for one trainer. With
`fuse_loss=True` the gradient of the loss comes from `linear_grpo_loss`: three matmuls of the head
per token if the loss is token-level, whatever the number of tokens, and one for a group with equal
rewards.

    from datasets import Dataset
    from trl import GRPOConfig

    from grpo_kernels.integrations.trl import FusedGRPOTrainer


    def digits(completions, **_):
        return [float(sum(letter.isdigit() for letter in text)) for text in completions]


    config = GRPOConfig(
        output_dir="run",
        max_steps=2,
        per_device_train_batch_size=8,
        max_completion_length=16,
        temperature=0.7,
        beta=0.04,
        entropy_coef=0.001,
    )
    trainer = FusedGRPOTrainer(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        digits,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [f"{n}+{n}=" for n in range(10)]}),
        fuse_loss=True,
    )
    trainer.train()

TRL's own code runs the model, so images, PEFT, gradient checkpointing, FSDP and DeepSpeed work as
in TRL. A LoRA on the head, which TRL refuses, is for FusedGRPOTrainer; it must have no dropout and
no variant such as DoRA.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer import grpo_trainer

from .linear_head import linear_head
from .trl_fused_loss import MASKS, SCORES, check_loss, fused_loss, loss_owner
from .trl_seam import patch, scored_by_stats

__all__ = ["FusedGRPOTrainer", "fuse_trainer", "patch"]

LOSS = "_compute_loss"


class FusedGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with the same arguments and fused per-token log-probs and entropies.

    Args:
        fuse_loss: compute the gradient of the policy loss together with the loss. The value, the
            metrics and the entropy controller stay TRL's. With a sequence-level ratio, or a filter
            that ranks tokens, this saves only the groups with equal rewards. A token whose
            probability differs from the old or the reference policy's by more than a factor e^20
            has no gradient, as in `policy_loss`.

    Raises:
        ValueError, TypeError: a setting that the fused loss does not support, or a LoRA on the head
            that `linear_token_stats` does not.
    """

    def __init__(self, *args: Any, fuse_loss: bool = False, **keywords: Any):
        with _accept_lora_on_head():
            super().__init__(*args, **keywords)
        _check_adapter(self)
        if fuse_loss:
            _check_not_overridden(self, SCORES, *MASKS)
            _check_not_overridden(self, LOSS, after=FusedGRPOTrainer)
            check_loss(self)
        self._fuse_loss = fuse_loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        compute_loss = super()._compute_loss
        if self._fuse_loss:
            return fused_loss(self, compute_loss, model, inputs)
        return compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, *arguments: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with scored_by_stats(model, entropy_grad=self._entropy_bonus_enabled):
            return super()._get_per_token_logps_and_entropies(model, *arguments, **keywords)


def fuse_trainer(trainer: Any, *, fuse_loss: bool = False) -> Any:
    """Make an existing trainer compute its log-probs and entropies as FusedGRPOTrainer does.

    Args:
        trainer: a GRPOTrainer or an RLOOTrainer, or a subclass.
        fuse_loss: see FusedGRPOTrainer; for GRPOTrainer, and for TRL's GMPOTrainer. A subclass must
            not override `_compute_loss`, or the scores, masks and weights that it reads.

    Returns:
        The same trainer.

    Raises:
        ValueError, TypeError: a setting that the fused loss does not support.
    """
    allowed = GRPOTrainer if fuse_loss else (GRPOTrainer, RLOOTrainer)
    if not issubclass(type(trainer), allowed):
        names = "trl.GRPOTrainer" + ("" if fuse_loss else " or trl.RLOOTrainer; patch() serves all")
        raise TypeError(f"trainer must be a {names}, got {type(trainer).__name__}")
    if fuse_loss:
        _check_not_overridden(trainer, SCORES, LOSS, *MASKS)
        check_loss(trainer)
        compute_loss = getattr(loss_owner(trainer), LOSS).__get__(trainer)
        setattr(trainer, LOSS, partial(fused_loss, trainer, compute_loss))
    if SCORES not in vars(trainer):
        scores = getattr(trainer, SCORES)
        has_entropy_bonus = getattr(trainer, "_entropy_bonus_enabled", False)  # not in RLOO

        def scores_by_stats(model: nn.Module, *arguments: Any, **keywords: Any) -> Any:
            with scored_by_stats(model, entropy_grad=has_entropy_bonus):
                return scores(model, *arguments, **keywords)

        setattr(trainer, SCORES, scores_by_stats)
    return trainer


def _check_adapter(trainer: GRPOTrainer) -> None:
    """Refuse a LoRA on the head, accepted against TRL, that would not be computed exactly."""
    args: Any = trainer.args  # a GRPOConfig, which transformers.Trainer does not know
    if not _has_tuner_on_head(trainer.model):
        return
    linear_head(trainer.model)
    if args.cast_lm_head_to_fp32:
        raise ValueError(
            "cast_lm_head_to_fp32 must be False with a LoRA on the head, got True: TRL's cast "
            "replaces the forward of the head, and leaves the adapter out"
        )


def _has_tuner_on_head(model: Any) -> bool:
    checked_class = getattr(grpo_trainer, _TUNER, ())
    return isinstance(model.get_output_embeddings(), checked_class)


_TUNER = "BaseTunerLayer"  # of PEFT; TRL has it only if PEFT is installed


@contextmanager
def _accept_lora_on_head() -> Iterator[None]:
    """Keep TRL's constructor from refusing a LoRA on the head, which only its own loss ignores."""
    own = getattr(grpo_trainer, _TUNER, None)
    if own is None:
        yield
        return
    setattr(grpo_trainer, _TUNER, ())  # nothing is an instance of no class
    try:
        yield
    finally:
        setattr(grpo_trainer, _TUNER, own)


def _check_not_overridden(trainer: Any, *names: str, after: type | None = None) -> None:
    """Refuse a subclass whose own version of a method the fused loss would not call.

    after: a base class; those before it in the order of methods are called.
    """
    order = type(trainer).__mro__
    start = 0 if after is None else order.index(after) + 1
    for name in names:
        expected = loss_owner(trainer) if name == LOSS else GRPOTrainer
        owner = next(
            base for base in order[start:] if name in vars(base) and base is not FusedGRPOTrainer
        )
        if owner is not expected:
            raise TypeError(
                f"trainer must leave {name} to {expected.__name__}, got {type(trainer).__name__} "
                f"with that of {owner.__name__}, which would not be called"
            )
