"""Who may import whom: the package's rooms depend on each other in one direction only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
STANDARD = frozenset(sys.stdlib_module_names) | {"__future__"}

# A token's terms in the loss; and, for annotations, what a loss is.
OBJECTIVE = {"grpo_kernels.terms", "grpo_kernels.loss_config", "grpo_kernels.surrogates"}
# What a loss is made of: tables of formulas, from the simplest to the sum.
FORMULAS = {"torch", "grpo_kernels.formulas", "grpo_kernels.sequences", "grpo_kernels.loss_config"}
TERMS = FORMULAS | {
    "grpo_kernels.sampled_kl",
    "grpo_kernels.surrogates",
    "grpo_kernels.token_filters",
    "grpo_kernels.terms",
}

# Room -> what it may import beside the standard library; a room may always import itself.
ALLOWED = {
    "grpo_kernels": {"grpo_kernels.*", "torch"},  # __init__ only re-exports
    "grpo_kernels.kernels": {"triton", "torch", "grpo_kernels.launch", *OBJECTIVE},
    "grpo_kernels.buffers": {"torch"},
    "grpo_kernels.eager": {"torch", "grpo_kernels.buffers", *OBJECTIVE},
    "grpo_kernels.rows": {"torch", "grpo_kernels.eager", "grpo_kernels.kernels"},
    "grpo_kernels.launch": set(),
    "grpo_kernels.checks": {"torch", "grpo_kernels.loss_config"},  # for an annotation
    "grpo_kernels.chunks": {"torch"},
    "grpo_kernels.head": {"torch", "grpo_kernels.buffers"},
    "grpo_kernels.vocab_shards": {"torch"},
    "grpo_kernels.linear_rows": {
        "torch",
        "grpo_kernels.rows",
        "grpo_kernels.buffers",
        "grpo_kernels.chunks",
        "grpo_kernels.head",
        "grpo_kernels.vocab_shards",
        *OBJECTIVE,
    },
    "grpo_kernels.ops": {
        "torch",
        "grpo_kernels.rows",
        "grpo_kernels.linear_rows",
        "grpo_kernels.vocab_shards",
        "grpo_kernels.checks",
        "grpo_kernels.objective",
        "grpo_kernels.sampled_kl",
        "grpo_kernels.sequences",
        "grpo_kernels.terms",
    },
    "grpo_kernels.integrations": {
        *("torch", "transformers", "trl", "verl", "prime_rl"),
        *("grpo_kernels.ops", "grpo_kernels.objective"),
    },
    "grpo_kernels.formulas": {"torch"},
    "grpo_kernels.sequences": {"torch"},
    "grpo_kernels.sampled_kl": FORMULAS,
    "grpo_kernels.surrogates": FORMULAS,
    "grpo_kernels.aggregation": FORMULAS,
    "grpo_kernels.token_filters": TERMS,
    "grpo_kernels.terms": TERMS,
    "grpo_kernels.metrics": TERMS,
    "grpo_kernels.loss_config": TERMS | {"grpo_kernels.checks", "grpo_kernels.aggregation"},
    "grpo_kernels.objective": TERMS
    | {"grpo_kernels.checks", "grpo_kernels.aggregation", "grpo_kernels.metrics"},
    "grpo_kernels.advantages": {"torch", "grpo_kernels.checks"},
    "grpo_kernels.controllers": {"grpo_kernels.checks"},
    "grpo_kernels.functional": {
        "torch",
        "grpo_kernels.checks",
        "grpo_kernels.ops",
        "grpo_kernels.advantages",
    },
}
SCRIPT = {
    "train",
    "config",
    "presets",
    "errors",
    "answers",
    "rewards",
    "data",
    "tasks",
    "models",
    "sources",
    "chat_template",
}
SCRIPT |= {
    "adapters",
    "policy",
    "packing",
    "rollout",
    "samplers",
    "server",
    "supervised",
    "evaluate",
}
SCRIPT |= {"experience", "credit", "learner", "parts", "guards", "runlog", "plots"}
SCRIPT |= {"run_directory", "training_state", "checkpoint", "resume", "stopping"}


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """Every module that the source imports, absolute, also inside functions."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = [*base, *([node.module] if node.module else [])]
            if node.module and not node.level:
                found.add(node.module)
            else:  # `from . import x` imports the module x
                found |= {".".join([*origin, alias.name]) for alias in node.names}
    return found


