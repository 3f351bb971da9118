"""Greedy and sampled generation with a key-value cache, the same for both backends. V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_moe.data.tokenizers import Tokenizer
from mlx_moe.errors import InputError, quoted
from mlx_moe.storage.checkpoint import Checkpoint
from mlx_moe.storage.reading import is_unicode
from mlx_moe.training.backend import Backend, Trainer


def generate(
    trainer: Trainer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[int]:
    """Yield new tokens, at most `max_new_tokens`, until `stop`.

    Temperature 0 takes the likeliest token. When the context is full, its later half is read again and goes on.
    """
    context_length = trainer.config.context_length
    generator = np.random.default_rng(seed)
    tokens = list(prompt)
    decoder, unread = trainer.decoder(), tokens[-context_length:]
    for _ in range(max_new_tokens):
        if decoder.length + len(unread) > context_length:
            decoder, unread = trainer.decoder(), tokens[-max(1, context_length // 2) :]
        logits_V = decoder(np.array([unread], dtype=np.int32))[0]
        token = choose(logits_V, temperature, top_k, generator)
        if token == stop:
            return
        tokens.append(token)
        unread = [token]
        yield token


def sample_text(
    trainer: Trainer, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, temperature: float = 0.0
) -> str:
    """What follows a prompt, with seed 0; one of which the tokenizer has no token stands for the start of a text."""
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    return tokenizer.decode(
        list(generate(trainer, ids, max_new_tokens, temperature=temperature, stop=tokenizer.eot_id))
    )


def choose(logits_V: NDArray[np.float32], temperature: float, top_k: int | None, generator: np.random.Generator) -> int:
    """The likeliest token at temperature 0, else a draw from the softmax over the `top_k` likeliest.

    Raises InputError where the logits hold NaN or Inf.
    """
    if not np.isfinite(logits_V).all():
        raise InputError("the model's logits hold NaN or Inf, so its weights are damaged; take another checkpoint")
    if temperature == 0:
        return int(logits_V.argmax())
    scaled_V = logits_V.astype(np.float64) / temperature
    if top_k is not None and top_k < scaled_V.size:
        scaled_V = np.where(scaled_V >= np.partition(scaled_V, -top_k)[-top_k], scaled_V, -np.inf)
    probabilities_V = np.exp(scaled_V - scaled_V.max())
    return int(generator.choice(logits_V.size, p=probabilities_V / probabilities_V.sum()))


def tokenizer_of(loaded: Checkpoint) -> Tokenizer:
    """The tokenizer that lies beside a checkpoint. Raises InputError where there is none, or none that fits."""
    if loaded.tokenizer_folder is None:
        raise InputError(f"checkpoint {loaded.path} has no tokenizer/ beside it; copy its run's tokenizer/ into it")
    tokenizer = Tokenizer.load(loaded.tokenizer_folder)
    if tokenizer.vocab_size > loaded.config.vocab_size:
        raise InputError(
            f"the tokenizer in {loaded.tokenizer_folder} has {tokenizer.vocab_size} tokens, the model only "
            f"{loaded.config.vocab_size}; take the tokenizer it was trained with"
        )
    return tokenizer


def continue_text(
    loaded: Checkpoint, prompt: str, backend: Backend, device: str, max_new_tokens: int, **sampling: Any
) -> Iterator[str]:
    """Yield a prompt and what follows it, as it comes. Raises InputError without a tokenizer that fits, or a prompt."""
    if not is_unicode(prompt):
        raise InputError("--prompt holds bytes that are no UTF-8; give it text")
    tokenizer = tokenizer_of(loaded)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError(f"--prompt {quoted(prompt)} gives no token; give it some that the tokenizer knows")
    trainer = backend.trainer(loaded.config, loaded.weights, device=device)
    yield prompt
    shown, written = tokenizer.decode(ids), list(ids)
    for token in generate(trainer, ids, max_new_tokens, stop=tokenizer.eot_id, **sampling):
        written.append(token)
        text = tokenizer.decode(written)
        if text.startswith(shown) and not text.endswith("�"):  # a character may take several tokens
            yield text[len(shown) :]
            shown = text
