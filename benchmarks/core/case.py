"""Which task, in which phase, at which shape, by whom: the list of what is measured."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.core.floors import FLOORS
from benchmarks.core.shapes import Shape, shapes
from benchmarks.core.tasks import TASKS, Task
from benchmarks.peers import PEERS

# Beyond the base shape: those that a training loop calls; under other heads on a CPU, where a
# product takes half a second, the losses only.
HEADLINES = ("token_stats", "grpo_loss", "linear_token_stats", "linear_grpo_loss")
LOSSES = ("grpo_loss", "linear_grpo_loss")


@dataclass(frozen=True)
class Case:
    task: Task
    phase: str
    shape: Shape
    peer: str

    def __str__(self) -> str:
        return f"{self.task.name}, {self.phase}, {self.shape}, {self.peer}"

    @property
    def group(self) -> str:
        return f"{self.task.name}, {self.phase}, {self.shape}"


def cases(level: str, device: torch.device, *, quick: bool = False) -> list[Case]:
    """Of "logits" or "hidden"; those of a shape together, so that its tensors are made once."""
    found = shapes(device, quick=quick)
    return [
        Case(task, phase, shape, peer)
        for shape in found
        for task in TASKS.values()
        if task.level == level and _is_measured(task, shape, found[0], device)
        for phase in (task.cost if shape == found[0] else ("both",))
        for peer in _peers(task, phase, is_base=shape == found[0])
    ]


def _is_measured(task: Task, shape: Shape, base: Shape, device: torch.device) -> bool:
    if shape.inert:
        return task.skips_inert
    if device.type == "cpu" and shape.model != base.model:
        return task.name in LOSSES
    return shape == base or task.name in HEADLINES


def _peers(task: Task, phase: str, *, is_base: bool) -> Iterator[str]:
    floor, _ = FLOORS[task.level]
    yield floor
    for name, peer in PEERS.items():
        clocked = peer.apart or phase == "both"
        if task.name in peer.tasks and clocked and (is_base or peer.everywhere):
            yield name
