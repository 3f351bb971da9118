"""The same logits by other ways: with a cache, a token at a time or in chunks; row by row; and what a model writes.

B batch, T time, V vocabulary, N tokens (B·T), E experts, K experts per token, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_moe.training.backend import Tokens, Trainer
from parity.oracle import Array, Trace
from parity.truth import Error, Expected, Truth, margins
from parity.yardstick import Judged, judge_tensor

STEPS = 16  # tokens that go through the cache one by one, and that are generated
PROMPT = 8
CHUNK = 9
TIE = 4.0  # a margin of up to so many times the float32 oracle's error in that router may fall either way


@dataclass(frozen=True)
class Way:
    """Logits (B, T', V) at some positions (T',)."""

    name: str
    positions: NDArray[np.int64]
    logits_BTV: Array


def judge_decoding(truth: Truth, mlx: Trainer, torch: Trainer) -> tuple[list[Judged], list[str]]:
    """Every way of either backend; and what they generate that rounding does not explain, in words."""
    settled_BT = settled(truth, truth.trace, truth.tokens_BT.shape)
    judged = []
    for in_mlx, in_torch in zip(ways(mlx, truth.tokens_BT), ways(torch, truth.tokens_BT), strict=True):
        at, kept = in_mlx.positions, settled_BT[:, in_mlx.positions]
        expected = Expected.of(truth.logits_BTV[:, at][kept], truth.float32_BTV[:, at][kept])
        errors = [Error.of(way.logits_BTV[kept], expected.truth) for way in (in_mlx, in_torch)]
        judged.append(judge_tensor(f"logits {in_mlx.name}", "way", errors[0], errors[1], expected))
    wrong = []
    if truth.tokens_BT.shape[1] >= PROMPT + STEPS:
        for name, trainer, error in (("MLX", mlx, judged[0].mlx), ("torch", torch, judged[0].torch)):
            text_BT = generate(trainer, truth.tokens_BT[:, :PROMPT])
            if count := _wrong_tokens(truth, text_BT, error):
                wrong.append(f"{name} wrote {count} tokens of {text_BT[:, PROMPT:].size} that are not the likeliest")
    return judged, wrong


def ways(trainer: Trainer, tokens_BT: Tokens) -> list[Way]:
    """Up to the last position that the context has, if the tokens reach it."""
    n_time = tokens_BT.shape[1]
    last = min(STEPS, n_time - 1)
    chunks, rest = divmod(n_time, CHUNK)
    found = [
        _in_chunks("one token at a time", trainer, tokens_BT, [n_time - last, *[1] * last]),
        _in_chunks("in chunks", trainer, tokens_BT, [rest, *[CHUNK] * chunks]),
    ]
    if len(tokens_BT) > 1:
        rows = np.concatenate([trainer.logits(row_T[None]) for row_T in tokens_BT])
        found.append(Way("one row at a time", np.arange(n_time), rows))
    return found


def generate(trainer: Trainer, prompt_BT: Tokens) -> Tokens:
    """Greedily, with a cache: (B, T + STEPS)."""
    decoder, text_BT = trainer.decoder(), prompt_BT
    new_BT = prompt_BT
    for _ in range(STEPS):
        new_BT = decoder(new_BT).argmax(axis=-1)[:, None].astype(np.int32)
        text_BT = np.concatenate([text_BT, new_BT], axis=1)
    return text_BT


def _wrong_tokens(truth: Truth, text_BT: Tokens, error: Error) -> int:
    """Generated tokens that are not the truth's likeliest, though its margin is more than two errors; before ties."""
    trace, start = truth.oracle(text_BT[:, :-1]), text_BT.shape[1] - STEPS
    logits_BTV = trace.logits_BTV[:, start - 1 :]
    chosen_BT = np.take_along_axis(logits_BTV, text_BT[:, start:, None].astype(np.int64), axis=-1)[..., 0]
    settled_BT = settled(truth, trace, text_BT[:, :-1].shape)[:, start - 1 :]
    return int(((logits_BTV.max(axis=-1) - chosen_BT > 2 * error.largest) & settled_BT).sum())


def settled(truth: Truth, trace: Trace, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """(B, T): no router before or here is so close to a tie that rounding may decide; exact ties go by the index."""
    settled_BT = np.ones(shape, bool)
    router_error = max((e.float32.largest for name, e in truth.whole.items() if name != "lm_head"), default=0.0)
    for margin_N in margins(trace.router_logits_LNE, trace.experts_LNK):
        tied_BT = ((margin_N > 0) & (margin_N <= TIE * router_error)).reshape(shape)
        settled_BT &= ~np.maximum.accumulate(tied_BT, axis=1)
    return settled_BT


def _in_chunks(name: str, trainer: Trainer, tokens_BT: Tokens, lengths: Sequence[int]) -> Way:
    decoder, ends = trainer.decoder(), np.cumsum([length for length in lengths if length])
    parts = np.split(tokens_BT, ends[:-1].tolist(), axis=1)
    return Way(name, ends - 1, np.stack([decoder(part) for part in parts], axis=1))
