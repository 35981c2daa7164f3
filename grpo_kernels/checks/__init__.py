"""Argument checks: the one place where error messages are written.

A shape, a dtype or a setting is always checked. What a tensor holds is checked only where looking
costs nothing: eagerly on the CPU, never on a GPU, where it would wait for the device.
"""

from ..validation import expect_choice, expect_mask, expect_number, expect_tensor
from .loss_config import check_combination, check_numbers
from .objective import (
    check_advantages,
    check_cu_seqlens,
    check_entropy_input,
    check_kl_input,
    check_logprob,
    check_max_completion_length,
    check_normalizers,
    check_per_token,
    check_sampling_input,
    check_type,
)

__all__ = [
    "check_advantages",
    "check_combination",
    "check_cu_seqlens",
    "check_entropy_input",
    "check_kl_input",
    "check_logprob",
    "check_max_completion_length",
    "check_normalizers",
    "check_numbers",
    "check_per_token",
    "check_sampling_input",
    "check_type",
    "expect_choice",
    "expect_mask",
    "expect_number",
    "expect_tensor",
]
