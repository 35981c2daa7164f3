"""For verl's `external_lib`: importing this module registers the objectives with verl."""

from .verl import register

register()
