"""README.md: its snippets print what it shows, its commands parse, its tables are complete."""

import contextlib
import io
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from grpo_kernels import LossConfig
from reference.training.command_line import parse_command_line
from reference.training.tasks.tasks import TASKS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def snippets() -> list[tuple[str, str]]:
    """Return (code, output) of every python block that is followed by a text block."""
    return re.findall(r"```python\n(.*?)```\s+```text\n(.*?)```", README.read_text(), re.S)


def test_every_python_block_has_an_output_block():
    assert len(snippets()) == README.read_text().count("```python") > 0


@pytest.mark.parametrize("backend", ["pytorch"], indirect=True)  # as on a machine without a GPU
def test_snippets_print_their_output_block(backend):
    namespace = {}
    for code, output in snippets():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(README), "exec"), namespace)
        assert printed.getvalue() == output


@pytest.mark.parametrize("extra", ["train", "test"])
def test_install_commands(extra):
    (line,) = [line for line in README.read_text().split("\n") if f"[{extra}]" in line]
    assert line.startswith("pip install -c constraints.txt -e ")


@pytest.mark.parametrize(("page", "least"), [("README.md", 10), ("reference/README.md", 6)])
def test_training_commands_parse(page, least):
    text = (ROOT / page).read_text()
    commands = re.findall(r"^(?:python|torchrun \S+) reference/train.py(.*)$", text, re.M)
    assert len(commands) >= least
    for command in commands:
        config = parse_command_line(shlex.split(command, comments=True))
        config.check_loss()
        config.task_settings()
        assert config.task in TASKS or config.task.startswith("reasoning-gym/")


def test_objective_table_lists_every_objective():
    (table,) = re.findall(r"\| name \| per token.*?\n\n", README.read_text(), re.S)
    first_column = re.findall(r"^\|([^|]*)\|", table, re.M)
    named = set(re.findall(r"`(\w+)`", " ".join(first_column)))
    named -= {setting.name for setting in fields(LossConfig)}
    assert named == LossConfig.objectives().keys()
