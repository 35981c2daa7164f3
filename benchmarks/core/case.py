"""The list of measured cases: a task, a phase, a shape and a peer."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass

import torch

from benchmarks.core.results import Record
from benchmarks.core.roofline import FLOORS
from benchmarks.core.shapes import Shape, shapes
from benchmarks.core.tasks import TASKS, Task
from benchmarks.peers import PEERS

# Tasks of a training loop: measured beyond the base shape. On a CPU a matmul takes half a second
# under the head of a larger model, and only the losses are measured there.
HEADLINES = ("token_stats", "grpo_loss", "linear_token_stats", "linear_token_stats_frozen")
HEADLINES += ("linear_grpo_loss",)
LOSSES = ("grpo_loss", "linear_grpo_loss")


@dataclass(frozen=True)
class Case:
    task: Task
    phase: str
    shape: Shape
    peer: str  # of PEERS, or a floor

    def __str__(self) -> str:
        return f"{self.group}, {self.peer}"

    @property
    def group(self) -> str:
        return f"{self.task.name}, {self.phase}, {self.shape}"

    def new_record(self) -> Record:
        return Record(self.task.name, self.phase, *astuple(self.shape), self.peer)


def cases(level: str, device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """Yield the cases of a level, those of one shape together: its tensors are made once."""
    floor, _ = FLOORS[level]
    base, *variations = shapes(device, quick=quick)
    for shape in (base, *variations):
        for task in TASKS.values():
            if shape.inert:
                measured = task.skips_inert and task.variant == "plain"
            elif device.type == "cpu" and shape.model != base.model:
                measured = task.name in LOSSES
            else:
                measured = shape == base or task.name in HEADLINES
            if task.level != level or not measured:
                continue
            for phase in task.cost if shape == base else ("both",):
                yield Case(task, phase, shape, floor)
                for peer in PEERS.values():
                    if (
                        task.name in peer.tasks
                        and (peer.every_phase or phase == "both")
                        and (peer.every_shape or shape == base)
                    ):
                        yield Case(task, phase, shape, peer.name)
