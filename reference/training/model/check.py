"""Checks of a loaded model on a few tokens: its sampler, its positions and its chat template.

Samplers and the trainer must agree on the log-probs of a completion. Not every model can do what
they ask of it: some read padding as text, and some keep a state that cannot be repeated for a
group. A table of model families would never be complete, so the model itself is tried.

Sizes: B prompts, G completions per prompt, T tokens per completion, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grpo_kernels.integrations.transformers import unwrap
from reference.training.distributed import SINGLE_PROCESS
from reference.training.errors import UserError, one_line
from reference.training.rollout.generate import Completions, Prompts
from reference.training.rollout.packing import pack_completions
from reference.training.rollout.sampler import Sampler
from reference.training.rollout.samplers import Generate, SharedPrompt
from reference.training.tasks.questions import Question

PROMPT_LENGTHS, G, T = (3, 6), 2, 3
# Error of a log-prob, divided by the difference between two prompts. Over 45 families in fp32,
# rounding was 1e-7 to 5e-4 of it, and padding that is read as text 0.02 or more.
TOLERANCE = 0.005


def choose_sampler(policy) -> Sampler:
    """Return the policy's sampler, or `generate` if shared-prompt does not fit the model.

    It is a UserError if the log-probs of the trainer are not those that the model gives to a
    sequence alone, or if no sampler has those of the trainer.
    """
    own: Sampler = policy.sampler
    if not isinstance(own, SharedPrompt | Generate):  # it was asked for, and raises itself
        return own
    name, ranks, device = type(unwrap(policy.model)).__name__, policy.ranks, policy.device
    options = {"precision": "off", "ranks": SINGLE_PROCESS, "truncation": None}
    policy = replace(policy, max_new_tokens=T, **options)
    prompts = _random_prompts(policy)
    devices = [] if device.type == "cpu" else [device]
    problems = []
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(0)
        for sampler in (own,) if isinstance(own, Generate) else (own, Generate()):
            try:
                completions = sampler.sample(policy, prompts, G, 1.0)
            except Exception as error:  # each model and cache raises its own type
                problems.append(f"{type(error).__name__}: {one_line(error)}")
                continue
            expected, scale = _trainer_logprobs(policy, prompts, completions)
            error = (completions.logprob - expected)[completions.mask].abs().max().item()
            if error <= TOLERANCE * scale:
                break
            problems.append(f"its log-probs differ by {error:.2g} from those of a full pass")
        else:
            raise UserError(f"{name} cannot be sampled here: {problems[-1]}")
    if problems:
        print(f"--sampler generate: {name} cannot share the prompt of a group: {problems[0]}")
        ranks.check_settings(ranks.size, "generate")
    return sampler


def _random_prompts(policy) -> Prompts:
    """Draw left-padded prompts from the tokens that are not special."""
    special = {*policy.tokenizer.all_special_ids, *policy.eos_ids}
    usable = torch.tensor(sorted({*policy.tokenizer.get_vocab().values()} - special))
    B, P = len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)
    drawn = torch.randint(len(usable), (B, P), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(P) >= P - torch.tensor(PROMPT_LENGTHS)[:, None]
    ids = torch.where(mask, usable[drawn], policy.tokenizer.pad_token_id)
    return Prompts(ids.to(policy.device), mask.to(policy.device))


def _trainer_logprobs(policy, prompts: Prompts, completions: Completions) -> tuple[Tensor, float]:
    """Compute log-probs [B·G, T] as the trainer does, and how much they depend on the prompt.

    Those of the first prompt, which is padded, are compared with a pass over each sequence alone.
    """
    name, tokens = type(unwrap(policy.model)).__name__, completions.tokens
    packed = pack_completions(policy.model, prompts, tokens, completions.mask)
    rows = torch.cat([prompts.ids[0][prompts.mask[0]].expand(G, -1), tokens[:G]], dim=1)
    try:
        trained = packed.select_predictions(policy.model(**packed.model_inputs()).logits)
        alone = policy.model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{name} cannot be trained here: {reason}") from None
    alone = alone[:, -1 - tokens.shape[1] : -1]
    trained, alone = (logits.float().log_softmax(-1) for logits in (trained, alone))
    trained_alone = trained[:G][completions.mask[:G]]
    scale, error = (
        (x - y).nan_to_num(0.0, 0.0, 0.0).abs().max().item()  # a token may be impossible
        for x, y in ((trained[0, 0], trained[G, 0]), (trained_alone, alone[completions.mask[:G]]))
    )
    if error <= TOLERANCE * scale:
        return trained.gather(-1, tokens[..., None]).squeeze(-1), scale
    raise UserError(
        f"{name} cannot be trained here: beside padding and other completions, a log-prob differs "
        f"by {error:.2g} from that of the sequence alone; between two prompts by {scale:.2g}"
    )


def learned_positions(model: Any) -> int | None:
    """Return the largest number of tokens of a model with a table of positions, else None."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    tables = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
    ]
    # GPT-J and CTRL do not learn theirs, but it ends all the same.
    names = ("embed_positions", "pos_encoding")
    tables += [buffer for name, buffer in model.named_buffers() if name.endswith(names)]
    is_table = (0 <= len(table) - limit <= 2 for table in tables)  # OPT has two rows more
    return limit if any(is_table) else None


def check_questions(policy, questions: Sequence[Question]) -> int:
    """Encode the first and the longest question: errors of the template come before step 1.

    Print a warning if a completion of the longest may exceed the positions of the model's training.

    Returns:
        The number of tokens of the prompt of the longest one (in characters), 0 without questions.
    """
    if not questions:
        return 0
    longest = max(questions, key=lambda question: sum(len(m["content"]) for m in question.messages))
    prompts = policy.encode([questions[0].prompt, longest.prompt])
    length = int(prompts.mask.sum(-1).max())
    limit = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length + policy.max_new_tokens > limit:
        print(
            f"warning: a prompt of {length} tokens and --max-new-tokens {policy.max_new_tokens} "
            f"exceed the {limit} positions (max_position_embeddings) that the model was made for"
        )
    return length
