"""The state of a run between two steps: all that the next step depends on.

The position in the data is the state of the generator that orders the questions. The learning rate
follows from the number of steps. Samplers have no state.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import random
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from reference.training.distributed import full_tensor, shard_like
from reference.training.errors import UserError, discard_stdout, one_line
from reference.training.run.checkpoint import Checkpoint, Checkpoints
from reference.training.run.graceful_shutdown import GracefulShutdown, Stopped
from reference.training.run.run_directory import save_policy
from reference.training.run.run_log import RunLog
from reference.training.update.learner import Learner

# --checkpoint-every auto: seconds that a kill may cost, and the least ratio of the time between two
# checkpoints to the time that one takes.
MAX_LOSS = 120.0
MIN_RATIO = 10.0


class Recorded(NamedTuple):
    """State that a step changes before the weights."""

    learner: dict[str, Any]
    random: dict[str, Any]  # Python's generators and NumPy's
    rng: dict[str, Tensor]  # PyTorch's, by device


class TrainingState:
    """A learner, the order of the questions and the progress of the run.

    Attributes:
        step: the last complete step, 0 before the first.
        saved_step: the step of the last checkpoint, None if there is none.
        is_between_steps: the weights are those after `step`.
    """

    def __init__(
        self,
        learner: Learner,
        order: random.Random,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
    ) -> None:
        self.learner, self.order = learner, order
        self.settings, self.inputs = settings, inputs
        self.step, self.tokens_seen = 0, 0
        self.saved_step: int | None = None
        self.is_between_steps = True
        self._started = self._saved_at = time.perf_counter()
        self._save_seconds = 0.0
        self._frozen_digest = digest_frozen_weights(learner.policy.model)
        teacher = learner.teacher
        self._teacher_digest = None if teacher is None else digest_frozen_weights(teacher.model)
        self._has_reference = learner.reference_policy is not None

        def weights_change(*_) -> None:
            self.is_between_steps = False

        learner.optimizer.register_step_pre_hook(weights_change)
        self.record()

    @property
    def elapsed(self) -> float:
        """Seconds of training, including those before the run was resumed."""
        return time.perf_counter() - self._started

    def record(self) -> None:
        """Record what a step changes before the weights, for a checkpoint if it is abandoned."""
        device = self.learner.policy.device
        rng = {"cpu": torch.get_rng_state()}
        if device.type != "cpu":
            rng[device.type] = torch.get_device_module(device).get_rng_state()
        numpy: Any = np.random.get_state(legacy=False)
        numpy["state"]["key"] = numpy["state"]["key"].tolist()
        generators = {
            "order": self.order.getstate(),
            "python": random.getstate(),
            "numpy": numpy,
        }
        # At once, since a signal may come in between.
        self._recorded = Recorded(self.learner.state_dict(), generators, rng)

    def advance(self, tokens: int) -> None:
        """Count a complete step."""
        self.step += 1
        self.tokens_seen += tokens
        self.is_between_steps = True
        self.record()

    def save_if_due(self, checkpoints: Checkpoints, step_time: float = 0.0) -> None:
        """Save as --checkpoint-every says, or print why it failed: ending the run loses more.

        auto: save before the time since the last checkpoint, plus that of another step and of a
        checkpoint, exceeds MAX_LOSS.
        """
        every = self.learner.config.checkpoint_every
        if every is None or self.step == self.saved_step:
            return
        if every == "auto":
            waited = time.perf_counter() - self._saved_at
            is_due = waited + step_time + self._save_seconds > MAX_LOSS
            is_due = is_due and waited > MIN_RATIO * self._save_seconds
            is_due = self.learner.policy.ranks.broadcast(is_due)  # by rank 0's clock
        else:
            is_due = self.step > 0 and self.step % every == 0
        if not is_due and self.step < self.learner.config.steps:
            return
        try:
            self.save(checkpoints)
        except UserError as error:
            last = f"the last one is of step {self.saved_step}"
            last = "there is none" if self.saved_step is None else last
            print(f"\nno checkpoint of step {self.step}: {error}; {last}", file=sys.stderr)

    def save(
        self,
        checkpoints: Checkpoints,
        unwritten: Mapping[str, str] | None = None,
        *,
        alone: bool = False,
    ) -> None:
        """Write a checkpoint on the first rank; every rank must call this, unless it is `alone`.

        Args:
            unwritten: text by file that the logs of this step lack.
        """
        started, tensors, failed = time.perf_counter(), self.tensors(), None
        ranks = self.learner.policy.ranks
        if ranks.is_first:
            state = self.state_dict() | ({"unwritten": dict(unwritten)} if unwritten else {})
            try:
                checkpoints.save(self.step, state, tensors)
            except UserError as error:
                failed = error
        if not alone:
            failed = ranks.broadcast(failed)
        self._saved_at = time.perf_counter()
        self._save_seconds = self._saved_at - started
        if failed is not None:
            raise failed
        self.saved_step = self.step

    def save_interrupted(
        self,
        error: BaseException,
        checkpoints: Checkpoints,
        shutdown: GracefulShutdown,
        log: RunLog,
    ) -> None:
        """Save a checkpoint of the last complete step, and the model, before the run ends.

        A signal stops all ranks, which then save together. An error may have stopped this rank
        alone: then the first rank saves what needs no other rank.
        """
        if shutdown.requested is None:
            shutdown.defer("saving")
        if isinstance(error, BrokenPipeError):
            discard_stdout()
        config, ranks = self.learner.config, self.learner.policy.ranks
        stopped = isinstance(error, Stopped)
        together = stopped or ranks.size == 1
        # A reference policy is missing if memory ran out when it was refreshed.
        is_complete = self._has_reference == (self.learner.reference_policy is not None)
        is_newer = self.step > (self.saved_step or 0)
        try:
            try:
                if is_newer and is_complete and self.is_between_steps:
                    if together or (ranks.is_first and config.parallel == "ddp"):
                        self.save(checkpoints, log.unwritten, alone=not together)
            finally:
                if self.step > 0 and together:
                    save_policy(log.directory, self.learner.policy, self.step)
        except Exception as failed:
            if stopped:
                raise
            print(f"\nsaving after the error failed: {one_line(failed)}", file=sys.stderr)

    def state_dict(self) -> dict[str, Any]:
        """Return the part of the state that is JSON, as of the last `record`."""
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "seconds": self.elapsed,
            "learner": self._recorded.learner,
            "random": self._recorded.random,
            "settings": self.settings,
            "inputs": self.inputs,
            "frozen": self._frozen_digest,
            "teacher": self._teacher_digest,
            "device": self.learner.policy.device.type,
            "versions": versions(),
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors by kind and name, on the CPU of the first rank; all must call this."""
        learner = self.learner
        reference = self._reference_weights()
        trained = trained_weights(learner.policy.model)
        moments = {  # of AdamW
            f"{name}.{key}": value  # exp_avg, exp_avg_sq or step
            for name, weight in trained.items()
            for key, value in learner.optimizer.state.get(weight, {}).items()
        }
        gathered = {"model": trained, "optimizer": moments, "reference": reference}
        for kind, shards in gathered.items():
            gathered[kind] = {}
            for name, shard in shards.items():  # one tensor at a time
                whole = full_tensor(shard.detach())
                if learner.policy.ranks.is_first:
                    gathered[kind][name] = whole.cpu().contiguous()
        return gathered | {"rng": self._recorded.rng}

    def _reference_weights(self) -> dict[str, Tensor]:
        """Return the weights of a reference policy that is a copy, by name; {} without one."""
        reference = self.learner.reference_policy
        if reference is None or reference.without_adapter:
            return {}
        return dict(reference.model.named_parameters())

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore the state of a checkpoint."""
        state, learner = checkpoint.state, self.learner
        device = learner.policy.device
        if state["device"] != device.type:
            raise UserError(
                f"{checkpoint.path} was made on {state['device']}: it cannot go on on {device.type}"
            )
        if state["frozen"] != self._frozen_digest:
            raise UserError(
                f"{checkpoint.path} is of another model: the frozen weights of --model "
                f"{self.settings['model']} are not those that it was trained on"
            )
        if state.get("teacher") != self._teacher_digest:
            raise UserError(
                f"{checkpoint.path} had another teacher: the weights of --teacher "
                f"{self.settings['teacher']} are not those that it was trained with"
            )
        if state["versions"] != versions():
            writer = ", ".join(f"{name} {number}" for name, number in state["versions"].items())
            print(f"{checkpoint.path} was made by {writer}: numbers may differ in the last bits")
        trained = trained_weights(learner.policy.model)
        _copy_weights(trained, checkpoint.tensors("model"), checkpoint)
        _copy_weights(self._reference_weights(), checkpoint.tensors("reference"), checkpoint)
        # An optimiser numbers its weights in the order of `trained`.
        moments: dict[int, dict[str, Tensor]] = {}
        numbers = {name: number for number, name in enumerate(trained)}
        for name, value in checkpoint.tensors("optimizer").items():
            weight, _, key = name.rpartition(".")
            value = value if key == "step" else shard_like(value, trained[weight])
            moments.setdefault(numbers[weight], {})[key] = value
        learner.optimizer.load_state_dict(learner.optimizer.state_dict() | {"state": moments})
        learner.load_state_dict(state["learner"])
        self.step = self.saved_step = state["step"]
        self.tokens_seen = state["tokens_seen"]
        self._started = time.perf_counter() - state["seconds"]

        generators = ((self.order.setstate, "order"), (random.setstate, "python"))
        for set_state, name in generators:
            version, internal, gauss = state["random"][name]
            set_state((version, tuple(internal), gauss))
        np.random.set_state(state["random"]["numpy"])
        rng = checkpoint.tensors("rng")
        torch.set_rng_state(rng["cpu"])
        if device.type != "cpu":
            torch.get_device_module(device).set_rng_state(rng[device.type])
        self.record()


def versions() -> dict[str, str]:
    """Return the versions of the software that the numbers depend on."""
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Collect the weights that train by name, tied ones once; with LoRA the adapter's only."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def digest_frozen_weights(model: nn.Module) -> str | None:
    """Compute the SHA-256 of the weights that do not train, or None if all do.

    A checkpoint does not hold them; with LoRA they are the base model. Every rank must call this,
    since shards are gathered.
    """
    frozen = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
    if not frozen:
        return None
    digest = hashlib.sha256()
    for name, weight in frozen.items():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        whole = full_tensor(weight.detach()).cpu().contiguous()
        digest.update(whole.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def _copy_weights(
    weights: Mapping[str, Tensor], saved: Mapping[str, Tensor], checkpoint: Checkpoint
) -> None:
    """Copy the saved tensors into the weights, or raise a UserError if they do not match."""
    unmatched = sorted(weights.keys() ^ saved.keys())
    if unmatched:
        name = unmatched[0]
        holder = "the checkpoint" if name in saved else "the model"
        raise UserError(f"{checkpoint.path} is of another model: only {holder} has {name}")
    for name, weight in weights.items():
        if (weight.shape, weight.dtype) != (saved[name].shape, saved[name].dtype):
            kinds = [f"{list(x.shape)} in {x.dtype}" for x in (saved[name], weight)]
            raise UserError(
                f"{checkpoint.path} is of another model: {name} is {kinds[0]} in it, and "
                f"{kinds[1]} in the model"
            )
    for name, weight in weights.items():
        weight.copy_(shard_like(saved[name].to(weight.device), weight))
