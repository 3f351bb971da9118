"""Autoregressive generation with a key-value cache, the same for both backends."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from mlx_moe.data.tokenizers import Tokenizer, check_tokenizer_fits
from mlx_moe.errors import InputError, quoted
from mlx_moe.inference.decoder import LanguageModel
from mlx_moe.inference.detokenizer import IncrementalDetokenizer
from mlx_moe.inference.sampling import GREEDY, Sampling, sample_token
from mlx_moe.storage.checkpoint import Checkpoint
from mlx_moe.storage.reading import is_unicode


def stream_generate(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: Sampling = GREEDY
) -> Iterator[str]:
    """Yield the text that follows a prompt, piece by piece, until the end of text.

    Raises InputError where the tokenizer has no token for the prompt, or where the logits hold NaN or Inf.
    """
    ids = encode_prompt(tokenizer, prompt)
    detokenizer = IncrementalDetokenizer(tokenizer, ids)
    for token in _continue(model, tokenizer, ids, max_new_tokens, sampling):
        if piece := detokenizer.add(token):
            yield piece
    if piece := detokenizer.finish():
        yield piece


def generate_text(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: Sampling = GREEDY
) -> str:
    """Return the text that follows a prompt. A prompt without tokens stands for the start of a text.

    Raises InputError where the logits hold NaN or Inf.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    return tokenizer.decode(list(_continue(model, tokenizer, ids, max_new_tokens, sampling)))


def generate_tokens(
    model: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    stop_tokens: Collection[int] = (),
    suppress_tokens: Sequence[int] = (),
) -> Iterator[int]:
    """Yield at most `max_new_tokens` new tokens, and end before one of `stop_tokens`.

    `suppress_tokens` are never drawn. When the context is full, the later half of it is read again into a new cache.
    Raises InputError where the logits hold NaN or Inf.
    """
    context_length = model.config.context_length
    generator = np.random.default_rng(sampling.seed)
    tokens, previous_tokens = list(prompt), set(prompt)
    decoder, unread = model.decoder(), tokens[-context_length:]
    for _ in range(max_new_tokens):
        if decoder.length + len(unread) > context_length:
            decoder, unread = model.decoder(), tokens[-max(1, context_length // 2) :]
        logits_V = decoder(np.array([unread], dtype=np.int32))[0]
        token = sample_token(logits_V, sampling, generator, previous_tokens, suppress_tokens)
        if token in stop_tokens:
            return
        tokens.append(token)
        previous_tokens.add(token)
        unread = [token]
        yield token


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return a prompt's ids. Raises InputError where it is no text, or the tokenizer has no token for it."""
    if not is_unicode(prompt):
        raise InputError("--prompt holds bytes that are no UTF-8; give it text")
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError(f"--prompt {quoted(prompt)} gives no token; give it some that the tokenizer knows")
    return ids


def load_tokenizer(loaded: Checkpoint) -> Tokenizer:
    """Load the tokenizer beside a checkpoint. Raises InputError where there is none, or none that fits."""
    if loaded.tokenizer_folder is None:
        raise InputError(f"checkpoint {loaded.path} has no tokenizer/ beside it; copy its run's tokenizer/ into it")
    tokenizer = Tokenizer.load(loaded.tokenizer_folder)
    check_tokenizer_fits(tokenizer, loaded.config.vocab_size, f"the tokenizer in {loaded.tokenizer_folder}")
    return tokenizer


def _continue(
    model: LanguageModel, tokenizer: Tokenizer, ids: Sequence[int], max_new_tokens: int, sampling: Sampling
) -> Iterator[int]:
    """Yield tokens that the tokenizer has, up to its end of text; a model may have more, to fill up its vocabulary."""
    missing = [token for token in range(model.config.vocab_size) if token not in tokenizer.ids]
    return generate_tokens(
        model, ids, max_new_tokens, sampling, stop_tokens=(tokenizer.eot_id,), suppress_tokens=missing
    )
