"""What a user can get wrong."""


class InputError(ValueError):
    """Bad input. The message is one line that names the value, the limit and the way out; exit code 2."""


def one_line(error: BaseException, limit: int | None = 200) -> str:
    """What another library said, for the one line of an InputError: at most `limit` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def brief(value: object, limit: int = 100) -> str:
    """A value that somebody else wrote, as Python writes it, for the one line of an InputError."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def brief_name(name: str, limit: int = 100) -> str:
    """A name that somebody else gave: without quotes, its control characters written out."""
    text = repr(name)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
