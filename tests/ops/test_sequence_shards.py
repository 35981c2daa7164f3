"""Context parallelism: each rank has a part of every sequence; ranks match one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_of_sequences_match_whole_ones(tmp_path, ranks):
    """Run sequence_shard_worker.py: sums of tokens add up; other objectives gather."""
    tests = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), *sys.path])
    command = [sys.executable, str(tests / "helpers" / "sequence_shard_worker.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error
