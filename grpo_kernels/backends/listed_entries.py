"""Rows of logits of which a few entries, the listed ones, are treated apart from the rest.

Columns [..., K] are the listed entries of each row; a negative one is none.
"""

import torch
from torch import Tensor

from ..objective.token_gradients import TokenGrads
from ..objective.top_k_divergence import Rest
from .choice import backend_for
from .interface import RowInputs, RowStats, StatsRequest

NO_TOKEN = -1  # for the row functions: a row without a one-hot term


def listed_logits(rows: RowInputs, columns: Tensor) -> Tensor:
    """Copy the logits of columns [B, T, K], in the accumulation dtype; -inf where there is none."""
    logits = rows.logits.gather(-1, columns.clamp_min(0)).to(rows.temperature.dtype)
    return torch.where(columns < 0, -torch.inf, logits)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap · tanh(logits / softcap); -inf stays -inf."""
    if softcap is None:
        return logits
    return torch.where(logits == -torch.inf, logits, softcap * (logits / softcap).tanh())


def take_listed(rows: RowInputs, columns: Tensor) -> tuple[Tensor, RowStats, Tensor]:
    """Set the listed logits to -inf, in place.

    Returns:
        (the listed logits [n, K], the statistics of the others [n], whether there are none [n]),
        with n = B·T.
    """
    listed = listed_logits(rows, columns)
    _set_listed(rows.logits, columns, torch.full_like(listed, -torch.inf))
    others = rows._replace(tokens=torch.full_like(rows.tokens, NO_TOKEN), ref_logits=None, kl=None)
    stats = backend_for(rows.logits).token_stats_forward(others, StatsRequest(entropy=True))
    stats = stats.map(lambda x: x.flatten(0, 1))
    return listed.flatten(0, 1), stats, (stats.row_lse == -torch.inf).any(-1)


def write_listed_gradient(
    rows: RowInputs, listed: Tensor, columns: Tensor, rest: Rest, dx: Tensor, d_logits: Tensor
) -> None:
    """Write the gradient of rows to d_logits [B, T, V], which may be rows.logits itself.

    Args:
        listed: [n, K], the listed logits; those in `rows` are not read, and may be -inf.
        dx: [n, K + 1], the gradient after the softcap and the temperature of the listed logits, and
            the sum of that of the others; each of these has its share by probability.
    """
    slope = rows.temperature.reciprocal().reshape(-1, 1)
    if rows.softcap is not None:
        slope = slope * (1.0 - (listed / rows.softcap).tanh().square())
    values = torch.where(listed == -torch.inf, 0.0, dx[:, :-1] * slope)
    row_lse = torch.stack((rest.pivot, rest.log_sum), dim=-1)
    row_lse = torch.where(rest.is_empty.unsqueeze(-1), 0.0, row_lse)
    B, T, _ = d_logits.shape
    backend_for(rows.logits).token_stats_backward(
        rows._replace(tokens=torch.full_like(rows.tokens, NO_TOKEN), ref_logits=None, kl=None),
        RowStats(None, None, None, row_lse.view(B, T, 2)),
        TokenGrads(-dx[:, -1].contiguous().view(B, T), None, None),
        d_logits,
    )
    _set_listed(d_logits, columns, values.view(columns.shape))


def _set_listed(rows: Tensor, columns: Tensor, values: Tensor) -> None:
    """Write values [B, T, K] to the listed entries of rows [B, T, V] in place."""
    is_listed, values = columns >= 0, values.to(rows.dtype)
    # A column that is none repeats the first that is one, or what its row has in column 0.
    first = is_listed.to(torch.uint8).argmax(-1, keepdim=True)
    place = torch.where(is_listed, columns, columns.gather(-1, first)).clamp_min(0)
    has_any = is_listed.any(-1, keepdim=True)
    other = torch.where(has_any, values.gather(-1, first), rows.gather(-1, place))
    rows.scatter_(-1, place, torch.where(is_listed, values, other))
