"""On two ranks the fused trainer has the logs and the weights of TRL's trainer."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from tests.helpers.trl import check_same

ROOT = Path(__file__).parents[2]


def run_ranks(directory, kind):
    """Train on two ranks; return what each of them saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "PYTHONPATH": str(ROOT),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.trl_worker", str(directory), kind],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:  # if one fails the other waits for it
            process.kill()
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_match_trl(tmp_path, kind):
    for found in run_ranks(tmp_path, kind):
        logs, changes = expected = found["TRL"]
        assert max(change.abs().max() for change in changes.values()) > 1e-3, "weights change"
        assert any(log.get("clip_ratio/region_mean") for log in logs)
        for name in ("plain", "fuse_loss"):
            check_same(found[name], expected)


def test_top_entropy_quantile_on_two_ranks_raises(monkeypatch):
    from trl import GRPOTrainer

    from grpo_kernels.integrations.trl import fuse_trainer
    from tests.helpers.trl import make_trainer

    trainer = make_trainer(GRPOTrainer, top_entropy_quantile=0.4)
    fuse_trainer(trainer, fuse_loss=True)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    with pytest.raises(ValueError, match=r"over all 2 processes in TRL.*leave fuse_loss out"):
        fuse_trainer(trainer, fuse_loss=True)
