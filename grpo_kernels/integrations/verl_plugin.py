"""For verl's `external_lib`: importing this module installs everything of this package in verl.

The fused LM head computes with our kernel, and the objectives are registered as policy losses.
"""

from .verl import register
from .verl_head import install_kernel

register()
install_kernel()