def room_of(module: str) -> str:
    known = [each for each in ALLOWED if module == each or module.startswith(each + ".")]
    return max(known, key=len)


def permitted(imported: str, room: str) -> bool:
    if imported.split(".")[0] in STANDARD:
        return True
    return any(
        imported == each
        or imported.startswith(each + ".")
        or (each.endswith(".*") and imported.startswith(each[:-1]))
        for each in (ALLOWED[room] | ({room} if room != "grpo_kernels" else set()))
    )


def forbidden(source: str, module: str, is_package: bool = False) -> set[str]:
    room = room_of(module)
    return {each for each in imports(source, module, is_package) if not permitted(each, room)}


def modules(top: str) -> list[tuple[str, Path]]:
    paths = sorted((ROOT / top).rglob("*.py"))
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    names = [".".join(each[:-1] if each[-1] == "__init__" else each) for each in parts]
    return list(zip(names, paths, strict=True))


@pytest.mark.parametrize(("module", "path"), modules("grpo_kernels"))
def test_a_room_imports_only_what_lies_below_it(module, path):
    assert forbidden(path.read_text(), module, path.name == "__init__.py") == set()


@pytest.mark.parametrize(
    ("module", "source", "culprit"),
    [
        ("grpo_kernels.kernels.token_stats", "from ..ops import token_stats", "grpo_kernels.ops"),
        ("grpo_kernels.kernels.calls", "from ..eager import token_stats", "grpo_kernels.eager"),
        ("grpo_kernels.eager.token_stats", "import triton", "triton"),
        ("grpo_kernels.rows", "def f():\n    from .ops.token_stats import x", "grpo_kernels.ops"),
        ("grpo_kernels.objective", "import reference", "reference"),
        ("grpo_kernels.launch", "import torch", "torch"),
    ],
)
def test_the_check_can_fail(module, source, culprit):
    assert any(each.startswith(culprit) for each in forbidden(source, module))


@pytest.mark.parametrize(("module", "path"), modules("reference"))
def test_reference_never_imports_the_package_but_for_the_script(module, path):
    found = imports(path.read_text(), module, path.name == "__init__.py")
    tops = {each.split(".")[0] for each in found} - STANDARD
    if path.stem != "train":
        assert "grpo_kernels" not in tops
    if path.stem not in SCRIPT:
        assert tops <= {"torch", "reference"}


def test_importing_the_losses_loads_neither_triton_kernels_nor_the_script_without_need():
    code = (
        "import sys; sys.modules['triton'] = None\n"  # any import of it raises
        "import torch, grpo_kernels\n"
        "stats = grpo_kernels.token_stats(torch.zeros(1, 4), torch.tensor([2]))\n"
        "assert abs(stats.logprob.item() + 1.3862944) < 1e-6, stats\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment_without_interpreter())


def environment_without_interpreter() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_only_the_package_goes_into_a_wheel():
    found = find_packages(str(ROOT), include=["grpo_kernels", "grpo_kernels.*"])
    folders = {path.parent for _, path in modules("grpo_kernels")}
    assert set(found) == {".".join(each.relative_to(ROOT).parts) for each in folders}
    assert (
        'find_packages(include=["grpo_kernels", "grpo_kernels.*"])'
        in (ROOT / "setup.py").read_text()
    )


def test_every_public_name_of_the_package_has_a_twin():
    import grpo_kernels
    import reference

    assert set(grpo_kernels.__all__) <= set(reference.__all__)
