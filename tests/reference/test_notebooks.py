"""The notebooks run from the first cell to the last, and what they show is from a run."""

import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.helpers.trl import model_directory

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "reference" / "notebooks"
NOTEBOOKS = sorted(DIRECTORY.glob("*.ipynb"))
LEARNS, TRL = DIRECTORY / "grpo_on_a_cpu.ipynb", DIRECTORY / "trl_lora_on_a_t4.ipynb"


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def run(notebook):
    """Execute the cells in the root of the checkout; return what they print."""
    resources = {"metadata": {"path": str(ROOT)}}
    env = os.environ | {"TRITON_INTERPRET": "0"}  # as a reader's; the tests interpret the kernels
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute(env=env)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.mark.slow
def test_model_learns_and_plain_and_fused_agree():
    printed = run(read(LEARNS))
    rewards = [float(reward) for reward in re.findall(r"step +\d+  reward (\S+)", printed)]
    assert rewards[0] < 0.2 and rewards[-1] > 0.85
    plain, fused = re.findall(r"(?:plain|fused): loss (\S+), entropy", printed)
    assert plain == fused
    differences = re.findall(r"relative difference (\S+)", printed)
    assert len(differences) == 2 and all(float(x) < 1e-5 for x in differences)


@pytest.mark.slow
def test_trl_on_a_tiny_model():
    notebook = read(TRL)
    notebook.cells = [x for x in notebook.cells if "install" not in x.metadata.get("tags", ())]
    (parameters,) = [x for x in notebook.cells if "parameters" in x.metadata.get("tags", ())]
    parameters.source = (
        f"MODEL = {model_directory()!r}\n"
        "STEPS, GROUP, PROMPTS, MAX_NEW_TOKENS = 2, 4, 2, 6\nLEARNING_RATE = 1e-3"
    )
    assert "CPU: fp32" in run(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_notebook(path):
    notebook = read(path)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert path.stat().st_size < 400_000
    for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_outputs_are_of_a_whole_run():
    cells = [cell for cell in read(LEARNS).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/png" in out.get("data", {}) for cell in cells for out in cell.outputs) == 6
