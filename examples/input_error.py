"""The error that the examples print as one line, without a traceback."""


class InputError(Exception):
    """An input of the user cannot be used; the message is one line."""
