"""The one error that the examples show as one line, without a traceback."""


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line for them."""
