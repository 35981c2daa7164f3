"""Times to reach on one H100 under Llama 3.2 1B's head in bf16: its limits, and some room.

An H100 reads and writes 3.35 TB/s and multiplies bf16 at about 800 TFLOP/s.
"""

from typing import NamedTuple


class Target(NamedTuple):
    task: str
    phase: str
    N: int
    milliseconds: float


MODEL, DTYPE = "Llama 3.2 1B", "bf16"
TARGETS = (
    Target("token_stats", "forward", 8192, 0.72),
    Target("token_stats", "forward", 16_384, 1.43),
    Target("token_stats", "backward", 8192, 1.45),
    Target("token_stats", "backward", 16_384, 2.9),
    Target("grpo_loss", "both", 8192, 1.6),
    Target("grpo_loss", "both", 16_384, 3.2),
    Target("linear_token_stats", "forward", 8192, 6.5),
    Target("linear_token_stats", "forward", 16_384, 13.0),
    Target("linear_token_stats_frozen", "both", 8192, 13.5),
    Target("linear_token_stats_frozen", "both", 16_384, 27.0),
    Target("linear_grpo_loss", "both", 8192, 19.0),
    Target("linear_grpo_loss", "both", 16_384, 37.0),
    Target("linear_token_stats", "both", 8192, 25.5),
    Target("linear_token_stats", "both", 16_384, 50.0),
    Target("linear_reverse_kl", "forward", 8192, 12.5),
    Target("linear_grpo_loss_kl", "both", 8192, 26.0),
)
