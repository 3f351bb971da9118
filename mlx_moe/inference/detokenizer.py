"""Text of tokens as they come, at a cost per token that does not grow with the text."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_moe.data.tokenizers import Tokenizer

INCOMPLETE = "�"  # what the bytes of an unfinished character decode to
MAX_HELD_TOKENS = 8  # a character has four bytes, so what is still incomplete after these stays so


class IncrementalDetokenizer:
    """Decode a window of the last tokens, and return what a new token adds to its text.

    How a token reads depends on the one before: decoders drop a leading space and put the bytes of a character
    together. So the window always begins with tokens whose text has been returned, and a character is returned when
    its last token has come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        """`prompt` is the text before the first token; it is not returned."""
        self._tokenizer = tokenizer
        self._window = list(prompt)
        self._n_returned = len(self._window)  # tokens at the window's start whose text has been returned
        self._returned = self._decode()

    def add(self, token: int) -> str:
        """Return the text that has become complete with this token, which may be empty."""
        self._window.append(token)
        text = self._decode()
        n_held = len(self._window) - self._n_returned
        is_complete = len(text) > len(self._returned) and not text.endswith(INCOMPLETE)
        if not is_complete and n_held < MAX_HELD_TOKENS:
            return ""
        piece = text[len(self._returned) :]
        self._window = self._window[self._n_returned :]
        self._n_returned = len(self._window)
        self._returned = self._decode()
        return piece

    def finish(self) -> str:
        """Return the text of tokens that `add` has held back."""
        return self._decode()[len(self._returned) :]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window) if self._window else ""
