"""The README files: snippets print what they show, commands parse, tables are complete."""

import contextlib
import inspect
import io
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import grpo_kernels
from grpo_kernels import LossConfig, policy_loss
from reference.training.command_line import parse_command_line
from reference.training.config import TrainConfig
from reference.training.tasks.tasks import TASKS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PACKAGE = ROOT / "grpo_kernels" / "README.md"
OBJECTIVES = ROOT / "grpo_kernels" / "objective" / "README.md"
INTEGRATIONS = ROOT / "grpo_kernels" / "integrations" / "README.md"
SCRIPT = ROOT / "reference" / "README.md"
PAGES = (README, PACKAGE, OBJECTIVES, INTEGRATIONS, SCRIPT)

# A comment that GitHub does not show defines what a snippet takes for granted.
SNIPPET = re.compile(
    r"<!-- hidden setup\n(?P<setup>.*?)-->"
    r"|```python\n(?P<code>.*?)```(\s+```text\n(?P<output>.*?)```)?",
    re.S,
)


def name(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
@pytest.mark.parametrize("backend", ["pytorch"], indirect=True)  # as on a machine without a GPU
def test_snippets_print_their_output_block(backend, page):
    namespace = {}
    for snippet in SNIPPET.finditer(page.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(snippet["setup"] or snippet["code"], str(page), "exec"), namespace)
        assert printed.getvalue() == (snippet["output"] or "")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            text = file.read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.M)
            anchors = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in anchors | set(re.findall(r'<a id="([^"]+)"', text)), target


def test_readme_is_short():
    text = README.read_text()
    assert len(text.split("\n")) < 140
    assert len(text.split()) < 1300


@pytest.mark.parametrize("extra", ["train", "test"])
def test_install_commands(extra):
    (line,) = [line for line in README.read_text().split("\n") if f"[{extra}]" in line]
    assert line.startswith("pip install -c constraints.txt -e ")


def test_defaults_of_the_half_page_on_grpo():
    text = SCRIPT.read_text()
    rows = text[text.index("| setting | default |") :].split("\n\n")[0].split("\n")[2:]
    defaults = vars(TrainConfig()) | vars(LossConfig.grpo())
    assert len(rows) >= 6
    for row in rows:
        names, default, _ = row.strip("| ").split(" | ")
        for setting in re.findall(r"`(\w+)`", names):
            assert float(default) == defaults[setting], setting


def test_training_commands_parse():
    commands = re.findall(
        r"^(?:python|torchrun \S+) reference/train.py(.*)$", SCRIPT.read_text(), re.M
    )
    assert len(commands) >= 16
    for command in commands:
        config = parse_command_line(shlex.split(command, comments=True))
        config.check_loss()
        config.task_settings()
        assert config.task in TASKS or config.task.startswith("reasoning-gym/")


def first_column(page, head):
    """Return the names in backticks in the first column of the table with that head."""
    (table,) = re.findall(rf"^\| {head} \|.*?\n\n", page.read_text() + "\n\n", re.S | re.M)
    return set(re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\|([^|]*)\|", table, re.M))))


def test_objective_table_lists_every_objective():
    named = first_column(OBJECTIVES, "name")
    named -= {setting.name for setting in fields(LossConfig)} | {'aggregation="prompt_mean"'}
    assert named == LossConfig.objectives().keys()


def test_argument_table_lists_every_argument():
    functions = [getattr(grpo_kernels, name) for name in grpo_kernels.__all__]
    arguments = {
        argument
        for function in filter(inspect.isfunction, functions)
        for argument in inspect.signature(function).parameters
    }
    assert first_column(PACKAGE, "argument") == arguments


def test_metric_table_lists_every_metric():
    logprob = torch.zeros(2, 3)
    tensors = {"old_logprob": logprob, "sampling_logprob": logprob, "entropy": logprob}
    configs = [
        LossConfig.grpo(beta=0.1, nll_coef=0.1, top_entropy=0.5),
        LossConfig.cispo(),
        LossConfig.vespo(),
    ]
    metrics = set()
    for config in configs:
        given = tensors | ({"ref_logprob": logprob} if config.beta else {})
        given |= {"nll_weight": logprob} if config.nll_coef else {}
        metrics |= policy_loss(logprob, torch.ones(2), config=config, **given).metrics.keys()
    assert first_column(PACKAGE, "metric") == metrics
