"""Probe tokens for models whose training data is not available."""

from __future__ import annotations

from itertools import count

import numpy as np

from mlx_moe.config import DataConfig, ModelConfig
from mlx_moe.data.sources import open_source
from mlx_moe.data.stories import story
from mlx_moe.data.tokenizers import Tokenizer
from mlx_moe.data.tokens import fixed_windows
from mlx_moe.errors import InputError
from mlx_moe.storage.checkpoint import Checkpoint
from mlx_moe.training.backend import Tokens
from mlx_moe.training.certify import PROBE_TOKENS
from mlx_moe.validation import validate

STORY_TOKENS = 64  # per probe of a model with a tokenizer
WINDOW_TOKENS = 256  # per window of the text for centroids


def probe_tokens(config: ModelConfig, tokenizer: Tokenizer | None, n: int) -> Tokens:
    """Return (n, T + 1) probe tokens: stories if the tokenizer knows their words, else random.

    Random tokens drive a published model to where rounding alone moves its logits far, so that a certificate says
    little; so do long texts (SmolLM2-135M, whose logits reach 42, upcycled, float32: 3e-3 in 1,024 random tokens,
    1.4e-4 in 256 of text, under 9e-5 in 64).
    """
    random_BT1 = random_probes(config, n)[:, : STORY_TOKENS + 1]
    if tokenizer is None:
        return random_BT1
    ids = list[int]()
    for number in count():
        ids += [*tokenizer.encode(story(number)), tokenizer.eot_id]
        if len(ids) >= random_BT1.size:
            break
    fits = max(ids) < config.vocab_size and len(set(ids)) >= min(32, config.vocab_size // 4)
    return np.array(ids[: random_BT1.size], np.int32).reshape(random_BT1.shape) if fits else random_BT1


def checkpoint_probes(source: Checkpoint, n: int) -> Tokens:
    """Return `probe_tokens` for a checkpoint, with its tokenizer."""
    folder = source.tokenizer_folder
    return probe_tokens(source.config, None if folder is None else Tokenizer.load(folder), n)


def random_probes(config: ModelConfig, n: int, seed: int = 0) -> Tokens:
    """Return (n, T + 1) random tokens; T is the context, at most PROBE_TOKENS."""
    shape = (n, min(config.context_length, PROBE_TOKENS) + 1)
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


def text_tokens(source: Checkpoint, text: str, n: int) -> Tokens:
    """Return (B, T) tokens of a text, about n if it has as many; T is the context, at most WINDOW_TOKENS.

    Raises InputError if the text cannot be read, or the model has no tokenizer for it.
    """
    if source.tokenizer_folder is None:
        raise InputError(f"{source.path} has no tokenizer to read {text} with; take --router random")
    tokenizer, ids = Tokenizer.load(source.tokenizer_folder), list[int]()
    width = min(source.config.context_length, WINDOW_TOKENS)
    for document in open_source(validate(DataConfig, {"source": text, "n_documents": None})).documents():
        ids += [*tokenizer.encode(document), tokenizer.eot_id]
        if len(ids) > n + n // width + width:
            break
    if max(ids) >= source.config.vocab_size:
        raise InputError(f"{source.path}: {text} has token {max(ids)}, the model only {source.config.vocab_size}")
    width = min(width, len(ids) - 1)
    return fixed_windows(np.array(ids), -(-n // width), width)[:, :-1]
