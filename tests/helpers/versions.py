"""Marks of tests that need a combination of versions."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

# Transformers 5.24 refuses the newest release of PEFT, 0.21: its own adapters wait for the next.
needs_adapters_of_transformers = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this Transformers needs PEFT {MIN_PEFT_VERSION} for add_adapter",
)
