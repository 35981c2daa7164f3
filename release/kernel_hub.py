"""Write the package in the layout of the Kernel Hub, as a kernel without machine code of its own.

    python release/kernel_hub.py DIRECTORY

    DIRECTORY/build.toml, torch-ext/     the input of kernel-builder
    DIRECTORY/build/torch-{cpu,...}/     what the package `kernels` loads, one variant per backend

Python and Triton are portable, so a variant is a copy of the sources. Its identifier has a digest
of them: two versions that are loaded side by side have different names, and so different operators.
The integrations are left out, since a kernel may depend on torch only.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "grpo_kernels"
NAME, VERSION, LICENSE = PACKAGE.name.replace("_", "-"), 1, "Apache-2.0"
BACKENDS = ("cpu", "cuda", "rocm")
BUILD = f"""[general]
edition = 5
name = "{NAME}"
version = {VERSION}
license = "{LICENSE}"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""


def write(directory: Path) -> list[Path]:
    """Write everything to an empty or new directory; return the variants' directories."""
    if directory.exists() and any(directory.iterdir()):
        raise SystemExit(f"{directory} is not empty")
    copy_sources(directory / "torch-ext" / PACKAGE.name)
    (directory / "build.toml").write_text(BUILD)
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    variants = []
    for backend in BACKENDS:
        variant = directory / "build" / f"torch-{backend}"
        copy_sources(variant)
        metadata = {
            "name": NAME,
            "id": f"_{PACKAGE.name}_{backend}_{digest.hexdigest()[:7]}",
            "version": VERSION,
            "license": LICENSE,
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(variant)
    return variants


def copy_sources(target: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "integrations", "*.md")
    shutil.copytree(PACKAGE, target, ignore=ignored)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path)
    write(parser.parse_args().directory)
