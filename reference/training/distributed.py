"""One run on several processes, as torchrun starts them: a rank for each GPU, or for each CPU.

Every rank draws the same questions, answers its share of them, and is told the answers of all: so
advantages, denominators and metrics are those of one process. Each learns from its share of the
groups; DistributedDataParallel or FSDP2 adds up the gradients.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from reference.training.errors import UserError
from reference.training.model.activation_checkpointing import checkpointable_layers

Value = TypeVar("Value")
Parallel = Literal["ddp", "fsdp"]

PATIENCE = timedelta(hours=1)  # while the first rank saves; a rank that has died is seen at once
LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def check(self, prompts: int, sampler: str) -> None:
        """Raise a UserError where the settings do not go with this many ranks."""
        if prompts < self.size:
            raise UserError(f"--prompts must be at least the {self.size} ranks; got {prompts}")
        if self.size > 1 and sampler in ("generate", "continuous"):
            raise UserError(
                f"--sampler {sampler} draws on each rank alike: take shared-prompt or a server"
            )

    def told(self, value: Value) -> Value:
        """What the first rank says; from another, tensors are on the CPU."""
        if self.size == 1:
            return value
        said = [moved(value, torch.device("cpu")) if self.is_first else None]
        dist.broadcast_object_list(said)
        return said[0]

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """While this lasts only the first rank prints."""
        if self.is_first:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield

    def share(self, items: Sequence) -> Sequence:
        """Those of consecutive items that are this rank's; `gathered` has them in order again."""
        at = [len(items) * n // self.size for n in (self.rank, self.rank + 1)]
        return items[slice(*at)]

    def gathered(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order; from several, tensors are on the CPU."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, moved(value, torch.device("cpu")))
        return found

    def seeds(self, rows: int) -> list[int]:
        """A seed for each row of this rank, out of those of all ranks' rows."""
        counts = self.gathered(rows)
        first = sum(counts[: self.rank])
        return torch.randint(2**31, (sum(counts),))[first : first + rows].tolist()

    @contextmanager
    def draws(self, rows: int, device: torch.device) -> Iterator[Draws]:
        """Random numbers for the rows of a batch: those that one process would draw for them."""
        draws = Draws(self, rows, device)
        yield draws
        draws.catch_up()

    def wrapped(self, model: nn.Module, parallel: Parallel) -> nn.Module:
        """The model whose gradients are means over ranks; fsdp leaves the given one in shards."""
        if self.size == 1:
            return model
        if parallel == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        from torch.distributed.fsdp import fully_shard

        for layer in checkpointable_layers(model):
            fully_shard(layer)
        return fully_shard(model)

    def whole(self, model: nn.Module) -> AbstractContextManager:
        """While this lasts, each rank has the whole model, and calls it as often as it likes."""
        return nullcontext() if self.size == 1 else _whole(model)


ALONE = Ranks()  # one process


class Draws:
    """Numbers of [0, 1) for the rows of this rank, out of the draws for all ranks' rows."""

    def __init__(self, ranks: Ranks, rows: int, device: torch.device) -> None:
        counts = ranks.gathered(rows)
        first = sum(counts[: ranks.rank])
        self._ranks, self._own = ranks, slice(first, first + rows)
        self._rows, self._device, self._done = sum(counts), device, 0

    def __call__(self) -> Tensor:
        self._done += 1
        return torch.rand(self._rows, device=self._device)[self._own]

    def catch_up(self) -> None:
        """Draw as often as the rank that drew most, so that all go on alike."""
        for _ in range(max(self._ranks.gathered(self._done)) - self._done):
            self()


def start(device: torch.device) -> tuple[Ranks, torch.device]:
    """The ranks that torchrun has started, and the device of this one; one process without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # On one node torchrun keeps its store over a restart: gloo would look for the dead there.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=size)
    return Ranks(rank, size), device


def is_lost(error: RuntimeError) -> bool:
    """Whether another rank has ended, and this error says no more than that."""
    return dist.is_initialized() and any(words in str(error) for words in LOST)


def finish() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Its weights and buffers by name, whole, tied ones once; every rank must call this."""
    weights = dict(model.named_parameters())
    shared = dict(model.named_parameters(remove_duplicate=False)).keys()
    buffers = {name: x for name, x in model.state_dict().items() if name not in shared}
    return {name: whole_tensor(x.detach()) for name, x in (weights | buffers).items()}


def is_sharded(model: nn.Module) -> bool:
    return any(hasattr(each, "full_tensor") for each in model.parameters())


def whole_tensor(value: Tensor) -> Tensor:
    """All of a tensor of which this rank may hold a shard; every rank must call this."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def as_sharded(value: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, in the shards of `like`, if that has any."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)


def without_sync(model: nn.Module) -> AbstractContextManager:
    """While this lasts gradients of DistributedDataParallel add up on each rank."""
    is_ddp = isinstance(model, nn.parallel.DistributedDataParallel)
    return model.no_sync() if is_ddp else nullcontext()


def moved(value: Any, device: torch.device) -> Any:
    """The value with every tensor in it on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved(each, device) for name, each in value.items()}
    if isinstance(value, list):
        return [moved(each, device) for each in value]
    if is_dataclass(value):
        names = [each.name for each in fields(value)]
        return replace(value, **{name: moved(getattr(value, name), device) for name in names})
    return value


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    from torch.distributed.fsdp import FSDPModule

    sharded = [each for each in model.modules() if isinstance(each, FSDPModule)]
    for each in sharded:
        each.set_reshard_after_forward(False, recurse=False)
        each.unshard()
    try:
        yield
    finally:
        for each in sharded:
            each.reshard()
            each.set_reshard_after_forward(each is not model, recurse=False)
