"""Flags of this process: Triton is installed; its interpreter runs the kernels on CPU tensors."""

import os
from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
