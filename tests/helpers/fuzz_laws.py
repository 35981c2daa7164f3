"""What must hold to the last bit of a drawn call, whatever its numbers."""

from dataclasses import replace

import torch
from torch import Tensor

from tests.helpers.fuzz_cases import OBJECTIVES, ROWS, Call
from tests.helpers.fuzz_oracle import assert_same_bits, results

GARBAGE = (torch.nan, torch.inf, -torch.inf)


def check_laws(call: Call, ours: dict[str, Tensor], device: str) -> None:
    assert_same_bits(results(call, device), ours, "in a second run")
    if call.mask is not None and call.shape:
        assert_same_bits(results(_spoiled(call), device), ours, "with garbage under the mask")
    if call.name in OBJECTIVES and len(call.shape) == 2 and not _looks_around(call):
        _check_order(call, ours, torch.arange(call.shape[0]).flip(0), device)
    if call.name in ("token_stats", "linear_token_stats") and call.shape[0] > 0:
        if call.name == "token_stats":
            _check_order(call, ours, torch.arange(call.shape[0]).flip(0), device)
        # At the hidden level a row keeps its place in the product: BLAS has other bits elsewhere.
        if call.name == "token_stats" or call.arguments["chunk_tokens"] is not None:
            _check_order(call, ours, torch.arange(1), device)


def _looks_around(call: Call) -> bool:
    """Whether sums over the batch, whose order rounds, reach a token's gradient."""
    config = call.arguments["config"]
    filters = (config.top_entropy, config.clip_cov, config.kl_cov)
    return call.name == "linear_grpo_loss" or any(each is not None for each in filters)


def _spoiled(call: Call) -> Call:
    drop = call.mask == 0
    spoiled = {}
    for number, name in enumerate(sorted(call.arguments)):
        if name == "mask" or not call.is_token_level(name):
            continue
        x = call.arguments[name]
        hole = drop.unsqueeze(-1) if name in ROWS else drop
        spoiled[name] = x.masked_fill(hole, GARBAGE[number % 3] if name != "tokens" else -100)
    upstream = {
        name: g.masked_fill(drop, torch.nan) if g.shape == drop.shape else g
        for name, g in call.upstream.items()
    }
    return replace(call.with_arguments(**spoiled), upstream=upstream)


def _check_order(call: Call, ours: dict, order: Tensor, device: str) -> None:
    """Rows or sequences in another order, or some of them alone, have the bits that they had."""
    rows = {n: x[order] for n, x in call.arguments.items() if _by_row(call, n)}
    upstream = {n: g[order] if g.dim() else g for n, g in call.upstream.items()}
    shape = (len(order), *call.shape[1:])
    other = results(replace(call.with_arguments(**rows), shape=shape, upstream=upstream), device)
    names = [n for n, x in ours.items() if x.dim() and n not in ("d_weight", "d_bias")]
    expected = {name: ours[name][order] for name in names}
    assert_same_bits({name: other[name] for name in names}, expected, f"in the order {order}")


def _by_row(call: Call, name: str) -> bool:
    """Whether the first dimension of an argument is that of the tokens."""
    x = call.arguments[name]
    if name == "temperature" and isinstance(x, Tensor) and x.dim() == len(call.shape):
        return x.shape[0] == call.shape[0]
    return call.is_token_level(name) or name == "advantages"
