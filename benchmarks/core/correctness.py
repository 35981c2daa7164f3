"""No clock runs for a wrong answer: values and gradients against the reference in fp64.

Two limits. A peer may round its logits to the dtype of its inputs and still be timed, its error
beside its time; what errs more computes something else, and is refused. Ours must keep the
numerics that its documentation promises.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.core import problem as problems
from benchmarks.core.shapes import Shape
from benchmarks.core.tasks import TASKS, Task, gradients
from benchmarks.peers import OURS, PEERS, REFERENCE, Peer

TOKENS = 32

# The largest error of a value (root mean square, relative where values are above 1), and of a
# gradient (norm of the difference over the norm). Gradients from bf16 are rounded to it once.
PROMISED = {"fp32": (1e-5, 1e-5), "bf16": (1e-5, 4e-3)}
# Entropies of thousands of terms, and log-probs near 10, from logits rounded at 16.
TOLERATED = {"fp32": (1e-3, 1e-3), "bf16": (0.1, 0.1)}


class Refused(AssertionError):
    """An answer too far from fp64 to be worth timing."""


def limits(peer: str, dtype: str) -> tuple[float, float]:
    return (PROMISED if peer.startswith(OURS) else TOLERATED)[dtype]


def check(task: Task, shape: Shape, peer: str, device: torch.device) -> dict[str, float]:
    """Errors of a peer by output and gradient, at TOKENS tokens of the shape's head and dtype.

    Raises:
        Refused: one is above the limit, or is NaN, or an output is missing.
    """
    found = errors(task, _gate_shape(shape), PEERS[peer], device)
    of_values, of_gradients = limits(peer, shape.dtype)
    for name, error in found.items():
        limit = of_gradients if name.startswith("d_") else of_values
        if not error <= limit:
            raise Refused(f"error of {name} {error:.1e}, above {limit:.0e}")
    return found


def errors(task: Task, shape: Shape, peer: Peer, device: torch.device) -> dict[str, float]:
    """By output name, and "d_" and the name of each leaf."""
    problem, exact_values, exact_gradients = _exact(task.name, shape, device)
    problem = peer.prepare(problem)
    outputs = peer.tasks[task.name](problem)
    if missing := set(exact_values) - set(outputs):
        raise Refused(f"no {', '.join(sorted(missing))}")
    found = gradients(outputs, problem)
    values = {name: _error_of_values(outputs[name], exact) for name, exact in exact_values.items()}
    return values | {
        f"d_{name}": _error_of_gradient(found[name], exact)
        for name, exact in exact_gradients.items()
    }


def _gate_shape(shape: Shape) -> Shape:
    return replace(shape, N=TOKENS)


@lru_cache(maxsize=1)  # a weight's gradient in fp64 takes 2 GB under Llama's head
def _exact(task: str, shape: Shape, device: torch.device):
    task = TASKS[task]
    problem = problems.make(task.level, shape, device, reference=task.reference)
    double = problem.double()
    outputs = PEERS[REFERENCE].tasks[task.name](double)
    found = gradients(outputs, double)
    return problem, {name: outputs[name].detach() for name in task.outputs}, found


def _error_of_values(value: Tensor, exact: Tensor) -> float:
    difference = value.detach().double().flatten() - exact.flatten()
    return (_rms(difference) / exact.square().mean().sqrt().clamp(min=1.0)).item()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _error_of_gradient(gradient: Tensor, exact: Tensor) -> float:
    if gradient.shape != exact.shape:  # one more position, for a peer that asked for it
        gradient = gradient[:, : exact.shape[1]]
    rows = zip(gradient.flatten(0, -2).split(1024), exact.flatten(0, -2).split(1024), strict=True)
    # By rows: a whole weight's difference in fp64 is gigabytes that are touched once.
    squares = sum((mine.double() - theirs).square().sum() for mine, theirs in rows)
    return (squares.sqrt() / exact.norm()).item()
