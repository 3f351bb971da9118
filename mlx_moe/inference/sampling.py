"""The next token from a model's logits. V vocabulary, C candidates.

The filters and their order are those of transformers: repetition penalty, suppressed tokens; then, unless the
temperature is 0, temperature, top-k, top-p and min-p, each on what the one before has left.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_moe.errors import InputError
from mlx_moe.limits import MAX_SEED, MAX_VOCAB_SIZE

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """Settings that choose the next token; by default the likeliest. Raises InputError for a value out of range.

    temperature: divides the logits; 0 takes the likeliest token, and the other filters but the penalty do nothing.
    top_k: draw from the k likeliest tokens; None from all.
    top_p: draw from the fewest likeliest tokens whose probabilities sum to at least p; 1 from all.
    min_p: draw from tokens at least min_p times as likely as the likeliest one; 0 from all.
    repetition_penalty: divides positive logits of tokens that stand in the text, prompt included, and multiplies
        negative ones (Keskar et al. 2019); 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Written so that NaN, which compares false to everything, is refused too.
        if not (self.temperature == 0 or 1e-3 <= self.temperature <= 1e3):
            raise InputError(
                f"--temperature {self.temperature}: must be 0, for always the likeliest token, or from 0.001 to 1000"
            )
        if not (self.top_k is None or 1 <= self.top_k <= MAX_VOCAB_SIZE):
            raise InputError(f"--top-k {self.top_k}: must be from 1 to {MAX_VOCAB_SIZE}; leave it out for all tokens")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: must be above 0 and at most 1, which keeps all tokens")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"--min-p {self.min_p}: must be from 0, which keeps all tokens, to 1")
        if not 1e-2 <= self.repetition_penalty <= 1e2:
            raise InputError(
                f"--repetition-penalty {self.repetition_penalty}: must be from 0.01 to 100; 1 changes nothing"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"--seed {self.seed}: must be from 0 to {MAX_SEED}")


GREEDY = Sampling()


def sample_token(
    logits_V: NDArray[np.float32],
    sampling: Sampling,
    generator: np.random.Generator,
    previous_tokens: Collection[int] = (),
    suppress_tokens: Sequence[int] = (),
) -> int:
    """Return the likeliest token at temperature 0, else one drawn from the softmax of the filtered logits.

    `previous_tokens` are those that the repetition penalty applies to. `suppress_tokens` are never returned.
    Raises InputError where the logits hold NaN or Inf.
    """
    if not np.isfinite(logits_V).all():
        raise InputError("the model's logits hold NaN or Inf, so its weights are damaged; take another checkpoint")
    if sampling.repetition_penalty != 1 and previous_tokens:
        logits_V = _penalized(logits_V, sampling.repetition_penalty, previous_tokens)
    if len(suppress_tokens):
        logits_V = logits_V.copy()
        logits_V[suppress_tokens] = -np.inf
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = _softmax(filtered_scores(logits_V, sampling))
    return int(generator.choice(logits_V.size, p=probabilities_V))


def filtered_scores(logits_V: NDArray[np.float32], sampling: Sampling) -> Scores:
    """Divide by the temperature and set tokens that top-k, top-p or min-p leave out to −inf. Returns (V,) float64."""
    scores_V = logits_V.astype(np.float64) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores_V.size:
        least = np.partition(scores_V, -sampling.top_k)[-sampling.top_k]
        scores_V = np.where(scores_V >= least, scores_V, -np.inf)
    if sampling.top_p < 1:
        scores_V[_outside_nucleus(scores_V, sampling.top_p)] = -np.inf
    if sampling.min_p > 0:
        scores_V[scores_V < scores_V.max() + np.log(sampling.min_p)] = -np.inf
    return scores_V


def _penalized(logits_V: NDArray[np.float32], penalty: float, previous_tokens: Collection[int]) -> NDArray[np.float32]:
    tokens = np.fromiter(previous_tokens, np.int64, len(previous_tokens))
    penalized_V, logits = logits_V.copy(), logits_V[tokens]
    penalized_V[tokens] = np.where(logits < 0, logits * penalty, logits / penalty)
    return penalized_V


def _outside_nucleus(scores_V: Scores, top_p: float) -> NDArray[np.int64]:
    """The tokens that top-p removes: the least likely ones, as long as their probabilities sum to at most 1 − p."""
    candidates_C = np.flatnonzero(scores_V > -np.inf)
    rising_C = candidates_C[np.argsort(scores_V[candidates_C], kind="stable")]
    sums_C = _softmax(scores_V[rising_C]).cumsum()
    return rising_C[:-1][sums_C[:-1] <= 1 - top_p]


def _softmax(scores: Scores) -> Scores:
    powers = np.exp(scores - scores.max())
    probabilities: Scores = powers / powers.sum()
    return probabilities
