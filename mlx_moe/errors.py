"""What a user can get wrong."""


class InputError(ValueError):
    """Bad input. The message is one line that names the value, the limit and the way out; exit code 2."""


def one_line(error: BaseException, limit: int | None = 200) -> str:
    """What another library said, for the one line of an InputError: at most `limit` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
