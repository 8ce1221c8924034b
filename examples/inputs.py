"""What the command lines of the examples share; it imports nothing else."""

from typing import Literal

Resume = Literal["auto", "must", "never", "changed"]


class InputError(Exception):
    """An input of the user cannot be used; the message is one line."""


def flag(field: str) -> str:
    """The name of a field on the command line."""
    return "--" + field.replace("_", "-")
