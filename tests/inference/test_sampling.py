"""The next token against transformers' logits processors, and what it was before there were filters."""

import numpy as np
import pytest

from mlx_moe.errors import InputError
from mlx_moe.inference.sampling import Sampling, filtered_scores, sample_token

V = 300


def random_logits(seed):
    return np.random.default_rng(seed).normal(0, 3, V).astype(np.float32)


def frequencies(logits_V, sampling, n=4000, **kwargs):
    generator = np.random.default_rng(0)
    drawn = [sample_token(logits_V, sampling, generator, **kwargs) for _ in range(n)]
    return np.bincount(drawn, minlength=logits_V.size) / n


def theirs(logits_V, sampling, previous_tokens):
    """The scores after transformers' processors, in the order in which its `generate` applies them."""
    import torch
    from transformers.generation import logits_process as processors

    tokens, scores = torch.tensor([previous_tokens]), torch.tensor(logits_V)[None].double()
    chain = [
        processors.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        processors.TemperatureLogitsWarper(sampling.temperature),
        *([processors.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        processors.TopPLogitsWarper(sampling.top_p),
        processors.MinPLogitsWarper(sampling.min_p),
    ]
    for process in chain:
        scores = process(tokens, scores)
    return scores[0].numpy()


@pytest.mark.parametrize("seed", range(12))
def test_filters_are_those_of_transformers(seed):
    draw = np.random.default_rng(100 + seed)
    sampling = Sampling(
        temperature=float(draw.uniform(0.3, 2)),
        top_k=[None, 1, 20, V, 2 * V][seed % 5],
        top_p=float(draw.choice([1.0, 0.95, 0.5, 0.01])),
        min_p=float(draw.choice([0.0, 0.01, 0.2, 1.0])),
    )
    logits_V = random_logits(seed)
    scores_V, expected_V = filtered_scores(logits_V, sampling), theirs(logits_V, sampling, [0])
    kept_V = np.isfinite(expected_V)
    assert (np.isfinite(scores_V) == kept_V).all()
    assert 1 <= kept_V.sum() <= (sampling.top_k or V)
    np.testing.assert_allclose(scores_V[kept_V], expected_V[kept_V], rtol=1e-6)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 40.0])
def test_the_penalty_is_that_of_transformers(penalty):
    logits_V, previous = random_logits(0), [3, 1, 4, 1, 5]
    logits_V[[1, 3]] = [9.0, 12.0]
    expected_V = theirs(logits_V, Sampling(1.0, repetition_penalty=penalty), previous)
    greedy = Sampling(repetition_penalty=penalty)
    assert sample_token(logits_V, greedy, np.random.default_rng(0), previous) == expected_V.argmax()
    assert (expected_V.argmax() == 3) == (penalty < 2)
    drawn = frequencies(logits_V, Sampling(1.0, repetition_penalty=penalty), previous_tokens=previous)
    probabilities = np.exp(expected_V - expected_V.max())
    assert np.abs(drawn - probabilities / probabilities.sum()).max() < 0.04


def test_draws_follow_the_probabilities():
    logits_V = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    assert sample_token(logits_V, Sampling(), np.random.default_rng(0)) == 1
    assert frequencies(logits_V, Sampling(100.0, top_k=1)).tolist() == [0, 1, 0, 0]
    assert np.abs(frequencies(logits_V, Sampling(1.0)) - [0.1, 0.4, 0.2, 0.3]).max() < 0.04
    assert np.abs(frequencies(logits_V, Sampling(1.0, top_k=2)) - [0, 4 / 7, 0, 3 / 7]).max() < 0.04
    assert np.abs(frequencies(logits_V, Sampling(1.0, top_p=0.6)) - [0, 4 / 7, 0, 3 / 7]).max() < 0.04
    assert np.abs(frequencies(logits_V, Sampling(1.0, min_p=0.6)) - [0, 4 / 7, 0, 3 / 7]).max() < 0.04
    squares = np.array([0.01, 0.16, 0.04, 0.09])
    assert np.abs(frequencies(logits_V, Sampling(0.5)) - squares / squares.sum()).max() < 0.04


@pytest.mark.parametrize("top_k", [None, 5, 2 * V])
def test_a_seed_draws_what_it_always_drew(top_k):
    """Softmax in float64 over the k likeliest, drawn by NumPy's `choice`."""
    generator, reference = np.random.default_rng(7), np.random.default_rng(7)
    for seed in range(200):
        logits_V = random_logits(seed)
        scores_V = logits_V.astype(np.float64) / 0.8
        if top_k and top_k < V:
            scores_V[scores_V < np.sort(scores_V)[-top_k]] = -np.inf
        p = np.exp(scores_V - scores_V.max())
        assert sample_token(logits_V, Sampling(0.8, top_k), generator) == reference.choice(V, p=p / p.sum())


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(2.0, top_k=3, top_p=0.9)])
def test_suppressed_tokens_are_never_drawn(sampling):
    logits_V = np.array([1, 2, 9, 0.5, 8, 1.5], np.float32)
    drawn = frequencies(logits_V, sampling, 500, suppress_tokens=[2, 4])
    assert drawn[[2, 4]].sum() == 0
    assert drawn.argmax() == 1
    assert logits_V.tolist() == [1, 2, 9, 0.5, 8, 1.5]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_logits_of_damaged_weights_are_refused(wrong):
    for sampling in (Sampling(), Sampling(0.8)):
        with pytest.raises(InputError, match="NaN or Inf"):
            sample_token(np.array([0, wrong], np.float32), sampling, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", (-1, 1e-9, 1e9, np.nan)),
        ("top_k", (0, -1, 1 << 30)),
        ("top_p", (0, -0.1, 1.1, np.nan)),
        ("min_p", (-0.1, 1.1, np.nan)),
        ("repetition_penalty", (0, -1, np.inf, np.nan)),
        ("seed", (-1, 1 << 63)),
    ],
)
def test_values_out_of_range_are_refused(field, values):
    for value in values:
        with pytest.raises(InputError, match=f"^--{field.replace('_', '-')} .*: must be "):
            Sampling(**{field: value})
