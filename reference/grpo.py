"""GRPO on one page: sample completions, reward them, and make the better ones more likely.

    python reference/grpo.py                        Llama 3.2 1B, on a GPU
    python reference/grpo.py HuggingFaceTB/SmolLM2-135M-Instruct    on a CPU, minutes
    python reference/grpo.py DIRECTORY              any causal language model

For plain PyTorch instead of the fused kernels, change the line `import grpo_kernels as losses` to
`import losses`. Those functions have the same arguments and values, and keep every logit in memory.

Left out, and in train.py: several updates of one batch (with the ratio to the old policy and its
clip), evaluation, checkpoints, several GPUs, LoRA, faster sampling, data of your own, and LM heads
that scale or cap their logits, as Gemma's do.
"""

import copy
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo_kernels as losses
from grpo_kernels import LossConfig

MODEL = sys.argv[1] if len(sys.argv) > 1 else "meta-llama/Llama-3.2-1B-Instruct"
STEPS, PROMPTS, GROUP = 20, 4, 8  # completions of a step: PROMPTS · GROUP
MAX_NEW_TOKENS = 16
LEARNING_RATE = 1e-5
LOSS = LossConfig(
    beta=0.04,  # of the KL to the reference policy: limits the divergence
    entropy_coef=0.001,  # of the entropy: adds diversity
)


def make_questions(n: int) -> tuple[list[str], list[str]]:
    """Dummy data: n sums and their results."""
    pairs = torch.randint(0, 10, (n, 2)).tolist()
    return [f"What is {a} + {b}? Answer with a number." for a, b in pairs], [
        str(a + b) for a, b in pairs
    ]


def reward(completion: str, answer: str) -> float:
    """1 for the answer alone, 0.5 for the answer among other words, else 0."""
    words = completion.replace(".", " ").replace("=", " ").split()
    return 1.0 if words == [answer] else 0.5 if answer in words else 0.0


def hidden_and_head(model, ids, attention_mask):
    """Run the model without its LM head: hidden states [B, T, H], and the head's weight [V, H]."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # prompts are padded on the left
    output = model.base_model(
        input_ids=ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
    )
    return output.last_hidden_state, model.get_output_embeddings().weight


def main() -> list[float]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
    policy.to(device)
    reference = copy.deepcopy(policy).requires_grad_(False)  # the policy before training
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    history = []

    for step in range(1, STEPS + 1):
        # Sample a group of completions for each question.
        questions, answers = make_questions(PROMPTS)
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions
        ]
        prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        prompts = prompts.to(device)
        ids = policy.generate(
            **prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=GROUP,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        length = prompts["input_ids"].shape[1]
        sampled = ids[:, length:]

        # The loss mask: completions up to their end-of-turn token.
        ends = torch.isin(
            sampled, torch.tensor(policy.generation_config.eos_token_id, device=device)
        )
        mask = ends.cumsum(-1) - ends.long() == 0
        prompt_mask = prompts["attention_mask"].repeat_interleave(GROUP, 0)
        attention_mask = torch.cat((prompt_mask, mask.long()), dim=1)

        # Rewards [PROMPTS, GROUP], and how each differs from its group: the advantages.
        completions = [
            tokenizer.decode(row[keep], skip_special_tokens=True).strip()
            for row, keep in zip(sampled, mask, strict=True)
        ]
        rewards = torch.tensor(
            [reward(text, answers[i // GROUP]) for i, text in enumerate(completions)]
        ).view(PROMPTS, GROUP)
        spread = rewards.std(dim=-1, keepdim=True).clamp(min=1e-6)
        advantages = ((rewards - rewards.mean(dim=-1, keepdim=True)) / spread).flatten().to(device)

        # Log-probs of the sampled tokens under the reference policy. A hidden state predicts the
        # next token, so those of the completion begin one position earlier.
        predicting = slice(length - 1, -1)
        with torch.no_grad():
            hidden, head = hidden_and_head(reference, ids, attention_mask)
            hidden = hidden[:, predicting]
            ref_logprob = losses.linear_token_stats(hidden, head, sampled, mask=mask).logprob

        # The loss: policy gradient + beta · KL - entropy_coef · entropy. No logits are stored.
        hidden, head = hidden_and_head(policy, ids, attention_mask)
        loss, metrics = losses.linear_grpo_loss(
            hidden[:, predicting], head, sampled, advantages,
            mask=mask, ref_logprob=ref_logprob, config=LOSS,
        )  # fmt: skip

        # One step of gradient descent.
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        history.append(rewards.mean().item())
        print(
            f"step {step:2}  reward {history[-1]:.2f}  kl {metrics['kl']:.4f}  "
            f"entropy {metrics['entropy']:.2f}  {questions[0]} -> {completions[0]!r} "
            f"({rewards[0, 0]:.1f})",
            flush=True,
        )
    return history


if __name__ == "__main__":
    main()
