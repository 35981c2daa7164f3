"""The correctness gate: values and gradients against the reference in fp64, before the clock.

There are two limits. A peer that rounds its logits to the dtype of its inputs is timed, and its
error is shown beside its time; a larger error means that it computes something else, and it is
refused. Ours must meet the accuracy that its documentation promises.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.core.problem import Problem, make_problem
from benchmarks.core.shapes import Shape
from benchmarks.core.tasks import TASKS, Task, gradients
from benchmarks.peers import OURS, PEERS, REFERENCE

TOKENS = 32

# Limits (of values, of gradients). The error of a value is the root mean square, relative if values
# are above 1; that of a gradient is the norm of the difference over the norm. bf16 gradients are
# rounded once.
OUR_LIMITS = {"fp32": (1e-5, 1e-5), "bf16": (1e-5, 4e-3)}
# For entropies of thousands of terms and log-probs near 10 from logits near 16, rounded to bf16.
PEER_LIMITS = {"fp32": (1e-3, 1e-3), "bf16": (0.1, 0.1)}


class Refused(AssertionError):
    """Raised if the result of an implementation is too far from fp64 to be worth timing."""


def check(task: Task, shape: Shape, peer: str, device: torch.device) -> dict[str, float]:
    """Return the errors of a peer by output and gradient ("d_hidden"), at TOKENS tokens.

    Raises:
        Refused: an error is above the limit or NaN, or an output is missing.
    """
    problem, exact_values, exact_gradients = exact_results(
        task.name, replace(shape, N=TOKENS), device
    )
    problem = PEERS[peer].prepare(problem)
    outputs = PEERS[peer].tasks[task.name](problem)
    if missing := exact_values.keys() - outputs.keys():
        raise Refused(f"no {', '.join(sorted(missing))}")
    errors = {}
    for name, value in exact_values.items():
        difference = outputs[name].detach().double().flatten() - value.flatten()
        size = value.square().mean().sqrt().clamp(min=1.0)
        errors[name] = (difference.square().mean().sqrt() / size).item()
    for name, gradient in gradients(outputs, problem).items():
        errors[f"d_{name}"] = gradient_error(gradient, exact_gradients[name])

    limits = OUR_LIMITS if peer.startswith(OURS) else PEER_LIMITS
    value_limit, gradient_limit = limits[shape.dtype]
    for name, error in errors.items():
        limit = gradient_limit if name.startswith("d_") else value_limit
        if not error <= limit:
            raise Refused(f"error of {name} {error:.1e}, above {limit:.0e}")
    return errors


@lru_cache(maxsize=1)  # the weight's gradient in fp64 takes 2 GB under Llama's head
def exact_results(
    task_name: str, shape: Shape, device: torch.device
) -> tuple[Problem, dict[str, Tensor], dict[str, Tensor]]:
    """Return (problem, values, gradients), the latter two in fp64."""
    task = TASKS[task_name]
    problem = make_problem(task.level, shape, device, task.variant)
    double = problem.double()
    outputs = PEERS[REFERENCE].tasks[task.name](double)
    values = {name: outputs[name].detach() for name in task.outputs}
    return problem, values, gradients(outputs, double)


def gradient_error(gradient: Tensor, exact: Tensor) -> float:
    if gradient.shape != exact.shape:  # Liger's has one more position
        gradient = gradient[:, : exact.shape[1]]
    # By blocks of rows: the difference of a whole weight in fp64 takes gigabytes.
    blocks, exact_blocks = (x.flatten(0, -2).split(1024) for x in (gradient, exact))
    squares = sum(
        (block.double() - exact_block).square().sum()
        for block, exact_block in zip(blocks, exact_blocks, strict=True)
    )
    return (squares.sqrt() / exact.norm()).item()
