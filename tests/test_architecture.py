"""The layers of the package: imports go down, never up and never in a circle."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]

# From the bottom up. A module imports from its own layer and from the layers above its line only.
LAYERS = (
    "grpo_kernels._ops",
    "grpo_kernels.validation",
    "grpo_kernels.workspace",
    "grpo_kernels.sampling_support",
    "grpo_kernels.objective",
    "grpo_kernels.backends",
    "grpo_kernels.lm_head",
    "grpo_kernels.ops",
    "grpo_kernels.advantages",
    "grpo_kernels.entropy_controller",
    "grpo_kernels.mini_grpo",
    "grpo_kernels",
    "grpo_kernels.integrations",
    "reference.losses",
    "reference.training",
    "reference.train",
)
# Third-party packages that a layer may import; the longest matching name decides.
THIRD_PARTY = {
    "grpo_kernels": {"torch"},
    "grpo_kernels.backends.triton": {"torch", "triton"},
    "grpo_kernels.backends.triton.launch_configs": set(),
    "grpo_kernels.integrations": {
        "torch",
        "transformers",
        "trl",
        "verl",
        "prime_rl",
        "peft",
        "accelerate",
    },
    "reference.losses": {"torch"},
}


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Absolute names of all imported modules, also inside functions and under TYPE_CHECKING."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{stem}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else stem for name in names}
    return found


def modules(*tops: str) -> dict[str, Path]:
    found = {}
    for top in tops:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules("grpo_kernels", "reference", "benchmarks")
LIBRARY = [name for name in MODULES if name.split(".")[0] in ("grpo_kernels", "reference")]
GRAPH = {
    name: imports(path.read_text(), name, path.name == "__init__.py")
    for name, path in MODULES.items()
}


def longest_prefix(module: str, names) -> str | None:
    fitting = [name for name in names if module == name or module.startswith(name + ".")]
    return max(fitting, key=len, default=None)


def layer_of(module: str) -> int | None:
    if module == "grpo_kernels":
        return LAYERS.index("grpo_kernels")
    name = longest_prefix(module, [layer for layer in LAYERS if layer != "grpo_kernels"])
    return None if name is None else LAYERS.index(name)


def violations(module: str, imported: set[str]) -> set[str]:
    """Imports of a higher layer, or of a third-party package that the layer does without."""
    allowed = THIRD_PARTY.get(longest_prefix(module, THIRD_PARTY), None)
    found = set()
    for name in imported:
        top = name.split(".")[0]
        if top == "reference" and module.startswith("grpo_kernels"):
            found.add(name)
        elif top == "grpo_kernels" and module.startswith("reference.losses"):
            found.add(name)
        elif top in ("grpo_kernels", "reference"):
            imported_layer, layer = layer_of(name), layer_of(module)
            if imported_layer is not None and layer is not None and imported_layer > layer:
                found.add(name)
        elif allowed is not None and top not in allowed | sys.stdlib_module_names:
            found.add(name)
    return found


@pytest.mark.parametrize("module", LIBRARY)
def test_imports_go_down(module):
    assert violations(module, GRAPH[module]) == set()


@pytest.mark.parametrize(
    ("module", "source", "culprit"),
    [
        ("grpo_kernels.backends.triton.token_stats", "from ...ops import token_stats", "ops"),
        ("grpo_kernels.backends.pytorch.token_stats", "import triton", "triton"),
        ("grpo_kernels.backends.triton.launch_configs", "import torch", "torch"),
        ("grpo_kernels.objective.config", "def f():\n    from ..ops import token_stats", "ops"),
        ("grpo_kernels.ops.token_stats", "import reference", "reference"),
        ("reference.losses.token_stats", "import grpo_kernels.objective", "grpo_kernels"),
    ],
)
def test_a_violation_is_found(module, source, culprit):
    assert any(culprit in name for name in violations(module, imports(source, module)))


def test_only_the_scripts_import_package_and_reference():
    for module in LIBRARY:
        if not module.startswith(("reference.training", "reference.train", "reference.grpo")):
            tops = {name.split(".")[0] for name in GRAPH[module]}
            assert not {"grpo_kernels", "reference"} <= tops | {module.split(".")[0]}, module


def test_no_import_cycle():
    """Depth-first search over every import, those under TYPE_CHECKING and in functions included."""
    state: dict[str, str] = {}

    def visit(module: str, path: list[str]) -> None:
        state[module] = "open"
        for other in sorted(GRAPH[module] & GRAPH.keys() - {module}):
            assert state.get(other) != "open", " -> ".join([*path, module, other])
            if other not in state:
                visit(other, [*path, module])
        state[module] = "done"

    for module in GRAPH:
        if module not in state:
            visit(module, [])


def test_nothing_in_reference_carries_the_name_of_an_installed_package():
    """`python reference/train.py` puts reference/ first on sys.path."""
    installed = set(importlib.metadata.packages_distributions()) | sys.stdlib_module_names
    names = {path.stem for path in (ROOT / "reference").iterdir()}
    assert names & (installed - {"reference", "__init__"}) == set()


def test_package_imports_itself_by_relative_names():
    """A copy under another name must not import this one."""
    for module, path in MODULES.items():
        if module.split(".")[0] == "grpo_kernels":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                assert "grpo_kernels" not in {name.split(".")[0] for name in names}, module


def test_import_works_without_triton_and_transformers():
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(['triton', 'transformers', 'trl', 'numpy'])\n"
        "import grpo_kernels, torch\n"
        "grpo_kernels.token_stats(torch.randn(1, 2, 3), torch.zeros(1, 2, dtype=int))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={"PATH": ""})


def test_only_grpo_kernels_goes_into_a_wheel():
    found = find_packages(str(ROOT), include=["grpo_kernels", "grpo_kernels.*"])
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    assert set(found) == {each for each in packages if each.split(".")[0] == "grpo_kernels"}
