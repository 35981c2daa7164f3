"""The teacher of an on-policy distillation: a frozen model of any size with the same tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_kernels.integrations.transformers import LMHead, forward_to_hidden
from reference.training.config import ModelSettings, TrainConfig
from reference.training.errors import UserError
from reference.training.model import load as models
from reference.training.model.check import check_questions, choose_sampler
from reference.training.model.policy import Policy
from reference.training.tasks.questions import Question


@dataclass(frozen=True)
class Teacher:
    """The files of --teacher. A wrong one is reported before the weights of any model are read.

    Attributes:
        vocab_size: rows in the head.
    """

    config: TrainConfig
    directory: Path
    vocabulary: Mapping[str, int]
    vocab_size: int

    @classmethod
    def find(cls, config: TrainConfig) -> Teacher:
        """Find or download --teacher, and read its tokenizer."""
        assert config.teacher is not None
        directory = models.locate(config.teacher, config.cache_dir, "--teacher")
        assert directory is not None
        tokenizer, model_config = models.read_tokenizer(directory)
        vocab_size = model_config.get_text_config().vocab_size
        return cls(config, directory, tokenizer.get_vocab(), vocab_size)

    @property
    def _both(self) -> str:
        return f"--teacher {self.config.teacher} and --model {self.config.model}"

    def check_student(self, tokenizer: Any, model_config: Any) -> None:
        """Check that the teacher can read every token of a student."""
        # Merges may differ: they decide how a text is encoded, not what the ids mean.
        ours, theirs = tokenizer.get_vocab(), self.vocabulary
        if ours != theirs:
            token = min(dict(ours.items() ^ theirs.items()), key=lambda token: (len(token), token))
            raise UserError(
                f"{self._both} have different tokenizers, and the teacher reads the student's "
                f"tokens: that of the teacher has {len(theirs)} tokens, that of the student "
                f"{len(ours)}; for example {token!r} is {theirs.get(token)} and {ours.get(token)}"
            )
        # Small models of a family pad their heads to fewer rows than large ones.
        V = model_config.get_text_config().vocab_size
        if V > self.vocab_size:
            raise UserError(
                f"{self._both}: the student has {V} rows in its head and may sample an id that the "
                f"teacher, with {self.vocab_size} rows, does not have"
            )

    def load(self, student: Policy, questions: Sequence[Question]) -> Policy:
        """Load the teacher without gradients, and check that it can score the student.

        Prompts are encoded by the student's tokenizer and chat template: the teacher sees the same
        tokens. Under autocast its linear layers are bf16, as those of a reference policy.
        """
        config = self.config
        teacher = Policy.load(
            ModelSettings(str(self.directory), autocast=config.autocast),
            student.device,
            config.max_new_tokens,
            system=student.system,
        )
        check_questions(teacher, questions)
        choose_sampler(teacher)
        if config.loss_impl == "fused":
            theirs, ours = _head(teacher), _head(student)
            if (theirs.scale, theirs.softcap) != (ours.scale, ours.softcap):
                raise UserError(
                    f"{self._both} differ in the scale and softcap of their logits: expected one "
                    f"of each; got {theirs.scale:g} and {theirs.softcap} of the teacher, "
                    f"{ours.scale:g} and {ours.softcap} of the student; --loss-impl reference "
                    "takes both"
                )
        return teacher.frozen_copy()


@torch.no_grad()
def _head(policy: Policy) -> LMHead:
    ids = torch.tensor([policy.eos_ids[:1]], device=policy.device)
    return forward_to_hidden(policy.model, input_ids=ids, use_cache=False).head
