"""Where a run stands between two steps: everything by which the next step differs from the first.

The position in the data is the state of the generator that orders the questions; the learning rate
follows from the number of steps. A sampler keeps nothing from step to step.
"""

from __future__ import annotations

import hashlib
import platform
import random
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from reference.training.distributed import full_tensor, shard_like
from reference.training.errors import UserError
from reference.training.model.policy import Policy
from reference.training.run.checkpoint import Checkpoint, Checkpoints
from reference.training.run.graceful_shutdown import GracefulShutdown, Stopped
from reference.training.run.run_directory import save_policy
from reference.training.update.learner import Learner


class TrainingState:
    """A learner, the order of questions, and how far they are.

    Args:
        order: draws the questions.
        settings: of the run, as JSON has them.

    Attributes:
        step: the last whole one, 0 before the first.
        saved: the step of the last checkpoint, 0 where there is none.
    """

    def __init__(self, learner: Learner, order: random.Random, settings: Mapping[str, Any]) -> None:
        self.learner, self.order, self.settings = learner, order, settings
        self.step, self.saved_step, self.tokens_seen, self.seconds = 0, 0, 0, 0.0
        self._since = time.perf_counter()
        self._frozen = _digest_of_frozen(learner.policy.model)
        self.record_rng()

    @property
    def elapsed(self) -> float:
        """Seconds, those of before the run was resumed too."""
        return self.seconds + time.perf_counter() - self._since

    def record_rng(self) -> None:
        """A step begins: one that is dropped while it samples leaves the run here."""
        device = self.learner.policy.device
        self._rng = {"cpu": torch.get_rng_state()}
        if device.type != "cpu":
            self._rng[device.type] = torch.get_device_module(device).get_rng_state()
        self._random = {
            "order": self.order.getstate(),
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
        }

    def advance(self, tokens: int) -> None:
        """A step is whole."""
        self.step += 1
        self.tokens_seen += tokens
        self.record_rng()

    def save(self, checkpoints: Checkpoints) -> None:
        """By the first rank; every rank must call it.

        Raises:
            UserError: the disk does not take it.
        """
        ranks, tensors, failed = self.learner.policy.ranks, self.tensors(), None
        if ranks.is_first:
            try:
                checkpoints.save(self.step, self.state_dict(), tensors)
            except UserError as error:
                failed = error
        failed = ranks.broadcast(failed)
        if failed is not None:
            raise failed
        self.saved_step = self.step

    def try_save(self, checkpoints: Checkpoints) -> None:
        """Where the disk does not take it, say so: ending the run would lose more."""
        try:
            self.save(checkpoints)
        except UserError as error:
            left = (
                f"the last one is of step {self.saved_step}" if self.saved_step else "there is none"
            )
            print(f"\nno checkpoint of step {self.step}: {error}; {left}", file=sys.stderr)

    def save_interrupted(
        self,
        error: BaseException,
        checkpoints: Checkpoints,
        shutdown: GracefulShutdown,
        directory: Path,
    ) -> None:
        """Save a checkpoint if the run was stopped between two steps, and the model if possible."""
        policy = self.learner.policy
        try:
            stopped = isinstance(error, Stopped | KeyboardInterrupt) and not shutdown.is_deferred
            if stopped and self.step > self.saved_step:
                self.save(checkpoints)
        finally:
            # Several ranks save a model together: only if all of them were stopped.
            if self.step > 0 and (policy.ranks.size == 1 or isinstance(error, Stopped)):
                save_policy(directory, policy, self.step)

    def state_dict(self) -> dict[str, Any]:
        """What JSON can say, as of the last `record_rng`."""
        numpy = self._random["numpy"]
        key = numpy["state"]["key"].tolist()
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "seconds": self.elapsed,
            "learner": self.learner.state_dict(),
            "random": self._random | {"numpy": numpy | {"state": numpy["state"] | {"key": key}}},
            "settings": self.settings,
            "frozen": self._frozen,
            "device": self.learner.policy.device.type,
            "versions": versions(),
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What it cannot, by kind and name, on the CPU; to the first rank, but all must call it."""
        learner = self.learner
        reference = (
            learner.reference_policy.model if isinstance(learner.reference_policy, Policy) else None
        )
        keep = partial(_on_cpu, kept=learner.policy.ranks.is_first)
        return {
            "model": keep(trained(learner.policy.model)),
            "optimizer": keep(_moments(learner)),
            "reference": {} if reference is None else keep(dict(reference.named_parameters())),
            "rng": self._rng,
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Stand where the checkpoint was made.

        Raises:
            UserError: its tensors are not of this model, or were trained beside other frozen
                weights, or it was made on another device.
        """
        state, learner = checkpoint.state, self.learner
        device = learner.policy.device
        if state["device"] != device.type:
            raise UserError(
                f"{checkpoint.path} was made on {state['device']}: it cannot go on on {device.type}"
            )
        if state["frozen"] != self._frozen:
            raise UserError(
                f"{checkpoint.path} is of another model: the frozen weights of --model "
                f"{self.settings['model']} are not those that it was trained on"
            )
        if state["versions"] != versions():
            before = ", ".join(f"{name} {number}" for name, number in state["versions"].items())
            print(f"{checkpoint.path} was made by {before}: numbers may differ in the last bits")
        _fill(trained(learner.policy.model), checkpoint.tensors("model"), checkpoint)
        if isinstance(learner.reference_policy, Policy):
            frozen = dict(learner.reference_policy.model.named_parameters())
            _fill(frozen, checkpoint.tensors("reference"), checkpoint)
        _load_moments(learner, checkpoint.tensors("optimizer"))
        learner.load_state_dict(state["learner"])
        self.step = self.saved_step = state["step"]
        self.tokens_seen, self.seconds = state["tokens_seen"], state["seconds"]

        saved = state["random"]
        self.order.setstate(_as_tuples(saved["order"]))
        random.setstate(_as_tuples(saved["python"]))
        numpy = saved["numpy"]
        key = np.array(numpy["state"]["key"], dtype=np.uint32)
        np.random.set_state(numpy | {"state": numpy["state"] | {"key": key}})
        rng = checkpoint.tensors("rng")
        torch.set_rng_state(rng["cpu"])
        if device.type != "cpu":
            torch.get_device_module(device).set_rng_state(rng[device.type])
        self.record_rng()


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformers": transformers.__version__,
    }


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What moves, by name; of an adapted model the adapter alone, and tied weights once."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def _digest_of_frozen(model: nn.Module) -> str | None:
    """SHA-256 of the weights that do not train, which no checkpoint holds; None without any.

    Those under an adapter, above all. Every rank has to call it: shards are gathered.
    """
    weights = {name: each for name, each in model.named_parameters() if not each.requires_grad}
    if not weights:
        return None
    found = hashlib.sha256()
    for name, each in weights.items():
        found.update(f"{name} {each.dtype} {list(each.shape)}\n".encode())
        whole = full_tensor(each.detach()).cpu().contiguous()
        found.update(whole.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _moments(learner: Learner) -> dict[str, Tensor]:
    """AdamW's state as <weight>.<exp_avg, exp_avg_sq or step>."""
    state = learner.optimizer.state
    return {
        f"{name}.{key}": value
        for name, each in trained(learner.policy.model).items()
        for key, value in state.get(each, {}).items()
    }


def _load_moments(learner: Learner, moments: Mapping[str, Tensor]) -> None:
    """The inverse; an optimiser numbers its weights in the order of `trained`."""
    weights = trained(learner.policy.model)
    numbers = {name: number for number, name in enumerate(weights)}
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in moments.items():
        weight, _, key = name.rpartition(".")
        value = value if key == "step" else shard_like(value, weights[weight])
        state.setdefault(numbers[weight], {})[key] = value
    learner.optimizer.load_state_dict(learner.optimizer.state_dict() | {"state": state})


def _on_cpu(tensors: Mapping[str, Tensor], *, kept: bool) -> dict[str, Tensor]:
    """The tensors whole, one after the other; a rank that keeps none of them only takes part."""
    found = {}
    for name, each in tensors.items():
        whole = full_tensor(each.detach())
        if kept:
            found[name] = whole.cpu().contiguous()
    return found


@torch.no_grad()
def _fill(
    parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor], checkpoint: Checkpoint
) -> None:
    odd = sorted(parameters.keys() ^ saved.keys())
    if odd:
        holder = "the checkpoint" if odd[0] in saved else "the model"
        raise UserError(f"{checkpoint.path} is of another model: only {holder} has {odd[0]}")
    for name, each in parameters.items():
        if (each.shape, each.dtype) != (saved[name].shape, saved[name].dtype):
            kinds = [f"{list(x.shape)} in {x.dtype}" for x in (saved[name], each)]
            raise UserError(
                f"{checkpoint.path} is of another model: {name} is {kinds[0]} in it, and "
                f"{kinds[1]} in the model"
            )
    for name, each in parameters.items():
        each.copy_(shard_like(saved[name].to(each.device), each))


def _as_tuples(state: list) -> tuple:
    """As `random.setstate` wants what `getstate` gave, which JSON knows as lists."""
    version, internal, gauss = state
    return version, tuple(internal), gauss
