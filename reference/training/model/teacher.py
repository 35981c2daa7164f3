"""The teacher of an on-policy distillation: a frozen model of any size with the same tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo_kernels.integrations.transformers import LMHead, forward_to_hidden
from reference.training.config import ModelSettings, TrainConfig
from reference.training.errors import UserError
from reference.training.model.check import check_questions, choose_sampler
from reference.training.model.policy import Policy
from reference.training.tasks.questions import Question


def load_teacher(config: TrainConfig, student: Policy, questions: Sequence[Question]) -> Policy:
    """Load --teacher without gradients, and check that it can score the student's completions.

    Prompts are encoded by the student's tokenizer and chat template: the teacher sees the same
    tokens. Under autocast its linear layers are bf16, as those of a reference policy.
    """
    assert config.teacher is not None
    teacher = Policy.load(
        ModelSettings(config.teacher, autocast=config.autocast),
        student.device,
        config.max_new_tokens,
        cache_dir=config.cache_dir,
        flag="--teacher",
        system=student.system,
    )
    who = f"--teacher {config.teacher} and --model {config.model}"
    # Merges may differ: they decide how a text is encoded, not what the ids mean.
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours != theirs:
        token = min(dict(ours.items() ^ theirs.items()), key=lambda token: (len(token), token))
        raise UserError(
            f"{who} have different tokenizers, and the teacher reads the student's tokens: that "
            f"of the teacher has {len(theirs)} tokens, that of the student {len(ours)}; for "
            f"example {token!r} is {theirs.get(token)} and {ours.get(token)}"
        )
    # Small models of a family pad their heads to fewer rows than large ones.
    V, teacher_V = (x.model.config.get_text_config().vocab_size for x in (student, teacher))
    if V > teacher_V:
        raise UserError(
            f"{who}: the student has {V} rows in its head and may sample an id that the teacher, "
            f"with {teacher_V} rows, does not have"
        )
    check_questions(teacher, questions)
    choose_sampler(teacher)
    if config.loss_impl == "fused":
        theirs, ours = _head(teacher), _head(student)
        if (theirs.scale, theirs.softcap) != (ours.scale, ours.softcap):
            raise UserError(
                f"{who} differ in the scale and softcap of their logits: expected one of each; got "
                f"{theirs.scale:g} and {theirs.softcap} of the teacher, {ours.scale:g} and "
                f"{ours.softcap} of the student; --loss-impl reference takes both"
            )
    return teacher.frozen_copy()


@torch.no_grad()
def _head(policy: Policy) -> LMHead:
    ids = torch.tensor([policy.eos_ids[:1]], device=policy.device)
    return forward_to_hidden(policy.model, input_ids=ids, use_cache=False).head
