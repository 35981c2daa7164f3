"""Two backends compute the same row functions: fused Triton kernels, or chunked PyTorch.

    token_stats_forward, token_stats_backward    log-prob, entropy, KL of each row; their gradient
    grpo_loss                                    a token-level loss and its gradient in one launch
    approximate_kl_forward, approximate_kl_backward
    jsd_forward, jsd_backward                    a mixture divergence to the reference policy
    scale_

`row_support.py` runs them on the entries that a sampler kept, where tokens have a support.
`interface.py` documents the tensors that go in and come out. The statistics of a row return to the
backend that computed them.
"""

from . import row_support
from .availability import HAS_TRITON, INTERPRETED
from .choice import backend_for, use
from .interface import ApproximateKL, RowInputs, RowStats, StatsRequest, accumulation_dtype

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "ApproximateKL",
    "RowInputs",
    "RowStats",
    "StatsRequest",
    "accumulation_dtype",
    "backend_for",
    "row_support",
    "use",
]
