"""What a user can get wrong."""


class InputError(ValueError):
    """Bad input. The message is one line that names the value, the limit and the way out; exit code 2."""
