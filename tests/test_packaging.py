"""Files of a release: one version, a description without dead links, extras that exist."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

import grpo_kernels

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_is_that_of_changelog_and_citation():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    assert newest == cited == grpo_kernels.__version__


def test_long_description_has_no_relative_links_nor_pictures():
    text = runpy.run_path(str(ROOT / "setup.py"))["long_description"]()
    assert re.findall(r"\]\((?!http)|<picture|<!--|!\[", text) == []
    assert "https://pytorch.org" in text and "fused.backward()" in text


@pytest.mark.parametrize("folder", ["grpo_kernels", "reference", "benchmarks", "tests"])
def test_install_lines_name_extras_that_exist(folder):
    """The script belongs to a checkout: an index may have another package of this name."""
    for file in (ROOT / folder).rglob("*.py"):
        for line in re.findall(r"pip install .*\[[a-z,]+\].*", file.read_text(encoding="utf-8")):
            assert "-e " in line, file
            for extras in re.findall(r"\.\[([a-z,]+)\]", line):
                assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), file
