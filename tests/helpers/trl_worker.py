"""One of two ranks that train with TRL's trainer and the fused one, started by `test_trl_ranks`.

Run as python -m tests.helpers.trl_worker DIRECTORY KIND, with torchrun's environment variables.
"""

import os
import sys
from functools import partial

import torch
from trl import GRPOTrainer

from grpo_kernels.backends import use
from grpo_kernels.integrations.trl import FusedGRPOTrainer
from tests.helpers.trl import make_trainer, train

TRAINERS = {
    "TRL": GRPOTrainer,
    "plain": FusedGRPOTrainer,
    "fuse_loss": partial(FusedGRPOTrainer, fuse_loss=True),
}
ENTROPY = {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.05}
SETTINGS = {
    "ddp": {"loss_type": "dapo", "beta": 0.04, "gradient_accumulation_steps": 2, **ENTROPY},
    "fsdp2": {
        **{"loss_type": "grpo", "beta": 0.04, "entropy_coef": 0.05, "fsdp": True},
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    },
}
PLAIN = {"per_device_train_batch_size": 4, "num_iterations": 2}


def shard(trainer):
    """Turn on FSDP, for which accelerate looks on accelerators only."""
    from accelerate import DistributedType
    from accelerate.utils import FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def run_training(trainer, kind):
    if kind == "fsdp2":
        shard(trainer)
    logs, weights = train(trainer)
    assert trainer.accelerator.num_processes == 2
    is_sharded = [hasattr(param, "full_tensor") for param in trainer.model.parameters()]
    assert set(is_sharded) == {kind == "fsdp2"}
    return logs, weights


def main(directory, kind):
    use("pytorch")  # interpreted kernels would take seconds per step
    torch.set_num_threads(1)
    settings = PLAIN | SETTINGS[kind]
    found = {
        name: run_training(make_trainer(trainer, **settings), kind)
        for name, trainer in TRAINERS.items()
    }
    torch.save(found, f"{directory}/{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # tearing down gloo's threads sometimes aborts, after the test
