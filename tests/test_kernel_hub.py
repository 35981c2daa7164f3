"""The Kernel Hub build: copies of the package work beside each other in one process."""

import json
import subprocess
import sys

import pytest

from release import kernel_hub

# Load variants as the package `kernels` does: by path, under the identifier of the metadata.
LOAD = """
import importlib.util, json, pathlib, sys
import torch

def load(variant):
    name = json.loads((pathlib.Path(variant) / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(variant) / "__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]

import grpo_kernels
packages = [grpo_kernels, *map(load, sys.argv[1:])]
hidden, weight = torch.randn(1, 3, 8, requires_grad=True), torch.randn(40, 8)
tokens, advantages = torch.tensor([[1, 2, 3]]), torch.ones(1)
results = []
for package in packages:
    loss, _ = package.linear_grpo_loss(
        hidden, weight, tokens, advantages, config=package.LossConfig(entropy_coef=0.1)
    )
    results.append((loss.item(), *torch.autograd.grad(loss, hidden)))
    namespace = package._ops.NAMESPACE
    assert hasattr(getattr(torch.ops, namespace), "linear_grpo_loss_forward"), namespace
    assert package.__name__ == namespace
for loss, gradient in results[1:]:
    assert loss == results[0][0] and torch.equal(gradient, results[0][1])
print(len({package._ops.NAMESPACE for package in packages}), "namespaces")
"""


def test_two_copies_beside_the_installed_package(tmp_path):
    cpu, cuda, rocm = kernel_hub.write(tmp_path)
    assert (tmp_path / "torch-ext" / "grpo_kernels" / "_ops.py").exists()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, cpu, cuda], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "3 namespaces\n", done.stderr
    assert json.loads((rocm / "metadata.json").read_text())["backend"] == {"type": "rocm"}


def test_directory_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit, match="is not empty"):
        kernel_hub.write(tmp_path)
