"""backends.use: the choice of a backend, its end, and its errors."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from grpo_kernels import backends
from grpo_kernels.backends import backend_for, choice, pytorch, use

LOGITS = torch.zeros(1, 1, 3)


def backend_name():
    return backend_for(LOGITS).__name__.removeprefix("grpo_kernels.backends.")


@pytest.mark.skipif(not backends.INTERPRETED, reason="on the CPU the kernels need the interpreter")
def test_default_backend_follows_the_device():
    assert backend_name() == "triton.launchers"
    assert backend_for(LOGITS.to("meta")) is pytorch


def test_use_chooses_until_the_next_call():
    use("pytorch")
    assert backend_for(LOGITS) is pytorch
    use(None)
    assert backend_name() == ("triton.launchers" if backends.INTERPRETED else "pytorch")


def test_use_as_context_restores_the_earlier_choice():
    use("pytorch")
    with use(None), use("pytorch"):
        pass
    assert backend_for(LOGITS) is pytorch
    with pytest.raises(KeyError), use(None):
        raise KeyError
    assert backend_for(LOGITS) is pytorch


@pytest.mark.skipif(not backends.INTERPRETED, reason="on the CPU the kernels need the interpreter")
def test_use_triton_on_cpu_with_the_interpreter():
    with use("triton"):
        assert backend_name() == "triton.launchers"


@pytest.mark.skipif(not backends.HAS_TRITON, reason="Triton is not installed")
def test_gpus_that_triton_does_not_support_run_pytorch(monkeypatch):
    capability = {0: (7, 5), 1: (8, 0), 2: (12, 0)}
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capability[device.index]
    )
    monkeypatch.setattr(torch.version, "hip", None)
    choice._is_supported.cache_clear()

    def name(index):
        logits = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
        return backend_for(logits).__name__.rpartition(".")[2]

    assert [name(index) for index in capability] == ["pytorch", "launchers", "launchers"]
    with use("triton"):
        assert name(0) == "launchers"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    choice._is_supported.cache_clear()
    assert name(0) == "launchers"
    choice._is_supported.cache_clear()


@pytest.mark.skipif(not backends.HAS_TRITON, reason="Triton is not installed")
def test_use_triton_on_cpu_without_the_interpreter_raises():
    code = (
        "import torch\n"
        "from grpo_kernels import backends, token_stats\n"
        "assert backends.backend_for(torch.zeros(1, 1, 3)) is backends.pytorch\n"
        "backends.use('triton')\n"
        "token_stats(torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=int))\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "RuntimeError: backend 'triton' was chosen and cannot run on cpu" in done.stderr


def test_use_triton_on_a_device_without_triton_raises():
    if not backends.HAS_TRITON:
        pytest.skip("Triton is not installed")
    with use("triton"), pytest.raises(RuntimeError, match=r"'triton' was chosen .* run on meta"):
        backend_for(LOGITS.to("meta"))


def test_use_rejects_other_names():
    use("pytorch")
    with pytest.raises(ValueError, match="name must be 'triton', 'pytorch' or None, got 'cuda'"):
        use("cuda")
    assert backend_for(LOGITS) is pytorch, "a rejected name changes nothing"


def test_use_triton_without_the_package_raises(monkeypatch):
    monkeypatch.setattr(choice, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="needs the triton package, which is not installed"):
        use("triton")
    assert backend_for(LOGITS) is pytorch
