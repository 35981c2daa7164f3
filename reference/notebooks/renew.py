"""Run the notebook that needs no GPU, and keep what it prints and draws.

python reference/notebooks/renew.py
"""

from pathlib import Path

import nbclient
import nbformat

DIRECTORY = Path(__file__).parent


def main() -> None:
    path = DIRECTORY / "grpo_on_a_cpu.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the time of each cell
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
