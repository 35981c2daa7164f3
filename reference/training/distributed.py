"""One run on several processes, started by torchrun: one rank per GPU, or per CPU process.

Every rank draws the same questions, samples completions for its shard of them, and gathers those of
all ranks. Advantages, denominators and metrics are therefore those of a single process. Each rank
computes the gradient of its share of the groups; DistributedDataParallel or FSDP2 adds them up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, is_dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from grpo_kernels import TokenSupport
from reference.training.errors import UserError
from reference.training.model.activation_checkpointing import checkpointable_layers

Value = TypeVar("Value")

TIMEOUT = timedelta(hours=1)  # rank 0 may save for long; a rank that died is noticed at once
PEER_LOST_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run and this process's place among them.

    Attributes:
        generator: of `seeds`; None: the global one of PyTorch.
    """

    rank: int = 0
    size: int = 1
    generator: torch.Generator | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def check_settings(self, prompts: int, sampler: str, async_rollout: bool = False) -> None:
        """Raise a UserError if these settings do not work with this many ranks."""
        if prompts < self.size:
            raise UserError(f"--prompts must be at least the {self.size} ranks; got {prompts}")
        if self.size > 1 and sampler in ("generate", "continuous"):
            raise UserError(
                f"--sampler {sampler} draws on each rank alike: take shared-prompt or a server"
            )
        if self.size > 1 and async_rollout:
            raise UserError(f"--async-rollout works in one process; got {self.size} ranks")

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's value; with several ranks, its tensors are on the CPU."""
        if self.size == 1:
            return value
        values: list[Any] = [to_device(value, torch.device("cpu")) if self.is_first else None]
        dist.broadcast_object_list(values)
        return values[0]

    def all_gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks in order; with several, their tensors are on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, to_device(value, torch.device("cpu")))
        return values

    def shard(self, items: Sequence) -> Sequence:
        """Return this rank's consecutive items; `all_gather` restores their order."""
        start, end = (len(items) * n // self.size for n in (self.rank, self.rank + 1))
        return items[start:end]

    @contextmanager
    def only_rank0_prints(self) -> Iterator[None]:
        """Discard what other ranks print to stdout."""
        if self.is_first:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield

    def seeds(self, rows: int) -> list[int]:
        """Return a seed for each row of this rank, out of those of all ranks' rows."""
        counts = self.all_gather(rows)
        first = sum(counts[: self.rank])
        seeds = torch.randint(2**31, (sum(counts),), generator=self.generator)
        return seeds[first : first + rows].tolist()

    @contextmanager
    def shared_rng(self, rows: int, device: torch.device) -> Iterator[Callable[[], Tensor]]:
        """Yield a function that draws a number in [0, 1) for each row of this rank.

        The numbers are those that a single process would draw for the rows of all ranks.
        """
        counts = self.all_gather(rows)
        first, draws = sum(counts[: self.rank]), 0

        def draw() -> Tensor:
            nonlocal draws
            draws += 1
            return torch.rand(sum(counts), device=device)[first : first + rows]

        yield draw
        # Draw as often as every other rank, so that the generators agree again.
        for _ in range(max(self.all_gather(draws)) - draws):
            draw()

    def wrap_fsdp(self, model: nn.Module) -> None:
        """Shard the model in place with FSDP2, if there are several ranks."""
        if self.size == 1:
            return
        from torch.distributed.fsdp import fully_shard

        for layer in checkpointable_layers(model):
            fully_shard(layer)
        fully_shard(model)

    @contextmanager
    def unsharded(self, model: nn.Module) -> Iterator[None]:
        """Give each rank the whole model, which it may then call independently of the others."""
        if self.size == 1:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in sharded:
                module.reshard()
                module.set_reshard_after_forward(module is not model, recurse=False)


SINGLE_PROCESS = Ranks()


def init_distributed(device: torch.device) -> tuple[Ranks, torch.device]:
    """Join the ranks that torchrun started, if it did; return them and this rank's device."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return SINGLE_PROCESS, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun on one node reuses its store after a restart: without a prefix, gloo would find
        # the addresses of dead ranks there.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)
    return Ranks(rank, size), device


def is_peer_lost(error: RuntimeError) -> bool:
    """Return True if this error only reports that another rank has ended."""
    return dist.is_initialized() and any(words in str(error) for words in PEER_LOST_MESSAGES)


def finish_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """Return all weights and buffers of a sharded model, tied weights once. A collective."""
    if not any(hasattr(param, "full_tensor") for param in model.parameters()):
        return None
    weights = dict(model.named_parameters())
    with_ties = dict(model.named_parameters(remove_duplicate=False)).keys()
    buffers = {name: x for name, x in model.state_dict().items() if name not in with_ties}
    return {name: full_tensor(x.detach()) for name, x in (weights | buffers).items()}


def full_tensor(value: Any) -> Tensor:
    """Return the whole of a tensor that may be sharded. A collective."""
    gather = getattr(value, "full_tensor", None)  # of a DTensor
    return value if gather is None else gather()


def shard_like(value: Tensor, like: Any) -> Tensor:
    """Shard a tensor that every rank holds, as `like` is sharded."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(value, like.device_mesh, like.placements)


def to_device(value: Any, device: torch.device) -> Any:
    """Copy a nested value with every tensor in it on the device."""
    if isinstance(value, (Tensor, TokenSupport)):
        return value.to(device)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    if isinstance(value, list):
        return [to_device(item, device) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **to_device(vars(value), device))
    return value
