"""For verl's `external_lib`: to import this is to register our objectives with verl."""

from .verl import register

register()
