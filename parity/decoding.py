"""Judge logits computed in other ways than one forward pass, and greedy text.

The ways are: with a cache, one token at a time or in chunks; and one row at a time.

B batch, T time, V vocabulary, N tokens (B·T), E experts, K experts per token, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_moe.training.backend import Tokens, Trainer
from parity.judgement import judge_tensor
from parity.numpy_model import Array, ForwardTrace
from parity.reference_forward import Expected, ReferenceForward, margins
from parity.report import TensorError, TensorVerdict

STEPS = 16  # tokens that go through the cache one by one, and that are generated
PROMPT = 8
CHUNK = 9
TIE = 4.0  # rounding may decide where a margin is at most this many times plain float32's error in that router


@dataclass(frozen=True)
class DecodedLogits:
    """Logits (B, T', V) at some positions (T',)."""

    name: str
    positions: NDArray[np.int64]
    logits_BTV: Array


def judge_decoding(reference: ReferenceForward, mlx: Trainer, torch: Trainer) -> tuple[list[TensorVerdict], list[str]]:
    """Return the verdict on every way of decoding, and in words the faults of greedy text beyond rounding."""
    settled_BT = settled_positions(reference, reference.trace, reference.tokens_BT.shape)
    judged = []
    for in_mlx, in_torch in zip(decode(mlx, reference.tokens_BT), decode(torch, reference.tokens_BT), strict=True):
        at, kept = in_mlx.positions, settled_BT[:, in_mlx.positions]
        expected = Expected.of(reference.logits_BTV[:, at][kept], reference.float32_BTV[:, at][kept])
        errors = [TensorError.between(way.logits_BTV[kept], expected.exact) for way in (in_mlx, in_torch)]
        judged.append(judge_tensor(f"logits {in_mlx.name}", "decode", errors[0], errors[1], expected))
    faults = []
    if reference.tokens_BT.shape[1] >= PROMPT + STEPS:
        for name, trainer, error in (("MLX", mlx, judged[0].mlx), ("torch", torch, judged[0].torch)):
            text_BT = generate(trainer, reference.tokens_BT[:, :PROMPT])
            if count := _wrong_tokens(reference, text_BT, error):
                n_tokens = text_BT[:, PROMPT:].size
                faults.append(f"{count} of {n_tokens} tokens that {name} generated are not the likeliest")
    return judged, faults


def decode(trainer: Trainer, tokens_BT: Tokens) -> list[DecodedLogits]:
    """Return the logits of every way of decoding, up to the last position of the tokens."""
    n_time = tokens_BT.shape[1]
    last = min(STEPS, n_time - 1)
    chunks, rest = divmod(n_time, CHUNK)
    found = [
        _in_chunks("one token at a time", trainer, tokens_BT, [n_time - last, *[1] * last]),
        _in_chunks("in chunks", trainer, tokens_BT, [rest, *[CHUNK] * chunks]),
    ]
    if len(tokens_BT) > 1:
        rows = np.concatenate([trainer.logits(row_T[None]) for row_T in tokens_BT])
        found.append(DecodedLogits("one row at a time", np.arange(n_time), rows))
    return found


def generate(trainer: Trainer, prompt_BT: Tokens) -> Tokens:
    """Return prompt and greedy continuation, (B, T + STEPS), generated with a cache."""
    decoder, text_BT = trainer.decoder(), prompt_BT
    new_BT = prompt_BT
    for _ in range(STEPS):
        new_BT = decoder(new_BT).argmax(axis=-1)[:, None].astype(np.int32)
        text_BT = np.concatenate([text_BT, new_BT], axis=1)
    return text_BT


def settled_positions(reference: ReferenceForward, trace: ForwardTrace, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return (B, T): whether no router here or earlier in the row is so close to a tie that rounding may decide.

    Exact ties are settled: they go to the lower index.
    """
    settled_BT = np.ones(shape, bool)
    router_errors = [expected.float32.largest for name, expected in reference.model.items() if name != "lm_head"]
    router_error = max(router_errors, default=0.0)
    for margin_N in margins(trace.router_logits_LNE, trace.experts_LNK):
        tied_BT = ((margin_N > 0) & (margin_N <= TIE * router_error)).reshape(shape)
        settled_BT &= ~np.maximum.accumulate(tied_BT, axis=1)
    return settled_BT


def _wrong_tokens(reference: ReferenceForward, text_BT: Tokens, error: TensorError) -> int:
    """Count generated tokens, before any tie of experts, that trail the reference's likeliest by over two errors."""
    trace, start = reference.numpy_model(text_BT[:, :-1]), text_BT.shape[1] - STEPS
    logits_BTV = trace.logits_BTV[:, start - 1 :]
    chosen_BT = np.take_along_axis(logits_BTV, text_BT[:, start:, None].astype(np.int64), axis=-1)[..., 0]
    settled_BT = settled_positions(reference, trace, text_BT[:, :-1].shape)[:, start - 1 :]
    return int(((logits_BTV.max(axis=-1) - chosen_BT > 2 * error.largest) & settled_BT).sum())


def _in_chunks(name: str, trainer: Trainer, tokens_BT: Tokens, lengths: Sequence[int]) -> DecodedLogits:
    decoder, ends = trainer.decoder(), np.cumsum([length for length in lengths if length])
    parts = np.split(tokens_BT, ends[:-1].tolist(), axis=1)
    return DecodedLogits(name, ends - 1, np.stack([decoder(part) for part in parts], axis=1))
