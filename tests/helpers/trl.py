"""A tiny model on disk, and a few training steps of TRL's trainer or the fused one on it."""

from copy import deepcopy
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MixtralConfig,
    MixtralForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

from reference.training.model.load import from_scratch

ROOT = Path(mkdtemp(prefix="trl_cases_"))
CLOCKS = ("time", "runtime", "per_second")


@cache
def model_directory() -> str:
    """Save a Llama over 16 characters, peaked enough that entropies differ; return its path."""
    torch.manual_seed(0)
    model, tokenizer = from_scratch()
    for param in model.parameters():
        if param.dim() == 2:
            torch.nn.init.normal_(param, std=0.15)
    model.save_pretrained(ROOT / "model")
    tokenizer.save_pretrained(ROOT / "model")
    return str(ROOT / "model")


def digits(completions, **_):
    """A reward, the number of digits: it differs within a group."""
    return [float(sum(letter.isdigit() for letter in text)) for text in completions]


def make_config(kind=GRPOConfig, **settings):
    """Make a configuration of a class; settings that it does not know are left out."""
    defaults = {
        "output_dir": str(ROOT / "run"),
        "use_cpu": True,
        "bf16": False,
        "optim": "sgd",  # Adam would amplify the rounding of small gradients
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    known = {field.name for field in fields(kind) if field.init}
    return kind(**{name: x for name, x in defaults.items() if name in known} | settings)


def make_tokenizer():
    return AutoTokenizer.from_pretrained(model_directory())


def make_llama(*, noise: float = 0.0):
    """Load the model, with noise added to each weight."""
    model = AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters() if noise else ():
            param.add_(torch.randn_like(param), alpha=noise)
    return model


def make_experts():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 16}
    sizes |= {"num_hidden_layers": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    config = MixtralConfig(pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes)
    return MixtralForCausalLM(config)


IMAGE = "<image>"
CHAT = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def make_processor():
    """Make a processor of text and of images, 4 tokens each."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    images = CLIPImageProcessor(
        size={"shortest_edge": 4}, crop_size={"height": 4, "width": 4}, do_convert_rgb=True
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=2,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
    )


@cache
def vision_directory() -> str:
    """Save a vision model of 3k parameters and its processor; return their path."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = CLIPVisionConfig(hidden_size=8, image_size=4, patch_size=2, **sizes)
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    text = LlamaConfig(vocab_size=17, hidden_size=16, initializer_range=0.5, **sizes, **ends)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=16,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(ROOT / "vision")
    make_processor().save_pretrained(ROOT / "vision")
    return str(ROOT / "vision")


def make_vision():
    return LlavaForConditionalGeneration.from_pretrained(vision_directory(), dtype=torch.float32)


def make_images(rows: int) -> list[Image.Image]:
    return [Image.new("RGB", (5, 5), (40 * i % 256, 90 * i % 256, 10)) for i in range(rows)]


def make_trainer(kind, *, make_model=make_llama, peft_config=None, **settings):
    """Make a trainer of a class, from seed 0."""
    torch.manual_seed(0)
    return kind(
        make_model(),
        digits,
        args=make_config(**settings),
        train_dataset=Dataset.from_dict({"prompt": ["1+2=", "34+5=", "7-", "88+11="] * 8}),
        processing_class=make_tokenizer(),
        peft_config=deepcopy(peft_config),  # PEFT modifies it
    )


def train(trainer) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train; return the logs without times, and the change of each weight."""
    before = {name: x.detach().clone() for name, x in trainer.model.named_parameters()}
    trainer.train()
    logs = [
        {name: x for name, x in log.items() if not any(clock in name for clock in CLOCKS)}
        for log in trainer.state.log_history
    ]
    after = {name: unshard(x.detach()) for name, x in trainer.model.named_parameters()}
    return logs, {name: x - before[name] for name, x in after.items()}


def unshard(x: torch.Tensor) -> torch.Tensor:
    """All-gather a weight that FSDP shards."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "down_proj"])}
COPIED_HEAD = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
PROMPT = {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
# Several updates per batch of completions, so that the old policy differs from the current one.
REUSED = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4}
ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
MISALIGNED = {**ACCUMULATED, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 4}
REUSE = {"reused": REUSED, "misaligned": MISALIGNED}
# VESPO's weight is steep in the sequence's probability: far from the old policy rounding grows.
VESPO = {"loss_type": "vespo", "learning_rate": 0.02}
CASES = {
    "grpo, reused": {"loss_type": "grpo", "beta": 0.04, "temperature": 0.7, **REUSED},
    "bnpo, delta": {"loss_type": "bnpo", "delta": 1.5, "entropy_coef": 0.05, **REUSED},
    "dr_grpo, checkpointing": {
        **{"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.04},
        **{"gradient_checkpointing": True, **ACCUMULATED},
    },
    "dapo, lora": {**LORA, "beta": 0.04, "entropy_coef": 0.01, "temperature": 0.7, **REUSED},
    "cispo, batch": {"loss_type": "cispo", "scale_rewards": "batch", **MISALIGNED},
    "sapo, accumulated": {"loss_type": "sapo", "beta": 0.04, "entropy_coef": -0.01, **ACCUMULATED},
    "luspo, sequence": {"loss_type": "luspo", "importance_sampling_level": "sequence", **REUSED},
    "vespo, reused": {**VESPO, "temperature": 0.7, "scale_rewards": "none", **REUSED},
    "gspo, delta": {
        **{"loss_type": "grpo", "importance_sampling_level": "sequence", "delta": 1.5},
        **{"beta": 0.04, "gradient_checkpointing": True, **MISALIGNED},
    },
    "copied head, checkpointing": {
        **{"peft_config": COPIED_HEAD, "gradient_checkpointing": True, "beta": 0.04, **REUSED},
    },
    "prompt tuning": {**PROMPT, "beta": 0.04, "learning_rate": 1.0},
    "top entropies": {"top_entropy_quantile": 0.4, **REUSED},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 3.0, **ACCUMULATED},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, **REUSED},
    "truncated masked": {"mask_truncated_completions": True, "max_completion_length": 3},
    "experts": {"make_model": make_experts, "router_aux_loss_coef": 0.5, "temperature": 2.0},
    "head in fp32": {"cast_lm_head_to_fp32": True, "beta": 0.04, **REUSED},
}


@cache
def trained_by_trl(name: str):
    """Train a case with TRL's trainer."""
    return train(make_trainer(GRPOTrainer, **CASES[name]))


def check_same(found, expected, *, loss_type=None):
    """Assert that the logs and the changes of the weights of two trainings agree."""
    (logs, weights), (expected_logs, expected_weights) = found, expected
    assert [log.keys() for log in logs] == [log.keys() for log in expected_logs]
    # VESPO's loss is a sum of large terms that cancel: both trainers are 3e-6 off fp64.
    floor = 1e-5 if loss_type == "vespo" else 1e-6
    for log, expected_log in zip(logs, expected_logs, strict=True):
        assert log == pytest.approx(expected_log, rel=1e-5, abs=floor)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=5e-7)
