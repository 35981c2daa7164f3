"""The long description of the package; everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def long_description() -> str:
    """README.md without pictures and relative links, which lead nowhere on a package index."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.S)
    text = re.sub(r"<picture>.*?</picture>\n?|!\[[^]]*\]\((?!http)[^)]*\)\n?", "", text, flags=re.S)
    return re.sub(r"\[([^]]*)\]\((?!http)[^)]*\)", r"\1", text)


if __name__ == "__main__":
    setup(long_description=long_description(), long_description_content_type="text/markdown")
