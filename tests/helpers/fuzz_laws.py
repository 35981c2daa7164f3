"""Properties of a drawn call that hold bit for bit, whatever its numbers."""

from dataclasses import replace

import torch
from torch import Tensor

from tests.helpers.fuzz_cases import OBJECTIVES, ROWS, Call
from tests.helpers.fuzz_oracle import assert_same_bits, results
from tests.helpers.supports import with_wrong_ids

GARBAGE = (torch.nan, torch.inf, -torch.inf)


def check_laws(call: Call, ours: dict[str, Tensor], device: str) -> None:
    """Check repeated runs, garbage under the mask, and the order and number of rows."""
    assert_same_bits(results(call, device), ours, "in a second run")
    if call.mask is not None and call.shape:
        assert_same_bits(results(_fill_masked(call), device), ours, "with garbage under the mask")
    if call.name in OBJECTIVES and len(call.shape) == 2 and not _sums_over_batch(call):
        _check_rows(call, ours, torch.arange(call.shape[0]).flip(0), device)
    if call.name in ("token_stats", "linear_token_stats") and call.shape[0] > 0:
        if call.name == "token_stats":
            _check_rows(call, ours, torch.arange(call.shape[0]).flip(0), device)
        # At the hidden level a row's bits depend on its position in the product (BLAS).
        if call.name == "token_stats" or call.arguments["chunk_tokens"] is not None:
            _check_rows(call, ours, torch.arange(1), device)


def _sums_over_batch(call: Call) -> bool:
    """Tell whether sums over the batch, whose order rounds, affect a token's gradient."""
    config = call.arguments["config"]
    filters = (config.top_entropy, config.clip_cov, config.kl_cov)
    return call.name == "linear_grpo_loss" or any(setting is not None for setting in filters)


def _fill_masked(call: Call) -> Call:
    """Fill masked tokens with NaN, inf, -inf, id -100 or the ids of no support."""
    drop = call.mask == 0
    config = call.arguments.get("config")
    if config is not None and config.nll_coef != 0:
        drop &= call.arguments["nll_weight"] == 0
    filled = {}
    for number, name in enumerate(sorted(call.arguments)):
        if name in ("mask", "nll_weight") or not call.is_token_level(name):
            continue
        x = call.arguments[name]
        masked = drop.unsqueeze(-1) if name in ROWS else drop
        filled[name] = x.masked_fill(masked, GARBAGE[number % 3] if name != "tokens" else -100)
    if "support" in call.arguments:
        filled["support"] = with_wrong_ids(call.arguments["support"], ~drop)
    upstream = {
        name: g.masked_fill(drop, torch.nan) if g.shape == drop.shape else g
        for name, g in call.upstream.items()
    }
    return replace(call.with_arguments(**filled), upstream=upstream)


def _check_rows(call: Call, ours: dict, rows: Tensor, device: str) -> None:
    """Check that reordered or selected rows give the same bits."""
    arguments = {name: x[rows] for name, x in call.arguments.items() if _is_by_row(call, name)}
    if "support" in call.arguments:
        index = torch.arange(torch.Size(call.shape).numel()).view(call.shape)[rows]
        arguments["support"] = call.arguments["support"].select(index)
    upstream = {name: g[rows] if g.dim() else g for name, g in call.upstream.items()}
    selected = replace(
        call.with_arguments(**arguments), shape=(len(rows), *call.shape[1:]), upstream=upstream
    )
    found = results(selected, device)
    names = [n for n, x in ours.items() if x.dim() and n not in ("d_weight", "d_bias")]
    expected = {name: ours[name][rows] for name in names}
    assert_same_bits({name: found[name] for name in names}, expected, f"in rows {rows}")


def _is_by_row(call: Call, name: str) -> bool:
    """Tell whether the first dimension of an argument is that of the tokens."""
    x = call.arguments[name]
    if name == "temperature" and isinstance(x, Tensor) and x.dim() == len(call.shape):
        return x.shape[0] == call.shape[0]
    return call.is_token_level(name) or name == "advantages"
