"""Generation with a key-value cache against an uncached loop."""

import itertools

import numpy as np
import pytest
from support.small_models import BACKENDS, EXPERTS, build, random_tokens, rough_weights, small_model

from mlx_moe.inference.decoding import generate_tokens
from mlx_moe.inference.sampling import Sampling

MODELS = [
    pytest.param(
        small_model(name, context_length=16, weight_tying=False, moe=moe, **fields),
        id=f"{fields.get('position_encoding', name)}-{'experts' if moe else 'dense'}",
    )
    for name, fields in (("gpt2", {}), ("smollm", {}), ("simple", {"position_encoding": "none"}))
    for moe in (None, EXPERTS)
]


def eloquent(backend, config):
    """A model whose likeliest token follows from more than the last one: large matrices and a head of its own."""
    weights = rough_weights(config, seed=0)
    return build(backend, config, {name: array * (1 if "norm" in name else 5) for name, array in weights.items()})


def uncached(trainer, prompt, n_new):
    """Greedy tokens from whole sequences only; a window that has outgrown the context shrinks to half of it."""
    context_length = trainer.config.context_length
    tokens, start = list(prompt), max(0, len(prompt) - context_length)
    for _ in range(n_new):
        if len(tokens) - start > context_length:
            start = len(tokens) - context_length // 2
        window = np.zeros((1, context_length), np.int32)
        window[0, : len(tokens) - start] = tokens[start:]
        tokens.append(int(trainer.logits(window)[0, len(tokens) - start - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("n_prompt", [1, 5, 16, 23])
@pytest.mark.parametrize("config", MODELS)
def test_greedy_generation_equals_an_uncached_loop(config, n_prompt):
    prompt = random_tokens(config, 1, n_prompt, seed=n_prompt)[0].tolist()
    expected = None
    for backend in BACKENDS:
        trainer = eloquent(backend, config)
        generated = list(generate_tokens(trainer, prompt, 40))
        assert len(generated) == 40  # more than twice the context
        assert generated == uncached(trainer, prompt, 40)
        assert generated == (expected or generated)
        expected = generated
    assert len(set(expected)) > 10


@pytest.mark.parametrize("config", MODELS)
def test_sampling_depends_on_the_seed_only(config):
    prompt = [3, 1, 4]
    trainers = [eloquent(backend, config) for backend in BACKENDS]
    runs = {
        seed: [
            list(generate_tokens(trainer, prompt, 30, Sampling(0.8, top_k=20, seed=seed))) for trainer in trainers * 2
        ]
        for seed in (0, 1)
    }
    for same in runs.values():
        assert len(same[0]) == 30
        assert all(run == same[0] for run in same)
    assert runs[0][0] != runs[1][0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_stops(backend):
    trainer = eloquent(backend, small_model("llama", context_length=16))
    sampling = Sampling(1.0, seed=5)
    tokens = list(generate_tokens(trainer, [1, 2, 3], 20, sampling))
    stop = tokens[7]
    assert list(generate_tokens(trainer, [1, 2, 3], 20, sampling, stop_tokens=[stop])) == tokens[: tokens.index(stop)]
    assert list(generate_tokens(trainer, [1, 2, 3], 0)) == []
    assert list(itertools.islice(generate_tokens(trainer, [1, 2, 3], 10**9), 3)) == list(
        generate_tokens(trainer, [1, 2, 3], 3)
    )
