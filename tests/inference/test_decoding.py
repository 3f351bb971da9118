"""Generation with a key-value cache against an uncached loop."""

import itertools

import numpy as np
import pytest
from support.small_models import BACKENDS, FOUR_EXPERTS, build, random_tokens, rough_weights, small_model

from mlx_moe.inference.decoding import generate_text, generate_tokens, stream_generate
from mlx_moe.inference.sampling import Sampling

MODELS = [
    pytest.param(
        small_model(name, context_length=16, weight_tying=False, moe=moe, **fields),
        id=f"{fields.get('position_encoding', name)}-{'experts' if moe else 'dense'}",
    )
    for name, fields in (("gpt2", {}), ("smollm", {}), ("simple", {"position_encoding": "none"}))
    for moe in (None, FOUR_EXPERTS)
]
PENALTIES = Sampling(), Sampling(repetition_penalty=100.0)


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


class WithHoles:
    """A tokenizer of which only some ids have a token; its text is their numbers."""

    ids, eot_id = frozenset({0, 3, 4, 7, 20}), 20

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return "".join(f"{i} " for i in ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(5.0), Sampling(1.0, top_k=4, top_p=0.99)], ids=str)
def test_ids_that_the_tokenizer_lacks_are_never_written(backend, sampling):
    trainer = eloquent(backend, small_model("llama", context_length=16))
    assert trainer.config.vocab_size > 21
    assert not set(generate_tokens(trainer, [3, 4], 30, sampling)) <= WithHoles.ids
    text = generate_text(trainer, WithHoles(), "3 4", 30, sampling)
    assert set(map(int, text.split())) <= WithHoles.ids - {20}
    assert "".join(stream_generate(trainer, WithHoles(), "3 4", 30, sampling)) == text


def test_the_penalty_counts_the_prompt_and_all_that_was_written():
    trainer = eloquent("torch", small_model("llama", context_length=16))
    n = trainer.config.vocab_size // 4
    plain, penalized = (list(generate_tokens(trainer, [1, 2], n, sampling)) for sampling in PENALTIES)
    assert len(set(penalized)) > len(set(plain))
    assert len({1, 2, *penalized}) == n + 2
