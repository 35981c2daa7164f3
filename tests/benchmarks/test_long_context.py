"""benchmarks.long_context: memory that does not grow with the tokens, and sizes left out."""

import json

import pytest

from benchmarks import long_context

pytestmark = pytest.mark.usefixtures("pytorch_backend")
SMALL = ("--vocab", "512", "--hidden", "8", "--chunk-tokens", "64")


def test_memory_is_flat_and_each_size_is_written(tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ("--tokens", "2048", "256", *SMALL, "--results", str(path))
    long_context.main(arguments)
    content = json.loads(path.read_text())
    small, large = content["rows"]
    assert (small["N"], large["N"]) == (256, 2048)
    chunk_bytes = 64 * 512 * 4
    rests = [row["extra_bytes"] - row["d_hidden_bytes"] for row in (small, large)]
    assert rests[0] >= chunk_bytes and large["seconds"] > 0
    # Beside the workspace there are per-token tensors: less than H of them, or 64 bytes each.
    assert rests[1] - rests[0] < 64 * (2048 - 256)
    assert content["shape"] == {"vocab": 512, "hidden": 8, "dtype": "fp32", "chunk_tokens": 64}
    assert "| 2,048 |" in capsys.readouterr().out


def test_size_beyond_the_time_limit_is_named(capsys):
    arguments = ("--tokens", "256", "100000000000", *SMALL, "--seconds", "30")
    long_context.main(arguments)
    assert "| 100,000,000,000 | left out: ends after" in capsys.readouterr().out
